"""``consolidate_state_dict`` and ``full_state_dict``: the state of all ranks on one, in plain ``Lion``'s format."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from lion_pytorch import Lion as PublishedLion
from torch import Tensor

from lion_dist import Lion, ShardedLion, ShardingConfig
from lion_dist.sharding import collectives
from lion_dist.state_dict import full_state
from tests.checkpoint.engines import POLICIES
from tests.full_states import assert_same_tensors, build, has_params, never_stopped, same_params, train, trained
from tests.models import mlp


def consolidated(opt: ShardedLion, to: int = 0) -> dict | None:
    opt.consolidate_state_dict(to=to)
    return opt.full_state_dict() if dist.get_rank() == to else None


def consolidate_and_compare(policy: str, engine: str, to: int) -> None:
    _, opt = trained(policy, engine)
    whole = consolidated(opt, to)
    if whole is None:
        return
    assert all(
        type(x) is torch.Tensor and x.device.type == "cpu" for kinds in whole["state"].values() for x in kinds.values()
    )
    assert whole["counters"].tolist() == [3, 0]
    _, plain = trained(policy, "plain")
    expected = plain.state_dict()
    assert_same_tensors(whole, expected)
    for group, other in zip(whole["param_groups"], expected["param_groups"], strict=True):
        assert group == other  # lr, betas, weight_decay, params, param_names


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("ranks", "engine", "to"), [(2, "sharded", 0), (4, "sharded", 2), (4, "sharded hsdp", 3)])
def test_the_whole_state_is_plain_lions_to_the_bit(gloo, policy, ranks, engine, to):
    gloo.run(ranks, consolidate_and_compare, policy, engine, to)


def save_whole(path: str, policy: str) -> None:
    model, opt = trained(policy)
    whole = consolidated(opt)
    if whole is not None:
        torch.save({"model": model.state_dict(), "opt": whole}, path)


def go_on_from(path: str, policy: str, engine: str, expected: list[Tensor]) -> None:
    saved = torch.load(path)
    model, opt = build(policy, engine)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    if engine != "plain":
        assert opt.taken_steps() == 3
    train(model, opt, range(3, 5))
    opt.zero_grad()
    assert has_params(model, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_whole_state_goes_on_bit_identically_on_any_ranks_and_under_plain_lion(gloo, tmp_path, policy):
    path = str(tmp_path / "o.pt")
    gloo.run(2, save_whole, path, policy)
    for ranks, engine in ((1, "plain"), (1, "sharded"), (2, "sharded"), (4, "sharded"), (4, "sharded hsdp")):
        gloo.run(ranks, go_on_from, path, policy, engine, never_stopped(policy))


def load_into_published_lion() -> None:
    model, opt = trained("fp32 parameters")
    whole = consolidated(opt)
    if whole is None:
        return
    params = [p for g in opt.param_groups for p in g["params"]]
    twins = [p.detach().clone().requires_grad_(p.requires_grad) for p in params]
    published = PublishedLion(
        [
            {"params": twins[: len(opt.param_groups[0]["params"])]},
            {"params": twins[len(opt.param_groups[0]["params"]) :]},
        ]
    )
    published.load_state_dict(whole)
    for i, twin in enumerate(twins):
        if i in whole["state"]:
            assert torch.equal(published.state[twin]["exp_avg"], whole["state"][i]["exp_avg"])


def test_lion_pytorch_takes_the_whole_state(gloo):
    gloo.run(2, load_into_published_lion)


def load_plain_lions(policy: str) -> None:
    """From a plain Lion's own state, and from one that has not trained anything yet."""
    expected, plain = trained(policy, "plain")
    model, opt = build(policy)
    model.load_state_dict(expected.state_dict())
    opt.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(model, opt, range(3, 5))
    train(expected, plain, range(3, 5))
    opt.finish_param_sync()
    assert same_params(model, expected)
    fresh_model, fresh = build(policy, "plain")
    model.load_state_dict(fresh_model.state_dict())
    opt.load_state_dict(fresh.state_dict())
    assert opt.taken_steps() == 0 and not any(shard.exp_avg.any() for shard in opt.shards)
    train(model, opt, range(2))
    train(fresh_model, fresh, range(2))
    opt.finish_param_sync()
    assert same_params(model, fresh_model)


