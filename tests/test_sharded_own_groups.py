"""Collectives of several owners in one backward pass, in orders that differ between ranks."""

from __future__ import annotations

import gc
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lion_dist import ShardedLion, ShardingConfig
from tests.models import GivenGradients

NUMEL = 256  # halves without padding


def make(weights: int, group=None, **sharding) -> tuple[GivenGradients, ShardedLion]:
    """A bucket a weight; exp_avg is the gradient."""
    model = GivenGradients(*[(NUMEL,)] * weights)
    config = ShardingConfig(bucket_numel=NUMEL, average=False, wait_in_backward=False, **sharding)
    return model, ShardedLion(model.parameters(), 2**-7, (0.0, 0.0), sharding=config, process_group=group)


def reduced(opt: ShardedLion) -> list[float]:
    """The gradient of each weight, which has one value everywhere."""
    values = []
    for shard in opt.shards:
        (value,) = shard.exp_avg.unique().tolist()
        values.append(value)
    return values


# ---- two optimizers


def train_two_at_once(weights: int, stage: int, in_backward: bool) -> list[list[float]]:
    """The last rank does not use the parameter whose bucket goes first, so all of that model's go last there."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    made = [make(weights, zero_stage=stage, update_in_backward=in_backward) for _ in range(2)]
    for _ in range(2):
        losses = []
        for i, (model, _) in enumerate(made):
            values = [float(100 * i + 10 * k + 1 + rank) for k in range(weights)]
            grads = [torch.full((NUMEL,), value) for value in values]
            if i == 1 and rank == last:
                grads[-1] = None
            losses.append(model.loss(grads))
        sum(losses).backward()
        for _, opt in made:
            opt.step()
    return [reduced(opt) for _, opt in made]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("weights", [2, 7])
def test_two_optimizers_in_one_backward_with_a_branch_that_some_ranks_use(gloo, weights, stage):
    for first, second in gloo.run(2, train_two_at_once, weights, stage, False):
        sums = [2 * 10 * k + 1 + 2 for k in range(weights)]
        assert first == sums
        assert second == [s + 200 for s in sums[:-1]] + [100 + 10 * (weights - 1) + 1]


def test_two_optimizers_that_update_in_backward(gloo):
    for first, second in gloo.run(2, train_two_at_once, 2, 1, True):
        assert first == [3, 23]
        assert second == [203, 111]


# ---- a collective of the model's own


class SumOverRanks(torch.autograd.Function):
    """A contrastive loss, say: its backward sums over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def train_with_a_collective_of_the_models(weights: int) -> list[float]:
    """The last rank does not use the parameter whose bucket goes first: it comes to the model's collective without
    having started a reduction, the others when they have started all but one."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, opt = make(weights)
    for _ in range(2):
        grads = [torch.full((NUMEL,), float(10 * k + 1 + rank)) for k in range(weights)]
        early, late = [*grads[:1], *[None] * (weights - 1)], [None, *grads[1:]]
        if rank == last:
            late[-1] = None
        (SumOverRanks.apply(model.loss(early)) + model.loss(late)).backward()
        opt.step()
    return reduced(opt)


@pytest.mark.parametrize("weights", [3, 7])
def test_a_collective_of_the_model_in_backward_with_a_branch_that_some_ranks_use(gloo, weights):
    for found in gloo.run(2, train_with_a_collective_of_the_models, weights):
        sums = [2 * 10 * k + 1 + 2 for k in range(weights)]
        assert found == [2 * sums[0], *sums[1:-1], 10 * (weights - 1) + 1]


# ---- groups are borrowed and given back


def names(opt: ShardedLion) -> list[str]:
    return [axis.group_name for axis in opt.groups.axes]


def borrow_and_give_back() -> None:
    _, first = make(2)
    _, second = make(2)
    assert names(first) != names(second) and dist.group.WORLD.group_name not in names(first) + names(second)
    first.close()
    _, third = make(2)
    assert names(third) == names(first)  # closed on all ranks
    if dist.get_rank() == 0:
        second.close()
    _, fourth = make(2)
    assert names(fourth) not in (names(second), names(third))  # closed on one rank only
    dropped = names(third)
    del first, third
    gc.collect()
    _, fifth = make(2)
    assert names(fifth) == dropped  # nobody has closed it


def test_a_group_is_taken_over_when_every_rank_has_given_it_back(gloo):
    gloo.run(2, borrow_and_give_back)


def give_back_after_different_collectives() -> None:
    group = dist.new_group(timeout=timedelta(seconds=2))
    model, opt = make(1, group)
    if dist.get_rank() == 0:
        model.loss([torch.ones(NUMEL)]).backward()  # its reduction waits for rank 1 until the time is out
    name = names(opt)
    opt.close()
    model, another = make(1, group)
    assert names(another) != name
    model.loss([torch.ones(NUMEL)]).backward()
    another.step()
    for value in reduced(another):
        assert value == 2


def test_a_group_with_half_a_collective_is_not_taken_over(gloo):
    gloo.run(2, give_back_after_different_collectives)


def use_sub_groups() -> None:
    """Ranks 0 and 1 have made a group that the others know nothing of, and two optimizers where those have one."""
    rank = dist.get_rank()
    halves = [dist.new_group([0, 1], timeout=timedelta(seconds=77)), dist.new_group([2, 3])]
    for _ in range(2 if rank < 2 else 1):
        model = GivenGradients((NUMEL,))
        opt = ShardedLion(model.parameters(), betas=(0.0, 0.0), process_group=halves[rank // 2])
    own = opt.groups.shard_group
    assert dist.get_process_group_ranks(own) == dist.get_process_group_ranks(halves[rank // 2])
    if rank < 2:
        assert own._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77)
    assert own.group_desc.startswith("ShardedLion's own")
    model.loss([torch.full((NUMEL,), float(rank))]).backward()
    opt.step()
    (shard,) = opt.shards
    assert [piece.unique().tolist() for piece in shard.slices_of(shard.exp_avg)] == [[0.5 if rank < 2 else 2.5]]
    dist.barrier()  # groups of the world can be made as before
    everybody = dist.new_group()
    dist.barrier(everybody)


def test_sub_groups_of_the_world_have_own_groups_too(gloo):
    gloo.run(4, use_sub_groups)
