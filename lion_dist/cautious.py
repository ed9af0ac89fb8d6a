"""What ``Lion`` needs of whole tensors: the learning rates of cautious steps, and which engines hide what they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_dist.kernels.reference import StepScalars, cautious_lrs
from lion_dist.kernels.update import count_aligned_elements
from lion_dist.local_shard import LocalShard
from lion_dist.sharding import collectives
from lion_dist.update_batch import UpdateBatch


def refuse_hidden_boundaries(param: Tensor, name: str) -> None:
    """Raise ValueError where the engine does not tell which elements belong to one tensor."""
    if LocalShard.of(param).is_flat:
        raise ValueError(
            f"cautious=True needs a statistic over each whole tensor, but {name} is part of FSDP1's flat parameter, "
            "which hides where tensors begin. Use fully_shard (FSDP2), or cautious=False."
        )


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


def refuse_hidden_ranks(param: Tensor, name: str) -> None:
    """Raise ValueError where the engine does not tell among which ranks a tensor is cut."""
    if LocalShard.of(param).is_flat:
        raise ValueError(
            f"skip_spikes needs the norm over all ranks' gradients, but {name} is part of FSDP1's flat parameter, "
            "which does not say among which ranks it is cut. Use fully_shard (FSDP2), or skip_spikes=None."
        )
