"""State as named boxes of full tensors: what a checkpoint speaks of, whatever ranks and buckets there are.

A rank owns flat ranges of parameters. A flat range of a row-major tensor is cut into axis-aligned boxes, each
contiguous in the range: for shape (4, 5) the range [3, 17) is row 0 from column 3, rows 1 and 2 whole, row 3 up to
column 2::

    . . . A A        A: offsets (0, 3) sizes (1, 2)
    B B B B B        B: offsets (1, 0) sizes (2, 5)
    B B B B B
    C C . . .        C: offsets (3, 0) sizes (1, 2)

A tensor that is not row-major in memory (``memory_format.py``) is cut along its dimensions in the order of memory. The
boxes are told in its own dimensions, so what a checkpoint holds does not depend on how the tensor lay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# torch.distributed.checkpoint takes 0.6 s to import, so it is imported by those who call it.

PIECE_BYTES = 8 << 20  # what a save or load holds beside the state; torch.save is slower above (caches) and below


@dataclass(frozen=True)
class Box:
    """``[offset, offset + size)`` in each dimension of a full tensor; no dimensions for a scalar."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def pieces(self, limit: int) -> Iterator[Box]:
        """Cut into boxes of at most ``limit`` elements, row-major."""
        if self.numel <= limit:
            yield self
            return
        dim = next(d for d, size in enumerate(self.sizes) if size > 1)
        step = max(1, limit // (self.numel // self.sizes[dim]))
        for start in range(0, self.sizes[dim], step):
            offsets, sizes = list(self.offsets), list(self.sizes)
            offsets[dim] += start
            sizes[dim] = min(step, sizes[dim] - start)
            yield from Box(tuple(offsets), tuple(sizes)).pieces(limit)

    def view_of(self, inner: Box, local: Tensor) -> Tensor:
        """The part ``inner`` of ``local``, which holds this box."""
        starts = [i - o for i, o in zip(inner.offsets, self.offsets, strict=True)]
        return local[tuple(slice(s, s + n) for s, n in zip(starts, inner.sizes, strict=True))]


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


def boxes_over(
    shape: Sequence[int], start: int, local: Tensor, dims: Sequence[int] | None = None
) -> dict[Box, Tensor]:
    """Views of ``local`` [n], which holds the flat range ``[start, start + n)`` of a tensor of ``shape``.

    ``dims``: the tensor's dimensions in the order of memory, which the range counts in; None: row-major.
    """
    dims = range(len(shape)) if dims is None else dims
    places = sorted(range(len(dims)), key=dims.__getitem__)  # of each dimension, among those in memory
    views, position = {}, 0
    for box in boxes_of_range([shape[dim] for dim in dims], start, start + local.numel()):
        view = local[position : position + box.numel].view(box.sizes)
        own = Box(tuple(box.offsets[place] for place in places), tuple(box.sizes[place] for place in places))
        views[own] = view.permute(places)
        position += box.numel
    return views


class BoxedTensor(torch.Tensor):
    """Some boxes of a full tensor, as views of local memory; torch.distributed.checkpoint saves and loads it in place.

    Args:
        shape: of the full tensor.
        boxes: disjoint, each with its view; none on a rank that holds no part.
        dtype, device: of the views.

    Attributes:
        pieces: the boxes cut into pieces of at most PIECE_BYTES, with their views: what is written and read at a time.
    """

    @staticmethod
    def __new__(cls, shape, boxes: Mapping[Box, Tensor], *, dtype: torch.dtype, device: torch.device):
        self = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        self.boxes = {box: local for box, local in boxes.items() if box.numel}
        return self

    @cached_property
    def pieces(self) -> dict[Box, Tensor]:
        limit = PIECE_BYTES // self.dtype.itemsize
        return {
            piece: box.view_of(piece, local) for box, local in self.boxes.items() for piece in box.pieces(limit)
        }

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"BoxedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, boxes={list(self.boxes)})"

    def __reduce_ex__(self, _protocol):
        boxes = [(box.offsets, box.sizes, local.clone()) for box, local in self.boxes.items()]
        return _rebuild, (tuple(self.shape), boxes, self.dtype, self.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        boxed = args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            boxes = {box: func(local, *args[1:], **(kwargs or {})) for box, local in boxed.boxes.items()}
            like = next(iter(boxes.values()), boxed)
            return BoxedTensor(boxed.shape, boxes, dtype=like.dtype, device=like.device)
        raise NotImplementedError(f"{func} on a BoxedTensor: it is a place for checkpoints, not an operand")

    # What torch.distributed.checkpoint asks of a tensor that is spread over ranks.

    def __create_write_items__(self, fqn: str, _object: object) -> list:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        items = []
        properties = TensorProperties(dtype=self.dtype)
        for chunk in self.__create_chunk_list__():
            data = TensorWriteData(chunk, properties, self.shape)
            items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in self.pieces]

    @cached_property
    def _views_by_offsets(self) -> dict[tuple[int, ...], Tensor]:
        return {piece.offsets: view for piece, view in self.pieces.items()}

    def __get_tensor_shard__(self, index) -> Tensor:
        view = self._views_by_offsets.get(tuple(index.offset))
        if view is None:
            raise ValueError(f"no piece of {index.fqn!r} starts at {tuple(index.offset)}: there are {[*self.pieces]}")
        return view


def _rebuild(shape, boxes, dtype, device) -> BoxedTensor:
    boxes = {Box(offsets, sizes): local for offsets, sizes, local in boxes}
    return BoxedTensor(shape, boxes, dtype=dtype, device=device)


torch.serialization.add_safe_globals([_rebuild])  # torch.load's default, weights_only=True, takes a state_dict back
