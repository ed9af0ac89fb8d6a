"""The gradients that an optimizer has reduced, and what they must be: the sum of all ranks' own, computed apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lion_dist import ShardedLion, ShardingConfig
from tests.models import GivenGradients

SHAPES = ((33, 70), (5,), (), (0, 4), (2000,), (64, 64))
MICRO_BATCHES = 2


def reduced_gradients(optimizer: ShardedLion) -> dict[Parameter, Tensor]:
    """Every parameter's gradient, summed over ranks, gathered from the shards."""
    grads = {}
    for bucket in optimizer.buckets:
        shard, group = bucket.finish_grad_sync(), bucket.groups.shard_group
        full = shard.new_empty(bucket.layout.numel)
        dist.all_gather_into_tensor(full, shard, group=group)
        for param, offset in zip(bucket.params, bucket.layout.offsets, strict=True):
            grads[param] = full[offset : offset + param.numel()].view(param.shape).clone()
    return grads


def gradients_of(rank: int, micro_batch: int, dtype: torch.dtype) -> list[Tensor]:
    """What ``rank`` brings, which every other can compute: of no element less than 1, nor as much as 2."""
    generator = torch.Generator().manual_seed(100 * micro_batch + rank)
    signs = [torch.randint(2, shape, generator=generator) * 2.0 - 1 for shape in SHAPES]
    return [(sign * (1 + torch.rand(sign.shape, generator=generator) * 0.99)).to(dtype) for sign in signs]


@dataclass(frozen=True)
class Sums:
    """How gradients of ``dtype`` are summed. ``ordered``: in fp32, in rank order; else in any order, and every addition
    rounds to the wire's dtype."""

    dtype: torch.dtype
    ordered: bool
    wire: torch.dtype | None = None
    replicas: int = 1


def check_sums(device: torch.device, sums: Sums) -> None:
    """Reduce two micro-batches by collectives, and compare with the sum of every rank's gradients."""
    ranks, mesh = dist.get_world_size(), None
    model = GivenGradients(*SHAPES, dtype=sums.dtype).to(device)
    if sums.replicas > 1:
        shape = (sums.replicas, ranks // sums.replicas)
        mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    settings = ShardingConfig(
        bucket_numel=2500, reduce_dtype=sums.wire, ordered_sum=sums.ordered, peer_memory=False, average=False
    )
    opt = ShardedLion(model.parameters(), process_group=mesh, sharding=settings)
    wire = sums.wire or sums.dtype
    addends = []  # [micro_batch][rank][param]
    for micro_batch in range(MICRO_BATCHES):
        of_ranks = [[g.to(device) for g in gradients_of(rank, micro_batch, sums.dtype)] for rank in range(ranks)]
        model.loss(of_ranks[dist.get_rank()]).backward()
        addends.append([[grad.to(wire) for grad in grads] for grads in of_ranks])
    opt.grad_norm()  # completes the reductions
    found = reduced_gradients(opt)
    for i, param in enumerate(model.weights):
        of_batches = [[grads[i] for grads in of_ranks] for of_ranks in addends]
        if sums.ordered:
            expected = sum(sum_in_order(grads, ranks // sums.replicas) for grads in of_batches)
            assert torch.equal(found[param], expected), i
        else:
            assert_within_rounding(found[param], of_batches, torch.finfo(wire).eps)


def sum_in_order(addends: Sequence[Tensor], shard_ranks: int) -> Tensor:
    """In fp32: those of each replica's ranks, then the replicas' sums."""
    of_replicas = [in_rank_order(addends[i : i + shard_ranks]) for i in range(0, len(addends), shard_ranks)]
    return in_rank_order(of_replicas)


def in_rank_order(addends: Sequence[Tensor]) -> Tensor:
    total = addends[0].float()
    for addend in addends[1:]:
        total = total + addend.float()
    return total


def assert_within_rounding(found: Tensor, of_batches: Sequence[Sequence[Tensor]], eps: float) -> None:
    """N addends are N - 1 additions in any order; each rounds, by a relative ``u = eps / 2``, a partial sum of no more
    than ``sum(|g|)``. So the error is at most ``(N - 1) u / (1 - (N - 1) u) * sum(|g|)``: less than 1, which is what
    a lost gradient would miss in every element, on up to 8 ranks in bf16."""
    flat = [addend.double() for addends in of_batches for addend in addends]
    roundings = (len(of_batches[0]) - 1) * eps / 2
    relative = roundings / (1 - roundings) + torch.finfo(torch.float32).eps  # micro-batches are added up in fp32
    bound = relative * sum(addend.abs() for addend in flat)
    assert (bound < 1).all(), "the gradients of a rank could be lost within the bound"
    assert ((found.double() - sum(flat)).abs() <= bound).all()
