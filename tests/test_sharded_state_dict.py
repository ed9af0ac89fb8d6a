"""``ShardedLion.state_dict()`` and ``load_state_dict()``: what they give, what they take, what they refuse."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lion_dist import Lion, ShardedLion, ShardingConfig, this_ranks_part
from lion_dist.boxed_tensor import BoxedTensor
from tests.full_states import bits, build, same_params, train, trained
from tests.models import make_model, mlp

POLICY = "fp32 main params"


def everything_of(model, opt) -> list:
    """Copies of all that a load may change."""
    shards = [x for s in opt.shards for x in (s.exp_avg, s.main_param, s.steps) if x is not None]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    return [bits(x).clone() for x in (*model.parameters(), *shards, opt.counters)], copy.deepcopy(groups)


def is_unchanged(model, opt, before) -> bool:
    tensors, groups = everything_of(model, opt)
    return groups == before[1] and all(map(torch.equal, tensors, before[0]))


# ---- one rank's part


def save_on_rank_0(path: str) -> str:
    _, opt = trained()
    if dist.get_rank() == 0:
        with pytest.raises(TypeError) as raised:
            torch.save(opt.state_dict(), path)
        return str(raised.value)
    return ""


def test_saving_rank_0s_part_is_refused_with_the_remedy(gloo, tmp_path):
    message = gloo.run(2, save_on_rank_0, str(tmp_path / "o.pt"))[0]
    assert "rank 0's part of 2" in message and "consolidate_state_dict(to=0)" in message
    assert "this_ranks_part" in message


def every_way_of_pickling() -> None:
    _, opt = trained()
    state = opt.state_dict()
    for dump in (
        pickle.dumps,
        lambda s: torch.save({"opt": s}, io.BytesIO()),
        lambda s: torch.save([v["exp_avg"] for v in s["state"].values()], io.BytesIO()),
        lambda s: torch.save(opt.state, io.BytesIO()),
        lambda s: pickle.dumps(copy.deepcopy(s)),
        lambda s: dist.all_gather_object([None, None], s),
    ):
        with pytest.raises(TypeError, match="this_ranks_part"):
            dump(state)


def test_every_way_of_pickling_a_part_is_refused(gloo):
    gloo.run(2, every_way_of_pickling)


def a_file_for_each_rank(path: str) -> None:
    model, opt = trained(POLICY)
    before = everything_of(model, opt)
    path = f"{path}.{dist.get_rank()}"
    torch.save({"opt": this_ranks_part(opt.state_dict()), "step": 3}, path)
    train(model, opt, range(3, 4))
    twin, twin_opt = build(POLICY)
    twin_opt.load_state_dict(torch.load(path)["opt"])
    tensors = everything_of(twin, twin_opt)
    state = len(list(twin.parameters()))
    assert all(map(torch.equal, tensors[0][state:], before[0][state:])) and tensors[1] == before[1]


def test_a_file_for_each_rank_loads_bit_identically(gloo, tmp_path):
    gloo.run(2, a_file_for_each_rank, str(tmp_path / "o.pt"))


def load_rank_1s_file(path: str, ranks: int) -> str:
    rank = dist.get_rank()
    model, opt = trained()
    if dist.get_world_size() == ranks:
        torch.save(this_ranks_part(opt.state_dict()), f"{path}.{rank}")
        dist.barrier()
    before = everything_of(model, opt)
    with pytest.raises(ValueError) as raised:
        opt.load_state_dict(torch.load(f"{path}.{(rank + 1) % ranks}"))
    assert is_unchanged(model, opt, before)
    return str(raised.value)


def test_another_ranks_part_is_refused_by_name(gloo, tmp_path):
    path = str(tmp_path / "o.pt")
    first, second = gloo.run(2, load_rank_1s_file, path, 2)
    assert "rank 1's part of 2" in first and "this is rank 0 of 2" in first and "consolidate_state_dict" in first
    assert "rank 0's part of 2" in second and "this is rank 1 of 2" in second
    message = gloo.run(1, load_rank_1s_file, path, 2)[0]  # on fewer ranks
    assert "rank 1's part of 2" in message and "this is rank 0 of 1" in message


def load_of_other_buckets() -> str:
    _, opt = trained()
    _, other = build(sharding=ShardingConfig(bucket_numel=5000))
    with pytest.raises(ValueError) as raised:
        other.load_state_dict(opt.state_dict())
    return str(raised.value)


def test_a_part_of_other_buckets_says_so(gloo):
    assert "of other buckets" in gloo.run(2, load_of_other_buckets)[0]


# ---- malformed states


def malformed(good: dict) -> dict[str, object]:
    """States by what is wrong with them, as a part of the message."""

    def changed(i: int, **kinds) -> dict:
        return {**good, "state": {**good["state"], i: {**good["state"][i], **kinds}}}

    def regrouped(**settings) -> dict:
        return {**good, "param_groups": [{**good["param_groups"][0], **settings}, *good["param_groups"][1:]]}

    i = max(k for k, v in good["state"].items() if v["exp_avg"].numel() > 8)
    first = min(good["state"])
    shape = tuple(good["state"][i]["exp_avg"].shape)
    ids = good["param_groups"][0]["params"]
    return {
        r"needs 'state' \(a dict\)": {},
        "must be a dict, got None": None,
        r"must be a dict, got \[": [good],
        r"needs 'param_groups' \(a list\)": {"state": {}},
        "needs 'state' to be a dict, got 'x'": {**good, "state": "x"},
        "param group 0 has no list": {**good, "param_groups": [3, 4]},
        "param groups of": {**good, "param_groups": good["param_groups"][:1]},
        "more than once": regrouped(params=[ids[0]] * len(ids)),
        "numbers or names": regrouped(params=[[0]] * len(ids)),
        "that no saved param group has": {**good, "state": {**good["state"], 1000: {}}},
        "no 'exp_avg'": {**good, "state": {**good["state"], i: {"momentum_buffer": torch.ones(shape)}}},
        "has str but no": {**good, "state": {**good["state"], i: "x"}},
        r"has shape \(3,\)": changed(i, exp_avg=torch.ones(3)),
        "is torch.int64": changed(i, exp_avg=torch.ones(shape, dtype=torch.int64)),
        "is a str": changed(i, exp_avg="x"),
        "main_param of": changed(i, main_param=torch.ones(3)),
        "lr must be": regrouped(lr=float("nan")),
        "betas": regrouped(betas=(0.9, 1.5)),
        "param group 0 of the saved state": regrouped(weight_decay="much"),
        '"counters"': {**good, "counters": torch.ones(3)},
        "two numbers": {**changed(first, counters=7), "counters": 7},
    }


def load_malformed(ranks_part: bool) -> None:
    model, opt = trained(POLICY)
    good = opt.state_dict()
    if not ranks_part:
        opt.consolidate_state_dict()
        box = [opt.full_state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box)
        (good,) = box
    train(model, opt, range(3, 5))
    before = everything_of(model, opt)
    for expected, state in malformed(good).items():
        with pytest.raises(ValueError, match=expected):
            opt.load_state_dict(state)
        assert is_unchanged(model, opt, before), expected


@pytest.mark.parametrize("ranks_part", [True, False], ids=["part", "full"])
def test_a_malformed_state_is_refused_before_anything_changes(gloo, ranks_part):
    gloo.run(2, load_malformed, ranks_part)


def load_of_frozen() -> None:
    _, plain = trained(engine="plain")
    model = make_model()
    model.up.requires_grad_(False)
    params = list(model.named_parameters())
    groups = [{"params": [(n, p) for n, p in params if (p.ndim > 1) == wide]} for wide in (True, False)]
    opt = ShardedLion(groups, module=model)
    before = everything_of(model, opt)
    with pytest.raises(ValueError, match="'up.weight', which is frozen here"):
        opt.load_state_dict(plain.state_dict())
    assert is_unchanged(model, opt, before)


def test_the_momentum_of_a_parameter_that_is_frozen_here_is_not_dropped(gloo):
    gloo.run(2, load_of_frozen)


def load_in_another_order() -> None:
    """By name where there are names: two layers of one shape are not taken for each other."""
    model = mlp(4, 4, 4)
    named = list(model.named_parameters())
    opt = ShardedLion(named, lr=0.1, module=model)
    (model[0](torch.ones(1, 4)).sum() + 3 * model[2](torch.ones(1, 4)).sum()).backward()
    opt.step()
    opt.consolidate_state_dict()
    box = [opt.full_state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    twin = mlp(4, 4, 4)
    other = ShardedLion(reversed(list(twin.named_parameters())), lr=0.1, module=twin)
    other.load_state_dict(box[0])
    other.consolidate_state_dict()
    if dist.get_rank() == 0:
        again = other.full_state_dict()["state"]
        for i in range(4):
            assert torch.equal(again[3 - i]["exp_avg"], box[0]["state"][i]["exp_avg"])
    opt.close()
    regrouped = ShardedLion([{"params": named[2:]}, {"params": named[:2]}], module=None)
    halves = [{**box[0]["param_groups"][0], "params": [2 * g, 2 * g + 1]} for g in (0, 1)]
    for g, half in enumerate(halves):
        half["param_names"] = half["param_names"][2 * g : 2 * g + 2]
    with pytest.raises(ValueError, match="where this optimizer has another parameter"):
        regrouped.load_state_dict({**box[0], "param_groups": halves})


def test_a_full_state_is_matched_by_name(gloo):
    gloo.run(2, load_in_another_order)


def load_state_by_name() -> None:
    """What an earlier version saved: state and groups by the parameters' names."""
    model, opt = trained(POLICY)
    state = copy.deepcopy(opt.state_dict())
    before = everything_of(model, opt)
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    owned = {
        names[i]: kinds
        for i, kinds in state["state"].items()
        if any(v.boxes for v in kinds.values() if hasattr(v, "boxes"))
    }
    groups = [
        {k: v for k, v in g.items() if k != "param_names"} | {"params": g["param_names"]} for g in state["param_groups"]
    ]
    for shard in opt.shards:
        shard.exp_avg.zero_()
    opt.load_state_dict({"state": owned, "param_groups": groups, "counters": state["counters"]})
    assert is_unchanged(model, opt, before)


