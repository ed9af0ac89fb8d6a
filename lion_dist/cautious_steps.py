"""Cautious Lion over shards: the statistic is over whole parameters, whatever rank holds which part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_dist.kernels.reference import cautious_lrs
from lion_dist.kernels.update import count_aligned_elements
from lion_dist.shard_state import ShardBatch
from lion_dist.sharding import collectives
from lion_dist.update_terms import UpdateTerms


def cautious_lrs_of_slices(batches: Sequence[ShardBatch], terms: UpdateTerms) -> dict[ShardBatch, Tensor]:
    """[slices, 2] fp32 for each of ``batches``: one launch a batch and one small all-reduce a group of ranks."""
    by_groups: dict[tuple, list[ShardBatch]] = {}
    for batch in batches:
        by_groups.setdefault((batch.groups, batch.shards[0].cut_group), []).append(batch)
    lrs = {}
    for (groups, cut_group), members in by_groups.items():
        message = torch.cat([_count_aligned(b, terms) for b in members])
        for group in (groups.shard_group, cut_group):
            collectives.all_reduce(message, group)
        for batch, counts in zip(members, message.split([len(b.param_numels) for b in members]), strict=True):
            of_params = cautious_lrs(terms.of(batch).lr, counts, batch.param_numels, terms.rule.cautious_factor)
            lrs[batch] = of_params.index_select(0, batch.slice_params)
    return lrs


def _count_aligned(batch: ShardBatch, terms: UpdateTerms) -> Tensor:
    """[params] int64: of each of the batch's parameters, the elements here whose update has the gradient's sign."""
    counts = torch.zeros_like(batch.param_numels)
    if batch.tensors is None:
        return counts
    # Unchecked: gradients are cut as the tensors are.
    arguments = {"grad_scale": terms.grad_scale, "backend": terms.backend, "check": False}
    aligned = count_aligned_elements(batch.tensors, batch.grads(), terms.of(batch), **arguments)
    return counts.index_add_(0, batch.slice_params, aligned)
