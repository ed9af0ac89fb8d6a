"""State as named boxes of full tensors: what a checkpoint speaks of, whatever ranks and buckets there are.

A rank owns flat ranges of parameters. A flat range of a row-major tensor is cut into axis-aligned boxes, each
contiguous in the range: for shape (4, 5) the range [3, 17) is row 0 from column 3, rows 1 and 2 whole, row 3 up to
column 2::

    . . . A A        A: offsets (0, 3) sizes (1, 2)
    B B B B B        B: offsets (1, 0) sizes (2, 5)
    B B B B B
    C C . . .        C: offsets (3, 0) sizes (1, 2)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# torch.distributed.checkpoint takes 0.6 s to import, so it is imported by those who call it.


@dataclass(frozen=True)
class Box:
    """``[offset, offset + size)`` in each dimension of a full tensor; no dimensions for a scalar."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut the flat range ``[start, stop)`` of a row-major tensor into boxes, in order; at most 2 * ndim - 1."""
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"[{start}, {stop}) is not a range of the {math.prod(shape)} elements of {tuple(shape)}")
    if start == stop:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _within_row(shape, first, start - first * row, stop - first * row)
    boxes = []
    whole_from, whole_to = first, last + 1
    if start % row:
        boxes += _within_row(shape, first, start % row, row)
        whole_from += 1
    tail = []
    if stop % row:
        tail = _within_row(shape, last, 0, stop % row)
        whole_to -= 1
    if whole_from < whole_to:
        boxes.append(Box((whole_from,) + (0,) * (len(shape) - 1), (whole_to - whole_from, *shape[1:])))
    return boxes + tail


def _within_row(shape: Sequence[int], index: int, start: int, stop: int) -> list[Box]:
    return [Box((index, *b.offsets), (1, *b.sizes)) for b in boxes_of_range(shape[1:], start, stop)]


class BoxedTensor(torch.Tensor):
    """Some boxes of a full tensor, as views of local memory; torch.distributed.checkpoint saves and loads it in place.

    Args:
        shape: of the full tensor.
        ranges: (start, local) pairs: ``local`` [n] holds the flat range ``[start, start + n)``.
        dtype, device: for a rank that holds no part.
    """

    @staticmethod
    def __new__(cls, shape, ranges: Sequence[tuple[int, Tensor]], *, dtype: torch.dtype, device: torch.device):
        self = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        self.ranges = list(ranges)
        self.boxes: dict[Box, Tensor] = {}
        for start, local in ranges:
            position = 0
            for box in boxes_of_range(shape, start, start + local.numel()):
                self.boxes[box] = local[position : position + box.numel].view(box.sizes)
                position += box.numel
        return self

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"BoxedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, boxes={list(self.boxes)})"

    def __reduce_ex__(self, _protocol):
        return _rebuild, (tuple(self.shape), [(s, local.clone()) for s, local in self.ranges], self.dtype, self.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        boxed = args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            ranges = [(start, func(local, *args[1:], **(kwargs or {}))) for start, local in boxed.ranges]
            like = ranges[0][1] if ranges else boxed
            return BoxedTensor(boxed.shape, ranges, dtype=like.dtype, device=like.device)
        raise NotImplementedError(f"{func} on a BoxedTensor: it is a place for checkpoints, not an operand")

    # What torch.distributed.checkpoint asks of a tensor that is spread over ranks.

    def __create_write_items__(self, fqn: str, _object: object) -> list:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        items = []
        for box, local in self.boxes.items():
            chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            data = TensorWriteData(chunk, TensorProperties.create_from_tensor(local), self.shape)
            items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in self.boxes]

    def __get_tensor_shard__(self, index) -> Tensor:
        for box, local in self.boxes.items():
            if box.offsets == tuple(index.offset):
                return local
        raise ValueError(f"no box of {index.fqn!r} starts at {tuple(index.offset)}: there are {list(self.boxes)}")


def _rebuild(shape, ranges, dtype, device) -> BoxedTensor:
    return BoxedTensor(shape, ranges, dtype=dtype, device=device)