@pytest.mark.parametrize("policy", ["fp32 parameters", "split", "fp32 main params", "no main params"])
def test_plain_lions_state_loads_and_an_empty_one_starts_afresh(gloo, policy):
    gloo.run(2, load_plain_lions, policy)


# ---- what state_dict() gives, and when


def whole_until_the_next_step() -> list:
    model, opt = trained()
    seen = []

    def look() -> None:
        values = [kinds["exp_avg"] for kinds in opt.state_dict()["state"].values()]
        seen.append(all(type(value) is torch.Tensor for value in values))

    look()
    opt.consolidate_state_dict()
    look()
    train(model, opt, range(3, 4))
    look()
    with pytest.raises(RuntimeError, match="has not been consolidated on this rank since it last changed"):
        opt.full_state_dict()
    return seen


def test_state_dict_is_whole_on_that_rank_from_consolidation_until_the_next_step(gloo):
    assert gloo.run(2, whole_until_the_next_step) == [[False, True, False], [False, False, False]]


def drop_when_loaded() -> None:
    _, opt = trained()
    before = opt.state_dict()
    for change in (
        lambda: opt.load_state_dict(before),
        lambda: opt.shards[0].exp_avg.zero_(),  # as a checkpoint that is loaded does, in place
        lambda: opt.add_param_group({"params": [(f"new.{n}", p) for n, p in mlp(3, 3).named_parameters()]}),
    ):
        opt.consolidate_state_dict()
        change()
        with pytest.raises(RuntimeError, match="has not been consolidated"):
            opt.full_state_dict()


def test_a_consolidated_state_is_not_given_out_after_the_state_has_changed(gloo):
    gloo.run(2, drop_when_loaded)


def ask_another_rank() -> str:
    _, opt = trained()
    opt.consolidate_state_dict(to=1)
    if dist.get_rank() == 1:
        return str(len(opt.full_state_dict()["state"]))
    with pytest.raises(RuntimeError) as raised:
        opt.full_state_dict()
    return str(raised.value)


def test_full_state_dict_on_another_rank_says_which_has_it(gloo):
    assert "it has, on rank 1" in gloo.run(2, ask_another_rank)[0]


def changed_containers() -> None:
    _, opt = trained()
    opt.consolidate_state_dict()
    if dist.get_rank() == 0:
        taken = opt.state_dict()
        taken["param_groups"][0].pop("params")
        taken["state"].clear()
        assert opt.full_state_dict()["param_groups"][0]["params"] and opt.state_dict()["state"]


def test_what_was_given_out_can_be_changed(gloo):
    gloo.run(2, changed_containers)


def largest_temporary() -> list[int]:
    """Elements of the largest message of consolidation, and of the largest bucket."""
    model = mlp(64, 64, 64, 64, 64)
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(bucket_numel=5000))
    sizes = []
    gather = collectives.all_gather

    def all_gather(flat, shard, group):
        sizes.append(flat.numel())
        return gather(flat, shard, group)

    collectives.all_gather = all_gather
    try:
        opt.consolidate_state_dict()
    finally:
        collectives.all_gather = gather
    return [max(sizes), max(bucket.layout.numel for bucket in opt.buckets), len(opt.buckets)]


def test_consolidation_holds_one_bucket_at_a_time(gloo):
    largest, bucket, count = gloo.run(2, largest_temporary)[0]
    assert largest == bucket and count > 2


def channels_last(engine: str) -> tuple[torch.nn.Module, Lion | ShardedLion]:
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    sharded = {"module": model, "sharding": ShardingConfig(bucket_numel=20)}
    opt = Lion(model.parameters(), lr=0.1) if engine == "plain" else ShardedLion(model.parameters(), lr=0.1, **sharded)
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    for _ in range(2):
        opt.zero_grad()
        model(images).square().mean().backward()
        opt.step()
    return model, opt