def test_a_state_by_name_loads(gloo):
    gloo.run(2, load_state_by_name)


# ---- keys of param groups


def group_keys() -> None:
    model, opt = build()
    fresh = [sorted(group) for group in opt.param_groups]
    saved_keys = [sorted(group) for group in opt.state_dict()["param_groups"]]
    foreign = {"differentiable": False, "foreach": None, "eps": 1e-8, "amsgrad": True, "fused": None, "maximize": False}
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in opt.param_groups])
    for state in (
        opt.state_dict(),
        {**opt.state_dict(), "param_groups": [g | foreign for g in opt.state_dict()["param_groups"]]},
        {**adamw.state_dict(), "state": {}},
    ):
        opt.load_state_dict(copy.deepcopy(state))
        opt.load_state_dict(copy.deepcopy(state))
        assert [sorted(group) for group in opt.param_groups] == fresh
        assert [sorted(group) for group in opt.state_dict()["param_groups"]] == saved_keys
    assert set(opt.defaults) == {"lr", "betas", "weight_decay"}
    opt.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(3)))]})
    assert sorted(opt.param_groups[-1]) == fresh[0]


def test_groups_have_a_fresh_optimizers_keys_whatever_was_loaded(gloo):
    gloo.run(2, group_keys)


def scheduled() -> None:
    model, opt = build()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10, cycle_momentum=False)
    for step in range(3):
        train(model, opt, range(step, step + 1))
        scheduler.step()
    saved = copy.deepcopy((opt.state_dict(), scheduler.state_dict()))
    twin, twin_opt = build()
    twin_opt.load_state_dict(saved[0])
    starts = [[group["initial_lr"] for group in o.param_groups] for o in (opt, twin_opt)]
    assert starts[0] == starts[1]
    resumed = torch.optim.lr_scheduler.LambdaLR(twin_opt, lambda step: 1.0, last_epoch=3)  # reads initial_lr
    assert resumed.base_lrs == [group["initial_lr"] for group in opt.param_groups]
    other = torch.optim.lr_scheduler.OneCycleLR(twin_opt, max_lr=0.1, total_steps=10, cycle_momentum=False)
    other.load_state_dict(saved[1])
    twin_opt.load_state_dict(saved[0])
    for _ in range(3):
        scheduler.step()
        other.step()
        assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in twin_opt.param_groups]


