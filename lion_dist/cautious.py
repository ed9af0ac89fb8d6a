"""The learning rates of ``Lion``'s cautious steps, which need counts over whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_dist.kernels.reference import StepScalars, cautious_lrs
from lion_dist.kernels.update import count_aligned_elements
from lion_dist.local_shard import LocalShard
from lion_dist.sharding import collectives
from lion_dist.update_batch import UpdateBatch


def cautious_lrs_of_whole_tensors(
    batch: UpdateBatch,
    grads: Sequence[Tensor],
    scalars: StepScalars,
    factor: float,  # cautious_factor
    grad_scale: Tensor | None,
    backend: str,
) -> Tensor:
    """[T, 2] fp32, from counts over whole tensors: one small all-reduce for each mesh axis that shards them."""
    arguments = {"grad_scale": grad_scale, "backend": backend, "check": False}
    counts = count_aligned_elements(batch.tensors, grads, scalars, **arguments)
    sum_over_shards_(counts, batch.params)
    return cautious_lrs(scalars.lr, counts, batch.full_numels, factor)


def sum_over_shards_(counts: Tensor, params: Sequence[Tensor]) -> None:
    """Sum [T] ``counts`` of local shards, in place, over the ranks that hold the other shards of each DTensor."""
    positions: dict[tuple, list[int]] = {}  # (mesh, axis): of the tensors that it cuts
    for i, param in enumerate(params):
        for mesh_axis in LocalShard.of(param).axes:
            positions.setdefault(mesh_axis, []).append(i)
    for (mesh, axis), cut in positions.items():
        if len(cut) == len(params):
            collectives.all_reduce(counts, mesh.get_group(axis))
        else:
            index = torch.tensor(cut).to(counts.device, non_blocking=True)
            part = counts[index]
            collectives.all_reduce(part, mesh.get_group(axis))
            counts[index] = part
