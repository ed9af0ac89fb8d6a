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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


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

    def intersection(self, other: Box) -> Box | None:
        """What both hold; None when that is nothing."""
        ranges = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        bounds = [(max(a, b), min(a + n, b + m)) for a, n, b, m in ranges]
        if any(start >= stop for start, stop in bounds):
            return None
        return Box(tuple(start for start, _ in bounds), tuple(stop - start for start, stop in bounds))

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
    boxes, tail = [], []
    whole_from, whole_to = first, last + 1
    if start % row:
        boxes += _within_row(shape, first, start % row, row)
        whole_from += 1
    if stop % row:
        tail = _within_row(shape, last, 0, stop % row)
        whole_to -= 1
    if whole_from < whole_to:
        boxes.append(Box((whole_from,) + (0,) * (len(shape) - 1), (whole_to - whole_from, *shape[1:])))
    return boxes + tail


def _within_row(shape: Sequence[int], index: int, start: int, stop: int) -> list[Box]:
    return [Box((index, *b.offsets), (1, *b.sizes)) for b in boxes_of_range(shape[1:], start, stop)]


def boxes_over(shape: Sequence[int], start: int, local: Tensor, dims: Sequence[int] | None = None) -> dict[Box, Tensor]:
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
