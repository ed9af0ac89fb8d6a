"""torch.distributed.checkpoint's ``get_`` and ``set_state_dict`` (what torchtitan uses) with ``ShardedLion``."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from lion_dist import ShardedLion, this_ranks_part
from tests.checkpoint.engines import POLICIES
from tests.full_states import assert_same_tensors, bits, build, has_params, never_stopped, same_params, train, trained
from tests.models import mlp

OPTIONS = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "on the host": {"cpu_offload": True},
    "full": {"full_state_dict": True},
}  # torch sets a full state that is flattened for no optimizer (KeyError: 'param_groups.0.params.0')


def snapshot(model, opt) -> list:
    opt.finish_param_sync()
    shards = [x.clone() for s in opt.shards for x in (s.exp_avg, s.main_param, s.steps) if x is not None]
    return [opt.counters.clone(), *(p.detach().clone() for p in model.parameters()), *shards]


def is_same(before: list, after: list) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(before, after, strict=True))


def get_and_set(policy: str, engine: str, options: dict) -> None:
    """Nothing is changed by either; and what was got brings a twin to the same bits, counters too."""
    options = StateDictOptions(**options)
    model, opt = trained(policy, engine)
    before = snapshot(model, opt)
    state = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    assert is_same(before, snapshot(model, opt))
    twin, twin_opt = build(policy, engine)
    get_optimizer_state_dict(twin, twin_opt, options=options)
    assert twin_opt.taken_steps() == 0 and not any(s.exp_avg.any() for s in twin_opt.shards)  # no phantom step
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, twin_opt, state, options=options)
    assert is_same(before, snapshot(twin, twin_opt))
    assert [sorted(g) for g in twin_opt.param_groups] == [sorted(g) for g in opt.param_groups]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("ranks", "engine"), [(1, "sharded"), (2, "sharded"), (4, "sharded hsdp")])
def test_what_is_got_can_be_set_and_neither_takes_a_step(gloo, ranks, engine, options):
    for policy in ("fp32 parameters", "split", "fp32 main params", "no main params"):
        gloo.run(ranks, get_and_set, policy, engine, OPTIONS[options])


def names_and_values(policy: str) -> None:
    """The full state has real names, whole tensors, and plain Lion's bits."""
    model, opt = trained(policy)
    state = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
    plain_model, plain = trained(policy, "plain")
    expected = get_optimizer_state_dict(plain_model, plain, options=StateDictOptions(full_state_dict=True))
    unused = {"unused.weight", "unused.bias"}  # ShardedLion has state before the first gradient
    assert state["state"].keys() - unused == expected["state"].keys()
    assert all(type(x) is torch.Tensor for kinds in state["state"].values() for x in kinds.values())
    assert_same_tensors(state, expected)
    flat = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(model, opt, options=flat)
    assert all(torch.equal(flat[f"state.{n}.exp_avg"], kinds["exp_avg"]) for n, kinds in state["state"].items())
    assert [g["params"] for g in state["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    on_rank_0 = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(on_rank_0.get("state")) == (dist.get_rank() == 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_state_is_plain_lions_by_name(gloo, policy):
    gloo.run(2, names_and_values, policy)


def broadcast_from_rank_0(policy: str) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, opt = trained(policy)
    before = snapshot(model, opt)
    state = get_optimizer_state_dict(model, opt, options=options)
    twin, twin_opt = build(policy)
    twin.load_state_dict(model.state_dict())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(twin, twin_opt, state if dist.get_rank() == 0 else {}, options=options)
    assert is_same(before, snapshot(twin, twin_opt))


@pytest.mark.parametrize("policy", ["fp32 parameters", "split", "fp32 main params", "no main params"])
def test_rank_0s_full_state_is_broadcast(gloo, policy):
    gloo.run(2, broadcast_from_rank_0, policy)


def from_plain_lion(policy: str) -> None:
    """A full state of another engine, with main params in its own form."""
    plain_model, plain = trained(policy, "plain")
    state = get_optimizer_state_dict(plain_model, plain, options=StateDictOptions(full_state_dict=True))
    model, opt = build(policy)
    model.load_state_dict(plain_model.state_dict())
    options = StateDictOptions(full_state_dict=True, strict=False)  # plain Lion has no state of what nothing used
    set_optimizer_state_dict(model, opt, state, options=options)
    train(model, opt, range(3, 5))
    train(plain_model, plain, range(3, 5))
    opt.finish_param_sync()
    assert same_params(model, plain_model)


@pytest.mark.parametrize("policy", ["fp32 parameters", "split", "no main params"])
def test_a_full_state_of_plain_lion_is_set_bit_identically(gloo, policy):
    gloo.run(2, from_plain_lion, policy)


# ---- through files, to other ranks


def save(path: str, policy: str, options: dict) -> None:
    model, opt = trained(policy)
    before = snapshot(model, opt)
    model_state, state = get_state_dict(model, opt, options=StateDictOptions(**options))
    dcp.save({"model": model_state, "optim": state}, checkpoint_id=path)
    assert is_same(before, snapshot(model, opt))


def load_and_go_on(path: str, policy: str, engine: str, options: dict, expected: list[Tensor]) -> None:
    options = StateDictOptions(**options)
    model, opt = build(policy, engine)
    model_state, state = get_state_dict(model, opt, options=options)
    template = {"model": model_state, "optim": state}
    dcp.load(template, checkpoint_id=path)
    set_state_dict(model, opt, model_state_dict=template["model"], optim_state_dict=template["optim"], options=options)
    assert opt.taken_steps() == 3
    train(model, opt, range(3, 5))
    opt.finish_param_sync()
    assert has_params(model, expected)


@pytest.mark.parametrize("options", ["plain", "flattened"])
@pytest.mark.parametrize("policy", ["fp32 parameters", "split", "fp32 main params", "no main params"])
def test_saved_on_two_ranks_it_goes_on_bit_identically_on_one_and_four(gloo, tmp_path, policy, options):
    path = str(tmp_path / "checkpoint")
    gloo.run(2, save, path, policy, OPTIONS[options])
    for ranks, engine in ((1, "sharded"), (4, "sharded"), (4, "sharded hsdp")):
        gloo.run(ranks, load_and_go_on, path, policy, engine, OPTIONS[options], never_stopped(policy))


def save_as_stateful(path: str) -> None:
    model, opt = trained("split")
    dcp.save({"model": model, "optim": opt}, checkpoint_id=path)


def load_as_stateful(path: str) -> None:
    expected, reference = trained("split", "plain")
    model, opt = build("split")
    dcp.load({"model": model, "optim": opt}, checkpoint_id=path)
    assert opt.taken_steps() == 3
    train(model, opt, range(3, 5))
    train(expected, reference, range(3, 5))
    opt.finish_param_sync()
    assert same_params(model, expected)


def test_the_optimizer_itself_is_saved_and_loaded_by_dcp(gloo, tmp_path):
    path = str(tmp_path / "checkpoint")
    gloo.run(2, save_as_stateful, path)
    for ranks in (1, 4):
        gloo.run(ranks, load_as_stateful, path)


def save_in_background(path: str, kind: AsyncCheckpointerType) -> None:
    _, opt = trained()
    want = [shard.exp_avg.clone() for shard in opt.shards]
    state = opt.state_dict()
    if kind is AsyncCheckpointerType.PROCESS:  # it sends this rank's part to its process by pickling it
        state = this_ranks_part(state)
    saving = dcp.async_save({"optim": state}, checkpoint_id=path, async_checkpointer_type=kind)
    for shard in opt.shards:
        shard.exp_avg.zero_()
    saving.result()
    dcp.load({"optim": opt.state_dict()}, checkpoint_id=path)
    assert all(torch.equal(shard.exp_avg, x) for shard, x in zip(opt.shards, want, strict=True))


def test_torchs_async_save_takes_a_copy_of_the_state(gloo, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gloo.run(2, save_in_background, str(tmp_path / "checkpoint"), AsyncCheckpointerType.THREAD)


# ---- no phantom step, and what is refused


def frozen_model() -> None:
    model = mlp(4, 4).requires_grad_(False)
    opt = ShardedLion(model.parameters(), module=model)
    state = get_optimizer_state_dict(model, opt)
    assert state["state"] == {} and opt.taken_steps() == 0
    set_optimizer_state_dict(model, opt, state)
    assert opt.taken_steps() == 0


def test_no_phantom_step_with_nothing_to_train(gloo):
    gloo.run(2, frozen_model)


def emptied_state() -> str:
    """Where ``optimizer.state`` is empty torch takes a step with lr 0 and zero gradients, which is refused."""
    model, opt = trained()
    before = snapshot(model, opt)
    opt.state.clear()
    with pytest.raises(RuntimeError) as raised:
        get_optimizer_state_dict(model, opt)
    for param in model.parameters():
        param.grad = None
    for group in opt.param_groups:
        group["lr"] = 1e-2
    assert is_same(before, snapshot(model, opt))
    return str(raised.value)


def test_a_phantom_step_of_an_emptied_state_is_refused(gloo):
    assert "optimizer.state has been emptied" in gloo.run(2, emptied_state)[0]


def experts() -> str:
    rank = dist.get_rank()
    groups = [dist.new_group([0]), dist.new_group([1])]
    model = mlp(4, 4, seed=rank)
    opt = ShardedLion([{"params": model.parameters(), "process_group": groups[rank]}], module=None)
    with pytest.raises(dcp.CheckpointException, match="process_group of its own"):
        dcp.save(get_optimizer_state_dict(model, opt), checkpoint_id="unused")
    return ""


def test_experts_of_one_name_are_not_written_over_each_other(gloo, tmp_path, monkeypatch):
    gloo.run(2, experts)


def after_consolidation() -> None:
    """The rank that holds the whole takes no part in gathering: nothing hangs, and a mixed save is refused."""
    model, opt = trained()
    opt.consolidate_state_dict()
    state = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
    values = [kinds["exp_avg"] for kinds in state["state"].values()]
    assert all(type(value) is torch.Tensor for value in values) == (dist.get_rank() == 0)
    train(model, opt, range(3, 4))
    state = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
    assert all(type(kinds["exp_avg"]) is torch.Tensor for kinds in state["state"].values())


def test_a_full_state_can_be_asked_for_after_consolidation(gloo):
    gloo.run(2, after_consolidation)


def tied_and_compiled() -> None:
    """Names come from torch, also where the model is wrapped and two names are one parameter."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(6, 4), "head": torch.nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    opt = ShardedLion(model.parameters(), module=model, lr=0.1)
    model["head"](model["embed"](torch.arange(6))).square().sum().backward()
    opt.step()
    for options in OPTIONS.values():
        options = StateDictOptions(**options)
        momentum = [s.exp_avg.clone() for s in opt.shards]
        state = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
        for shard in opt.shards:
            shard.exp_avg.zero_()
        set_optimizer_state_dict(model, opt, state, options=options)
        assert all(torch.equal(s.exp_avg, m) and m.numel() for s, m in zip(opt.shards, momentum, strict=True))


def test_tied_parameters(gloo):
    gloo.run(2, tied_and_compiled)
