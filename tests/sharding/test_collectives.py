"""Collectives on gloo: sums in rank order in fp32, gathers in place, the rest as torch.distributed's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lion_dist.sharding import collectives


def addend_of(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(numel, generator=generator) * 10 ** torch.randn(numel, generator=generator)).to(dtype)


def sum_in_rank_order(shard_numel: int, dtype: torch.dtype) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    numel = world_size * shard_numel
    expected = torch.zeros(numel)
    for r in range(world_size):
        expected = expected + addend_of(r, numel, dtype).float() if r else addend_of(r, numel, dtype).float()
    output = torch.full((shard_numel,), float("nan"))
    flat = addend_of(rank, numel, dtype)
    finish = collectives.reduce_scatter(output, flat, dist.group.WORLD, ordered=True)
    finish()
    assert torch.equal(output, expected[rank * shard_numel : (rank + 1) * shard_numel])
    assert torch.equal(flat, addend_of(rank, numel, dtype))  # the addends are left alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shard_numel", [1, 64, 5 * collectives.GLOO_CHUNK_NUMEL + 3])  # in one piece and in chunks
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ordered_sum_is_that_of_one_process(gloo, world_size, shard_numel, dtype):
    gloo.run(world_size, sum_in_rank_order, shard_numel, dtype)


def send_many_at_once() -> None:
    """Several reductions and gathers under way, finished in the order of their start or in another."""
    rank, group = dist.get_rank(), dist.group.WORLD
    flats = [torch.full((128,), float(10 * i + rank)) for i in range(4)]
    outputs = [torch.empty(64) for _ in flats]
    ends = [
        collectives.reduce_scatter(o, f, group, ordered=i % 2 == 0)
        for i, (o, f) in enumerate(zip(outputs, flats, strict=True))
    ]
    gathered = torch.zeros(128)
    shard = gathered[64 * rank : 64 * (rank + 1)]
    shard.fill_(5.0 + rank)
    end = collectives.all_gather(gathered, shard, group)
    for finish in reversed(ends):
        finish()
    end()
    for i, output in enumerate(outputs):
        assert torch.equal(output, torch.full((64,), 20.0 * i + 1))
    assert torch.equal(gathered, torch.cat([torch.full((64,), 5.0), torch.full((64,), 6.0)]))


def test_collectives_may_overlap(gloo):
    gloo.run(2, send_many_at_once)


def reduce_over_ranks() -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    numel = 1000
    expected = addend_of(0, numel, torch.float32)
    for r in range(1, 4):
        expected = expected + addend_of(r, numel, torch.float32)
    tensor = addend_of(rank, numel, torch.float32)
    collectives.ordered_all_reduce(tensor, group)
    assert torch.equal(tensor, expected)
    other = torch.tensor([float(rank)], dtype=torch.float64)
    collectives.all_reduce(other, group)
    assert other.item() == 6.0
    mine = torch.tensor([float(rank + 1)])
    collectives.broadcast(mine, group)
    assert mine.item() == 1.0
    assert collectives.gather_objects({"rank": rank}, group) == [{"rank": r} for r in range(4)]


def test_all_reduce_broadcast_and_objects(gloo):
    gloo.run(4, reduce_over_ranks)


def broadcast_in_a_subgroup() -> None:
    """The first rank of the group counts, not rank 0 of the world."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    tensor = torch.tensor([float(rank)])
    collectives.broadcast(tensor, groups[rank % 2])
    assert tensor.item() == [0, 1, 0, 1][rank]


def test_broadcast_in_a_group_other_than_the_world(gloo):
    gloo.run(4, broadcast_in_a_subgroup)


def test_alone_nothing_moves():
    flat, output = torch.arange(4.0), torch.empty(4)
    for ordered in (True, False):
        collectives.reduce_scatter(output.zero_(), flat, None, ordered=ordered)()
        assert torch.equal(output, flat)
    collectives.all_gather(flat, flat[:4], None)()
    collectives.all_reduce(flat, None)
    collectives.ordered_all_reduce(flat, None)
    collectives.broadcast(flat, None)
    assert torch.equal(flat, torch.arange(4.0))
    assert collectives.gather_objects(3, None) == [3]
