"""Cautious Lion over shards: the statistic is over whole parameters, whatever rank holds which part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lion_dist.kernels.reference import StepScalars, cautious_lrs
from lion_dist.kernels.update import count_aligned_elements
from lion_dist.shard_state import ShardBatch
from lion_dist.sharding import collectives
from lion_dist.sharding.process_groups import ShardGroups


def cautious_lrs_of_slices(
    batches: Sequence[ShardBatch],
    scalars: Mapping[int, StepScalars],  # by id of the param group
    factor: float,  # cautious_factor
    grad_scale: Tensor,  # [] fp32
    backend: str,
) -> dict[ShardBatch, Tensor]:
    """[slices, 2] fp32 for each of ``batches``: one launch a batch and one small all-reduce a group of ranks."""
    by_groups: dict[ShardGroups, list[ShardBatch]] = {}
    for batch in batches:
        by_groups.setdefault(batch.groups, []).append(batch)
    lrs = {}
    for groups, members in by_groups.items():
        message = torch.cat([_count_aligned(b, scalars[id(b.group)], grad_scale, backend) for b in members])
        collectives.all_reduce(message, groups.shard_group)
        for batch, counts in zip(members, message.split([len(b.param_numels) for b in members]), strict=True):
            of_params = cautious_lrs(scalars[id(batch.group)].lr, counts, batch.param_numels, factor)
            lrs[batch] = of_params.index_select(0, batch.slice_params)
    return lrs


def _count_aligned(batch: ShardBatch, scalars: StepScalars, grad_scale: Tensor, backend: str) -> Tensor:
    """[params] int64: of each of the batch's parameters, the elements here whose update has the gradient's sign."""
    counts = torch.zeros_like(batch.param_numels)
    if batch.tensors is None:
        return counts
    arguments = {"grad_scale": grad_scale, "backend": backend, "check": False}  # gradients are cut as the tensors are
    aligned = count_aligned_elements(batch.tensors, batch.grads(), scalars, **arguments)
    return counts.index_add_(0, batch.slice_params, aligned)