def test_schedulers_keep_their_keys_and_go_on(gloo):
    gloo.run(2, scheduled)


def aliased_settings() -> None:
    """A learning rate in a tensor is not shared with the state that it came from."""
    model, opt = build()
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        group["lr"], group["betas"] = torch.tensor(0.5), [0.9, 0.99]
    opt.load_state_dict(state)
    opt.param_groups[0]["lr"].fill_(0.25)
    assert state["param_groups"][0]["lr"].item() == 0.5
    assert opt.param_groups[0]["betas"] == (0.9, 0.99)  # JSON makes lists of tuples


def test_loaded_settings_are_the_optimizers_own(gloo):
    gloo.run(2, aliased_settings)


# ---- what torch's Optimizer promises


def hooks() -> None:
    _, opt = trained()
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append("save pre"))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "note": 7})
    opt.register_load_state_dict_pre_hook(lambda o, state: calls.append(state.pop("note")))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    state = opt.state_dict()
    assert state["note"] == 7
    opt.load_state_dict(state)
    assert state["note"] == 7  # the hook changed a copy
    assert calls == ["save pre", 7, "load post"]
    opt.register_load_state_dict_pre_hook(lambda o, state: {})
    with pytest.raises(ValueError, match="needs 'state'"):
        opt.load_state_dict(state)


def test_hooks_of_torchs_optimizer_are_called(gloo):
    gloo.run(2, hooks)