def consolidate_channels_last() -> None:
    model, opt = channels_last("sharded")
    _, plain = channels_last("plain")
    momenta = [shard.exp_avg.clone() for shard in opt.shards]
    opt.consolidate_state_dict()
    if dist.get_rank() == 0:
        assert_same_tensors(opt.full_state_dict(), plain.state_dict())
    for shard in opt.shards:
        shard.exp_avg.zero_()
    opt.load_state_dict(plain.state_dict())
    assert all(torch.equal(shard.exp_avg, m) for shard, m in zip(opt.shards, momenta, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_whole_state_of_a_channels_last_model(gloo, ranks):
    gloo.run(ranks, consolidate_channels_last)


# ---- experts, whose ranks are fewer


def consolidate_experts() -> None:
    """Ranks 0 and 1 share one expert, ranks 2 and 3 another of the same name; the rest is everybody's."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    shared, expert = mlp(6, 6), mlp(5, 7, seed=1 + rank // 2)
    groups = [
        {"params": [(f"shared.{n}", p) for n, p in shared.named_parameters()]},
        {"params": [(f"expert.{n}", p) for n, p in expert.named_parameters()], "process_group": pairs[rank // 2]},
    ]
    opt = ShardedLion(groups, lr=0.1)
    (shared(torch.ones(2, 6)).sum() + (1 + rank // 2) * expert(torch.ones(2, 5)).sum()).backward()
    opt.step()
    for to in (1, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            whole = consolidated(opt, to)
        if whole is None:
            continue
        assert any("process_group of their own" in str(w.message) for w in caught)
        mine = 1.0 + rank // 2  # the average is over all four ranks
        for i, (name, scale) in enumerate((("0.weight", 2.0), ("0.bias", 2.0), ("0.weight", mine), ("0.bias", mine))):
            value = whole["state"][i]["exp_avg"]
            assert torch.equal(value, torch.full_like(value, scale) * (1 - 0.99)), (i, name)
        assert "process_group" not in whole["param_groups"][1]
        other = Lion([*shared.parameters(), *expert.parameters()])
        with pytest.raises(ValueError):
            other.load_state_dict(whole)  # one group where there are two
    whole = [None]
    opt.consolidate_state_dict(to=0)
    before = [shard.exp_avg.clone() for shard in opt.shards]
    if rank == 0:
        whole = [opt.full_state_dict()]
    dist.broadcast_object_list(whole, group_src=0, group=pairs[0]) if rank < 2 else None
    if rank < 2:
        for shard in opt.shards:
            shard.exp_avg.zero_()
        opt.load_state_dict(whole[0])
        assert all(torch.equal(shard.exp_avg, b) for shard, b in zip(opt.shards, before, strict=True))


def test_experts_are_those_of_the_ranks_group_and_a_warning_says_so(gloo):
    gloo.run(4, consolidate_experts)


# ---- bad calls


def call_on_one_rank(says_so_after: float, gives_up_after: float) -> str | None:
    _, opt = trained()
    full_state.SAYS_SO_AFTER, full_state.GIVES_UP_AFTER = says_so_after, gives_up_after
    message = None
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError) as raised:
            opt.consolidate_state_dict()
        message = str(raised.value)
    dist.barrier()
    opt.consolidate_state_dict()  # together: the call that failed does not count
    assert dist.get_rank() != 0 or len(opt.full_state_dict()["state"]) > 10
    return message


def test_a_call_on_one_rank_says_who_is_missing(gloo):
    message = gloo.run(2, call_on_one_rank, 0.2, 1.0)[0]
    assert "rank 0 has called consolidate_state_dict()" in message and "ranks [1] of [0, 1] have not" in message
    assert "if rank == 0" in message


def bad_ranks() -> None:
    _, opt = trained()
    for to in (-1, 2, True, "0", None, 0.0):
        with pytest.raises(ValueError, match=r"global rank in \[0, 2\)"):
            opt.consolidate_state_dict(to=to)


def test_a_rank_that_does_not_exist_is_refused(gloo):
    gloo.run(2, bad_ranks)


def rank_of_another_group() -> None:
    group = dist.new_group([1, 2])
    if dist.get_rank() in (1, 2):
        opt = ShardedLion(mlp(4, 4).parameters(), process_group=group)
        with pytest.raises(ValueError, match=r"on the ranks \[1, 2\]"):
            opt.consolidate_state_dict()
        opt.consolidate_state_dict(to=1)
        assert dist.get_rank() == 2 or len(opt.full_state_dict()["state"]) == 2
    dist.barrier()


def test_a_rank_that_is_not_of_this_optimizer_is_refused(gloo):
    gloo.run(3, rank_of_another_group)


def test_without_ranks_the_whole_state_is_there_too():
    _, opt = trained("split")
    opt.consolidate_state_dict()
    _, plain = trained("split", "plain")
    assert_same_tensors(opt.full_state_dict(), plain.state_dict())
    assert_same_tensors(opt.state_dict(), plain.state_dict())
