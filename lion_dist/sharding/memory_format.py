"""How a parameter lies in memory, and how it keeps that in a flat buffer.

A dense parameter whose dimensions do not follow each other in memory (channels_last, a transposed weight) keeps its
strides: its place in the flat buffer holds its elements in memory order, which is row-major over its dimensions sorted
by stride. Whoever cuts such a place into slices therefore speaks of elements in memory order; ``dims`` leads from there
to the parameter's own dimensions. For all other parameters memory order is row-major order, and ``dims`` is None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import Parameter

from lion_dist.local_shard import local_tensor, replace_local


@dataclass(frozen=True)
class MemoryFormat:
    """Shape and strides of a tensor without gaps: ``numel`` elements one after another, in some order."""

    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> MemoryFormat:
        """That of a dense ``tensor``; row-major for one with gaps."""
        return cls(tensor.shape, tensor.stride()) if is_dense(tensor) else cls.row_major(tensor.shape)

    @classmethod
    def row_major(cls, shape: torch.Size) -> MemoryFormat:
        sizes = [max(1, size) for size in shape]
        return cls(shape, tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))))

    @cached_property
    def dims(self) -> tuple[int, ...] | None:
        """The dimensions in the order of memory, the fastest last; None where that is their own order."""
        long = [dim for dim, size in enumerate(self.shape) if size > 1]
        in_memory = sorted(long, key=lambda dim: -self.strides[dim])
        if in_memory == long or 0 in self.shape:
            return None
        return tuple(in_memory + [dim for dim, size in enumerate(self.shape) if size == 1])

    def place_in(self, flat: Tensor) -> Tensor:
        """``flat`` [numel] as a tensor of this format."""
        return flat.as_strided(self.shape, self.strides)

    def flatten(self, tensor: Tensor) -> Tensor:
        """[numel] in memory order: a view of ``tensor``, which is of this format."""
        return (tensor if self.dims is None else tensor.permute(self.dims)).view(-1)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of ``tensor`` fill their memory, each place once."""
    expected = 1
    for size, stride in _by_stride(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a strided ``tensor`` lie at one address."""
    if tensor.is_contiguous() or tensor.numel() < 2:
        return False
    dims = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    reach = 0  # the largest offset within the dimensions of smaller strides
    for stride, size in sorted(dims):
        if stride == 0:
            return True
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    # Strides that interleave, such as (2, 3) for the shape (3, 2), may or may not overlap: look at every offset.
    offsets = torch.zeros((), dtype=torch.int64)
    for stride, size in dims:
        offsets = (offsets.unsqueeze(-1) + torch.arange(size) * stride).flatten()
    return offsets.unique().numel() < offsets.numel()


def _by_stride(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions along which ``tensor`` extends, the fastest first; none of an empty one."""
    if not tensor.numel():
        return []
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return sorted((pair for pair in pairs if pair[0] > 1), key=lambda pair: pair[1])


def with_own_storage(view: Tensor) -> Tensor:
    """The memory of dense ``view`` as a tensor whose storage holds nothing else, and which keeps that memory alive.

    Whoever compares storages (safetensors, Accelerate, transformers) takes views of one storage for tied weights, and
    ``torch.save`` writes the whole storage of each. The storage cannot be resized: it does not own its memory.
    """
    start = view.storage_offset() * view.itemsize
    storage = view.untyped_storage()[start : start + view.nbytes]
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(storage, 0, view.shape, view.stride())


@torch.no_grad()
def move_in(param: Parameter, place: Tensor) -> None:
    """Put the values of ``param`` (of a DTensor, those here) into ``place``, a view of a flat buffer: its memory from
    then on.

    The storage made here is the parameter's alone: share_memory_() moves a storage elsewhere, and whatever else had it
    would move along.
    """
    local = local_tensor(param)
    place.copy_(local.clone() if local.data_ptr() == place.data_ptr() else local)  # the same memory, transposed
    replace_local(param, with_own_storage(place))