def under_modes() -> None:
    model, opt = trained(POLICY)
    before = everything_of(model, opt)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            state = copy.deepcopy(opt.state_dict())
        for shard in opt.shards:
            shard.exp_avg.zero_()
        with mode():
            opt.load_state_dict(state)
        assert is_unchanged(model, opt, before)
        with mode():
            opt.consolidate_state_dict()
        if dist.get_rank() == 0:
            assert not any(v.requires_grad for kinds in opt.full_state_dict()["state"].values() for v in kinds.values())
    with torch.inference_mode():
        state = opt.state_dict()
    opt.load_state_dict(state)
    train(model, opt, range(3, 4))


def test_states_under_no_grad_and_inference_mode(gloo):
    gloo.run(2, under_modes)


def shown_state() -> None:
    """``optimizer.state`` as frameworks read it: by parameter, dicts of tensors, live; written, it changes nothing."""
    model, opt = trained(POLICY)
    assert list(opt.state) == [p for group in opt.param_groups for p in group["params"]]
    for param, kinds in opt.state.items():
        assert isinstance(kinds, dict)
        for key, value in kinds.items():
            assert isinstance(value, Tensor) and (key == "counters" or value.shape in (param.shape, ()))
            kinds[key] = value.to(param.device, non_blocking=True)  # Lightning's optimizer_to_device
    before = everything_of(model, opt)
    state = copy.deepcopy(opt.state_dict())
    for shard in opt.shards:
        for own in shard.slices_of(shard.exp_avg):
            own.fill_(7.0)
    shown = [local for kinds in opt.state.values() for local in getattr(kinds.get("exp_avg"), "boxes", {}).values()]
    assert shown and all((local == 7).all() for local in shown)
    opt.load_state_dict(state)
    assert is_unchanged(model, opt, before)


def test_optimizer_state_shows_the_live_state(gloo):
    gloo.run(2, shown_state)


def unfreeze() -> None:
    model = mlp(4, 4, 4)
    model[2].requires_grad_(False)
    opt = ShardedLion(model.parameters(), module=model)
    assert opt.state[model[2].weight] == {} and set(opt.state_dict()["state"]) == {0, 1}
    model[2].requires_grad_(True)
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    assert set(opt.state_dict()["state"]) == {0, 1, 2, 3} and "exp_avg" in opt.state[model[2].weight]
    opt.load_state_dict(opt.state_dict())


def test_a_parameter_that_is_unfrozen_has_state_from_then_on(gloo):
    gloo.run(2, unfreeze)


def under_accelerate() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, opt = trained(POLICY)
    before = everything_of(model, opt)
    wrapped = accelerator.prepare_optimizer(opt)  # takes the state to its device and loads it
    assert is_unchanged(model, opt, before)
    assert all(isinstance(v["exp_avg"], Tensor) for v in wrapped.state.values() if v)
    accelerator.free_memory()


def test_accelerate_prepares_the_optimizer(gloo):
    gloo.run(2, under_accelerate)


def as_lightning_saves(path: str) -> None:
    """``Strategy.optimizer_state``, and what is restored on every rank from rank 0's file."""
    model, opt = trained(POLICY)
    before = everything_of(model, opt)
    opt.consolidate_state_dict()
    if dist.get_rank() == 0:
        torch.save({"state_dict": model.state_dict(), "optimizer_states": [opt.state_dict()]}, path)
    dist.barrier()
    saved = torch.load(path)
    twin, twin_opt = build(POLICY)
    twin.load_state_dict(saved["state_dict"])
    twin_opt.load_state_dict(saved["optimizer_states"][0])
    assert is_unchanged(twin, twin_opt, before)


def test_what_rank_0_saves_after_consolidation_is_whole(gloo, tmp_path):
    gloo.run(2, as_lightning_saves, str(tmp_path / "c.ckpt"))


def wrong_engine() -> None:
    """A part given to plain Lion is refused, not read as the whole."""
    _, opt = trained()
    _, plain = build(engine="plain")
    with pytest.raises(NotImplementedError, match="consolidate_state_dict"):
        plain.load_state_dict(opt.state_dict())


def test_a_part_is_no_operand_for_another_optimizer(gloo):
    gloo.run(2, wrong_engine)


def test_on_one_rank_values_are_plain_tensors_and_the_format_is_plain_lions(tmp_path):
    model, opt = trained(POLICY)
    plain_model, plain = trained(POLICY, "plain")
    state, expected = opt.state_dict(), plain.state_dict()
    assert not any(isinstance(v, BoxedTensor) for kinds in state["state"].values() for v in kinds.values())
    assert [sorted(g) for g in state["param_groups"]] == [sorted(g) for g in expected["param_groups"]]
    torch.save(state, tmp_path / "o.pt")
    twin, other = build(POLICY, "plain")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(torch.load(tmp_path / "o.pt"))
    train(twin, other, range(3, 5))
    train(plain_model, plain, range(3, 5))
    assert isinstance(other, Lion) and same_params(twin, plain_model)
