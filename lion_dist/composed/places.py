"""Where the tensor that a rank holds of a parameter lies in the whole parameter, and which rank counts it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from lion_dist.local_shard import LocalShard, Place, local_tensor
from lion_dist.sharding import collectives


@dataclass(frozen=True)
class ModelPlace(Place):
    """The box of a whole parameter that every data-parallel rank here holds.

    Attributes:
        is_cut: other ranks hold other boxes of it.
        is_tied: another pipeline stage holds it too.
        is_counted: of the ranks that hold this box, this one adds it to norms and counts.
    """

    is_cut: bool = False
    is_tied: bool = False
    is_counted: bool = True

    def put_together(self, part: Tensor, group: ProcessGroup) -> Tensor:
        """The whole parameter's tensor, of which each rank of ``group`` holds such a ``part``; all of them together."""
        whole = torch.zeros(self.shape, dtype=part.dtype, device=part.device)
        whole[tuple(slice(first, first + size) for first, size in zip(self.offsets, part.shape, strict=True))] = part
        collectives.all_reduce_max(whole.view(-1).view(torch.uint8), group)  # any dtype, as it is
        return whole

    @classmethod
    def of_whole(cls, param: Parameter) -> ModelPlace:
        return cls(param.shape, (0,) * param.ndim)

    @classmethod
    def of_dtensor(cls, param: Parameter) -> ModelPlace:
        shard = LocalShard.of(param)
        (box,) = shard.boxes
        return cls(param.shape, box.offsets, is_cut=bool(shard.axes))

    @classmethod
    def of_part(cls, param: Parameter, dim: int, rank: int, num_ranks: int) -> ModelPlace:
        """``param`` is the ``rank``-th of ``num_ranks`` equal parts along ``dim``."""
        shape, offsets = list(param.shape), [0] * param.ndim
        offsets[dim] = rank * shape[dim]
        shape[dim] *= num_ranks
        return cls(torch.Size(shape), tuple(offsets), is_cut=True)


def checksum(param: Parameter) -> tuple[int, int]:
    """Of every bit of the tensor here; waits for the device."""
    local = local_tensor(param).detach().contiguous().view(-1)
    words = local.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.itemsize]).long()
    weights = torch.arange(words.numel(), device=words.device) % 8191 + 1
    return int(words.sum()), int((words * weights).sum())
