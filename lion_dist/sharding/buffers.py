"""One 1-D tensor and its views; and a few of them, reused by one bucket after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lion_dist.sharding.collectives import COMPLETED, Work
from lion_dist.sharding.layout import BucketLayout
from lion_dist.sharding.memory_format import MemoryFormat
from lion_dist.sharding.transport import FlatBuffer


def views_of(flat: Tensor, layout: BucketLayout, formats: Sequence[MemoryFormat]) -> list[Tensor]:
    """The parameters' places in ``flat`` [layout.numel], each in its parameter's shape and strides."""
    return [
        memory_format.place_in(flat[offset : offset + numel])
        for offset, numel, memory_format in zip(layout.offsets, layout.param_numels, formats, strict=True)
    ]


def gaps_of(flat: Tensor, layout: BucketLayout) -> list[Tensor]:
    """The padding of ``flat``, as views that are not empty."""
    ends = [offset + numel for offset, numel in zip(layout.offsets, layout.param_numels, strict=True)]
    starts = [*layout.offsets[1:], layout.numel]
    return [flat[end:start] for end, start in zip(ends, starts, strict=True) if end < start]


class GradBuffer:
    """Send buffer of one bucket (NCCL, gloo), or receive buffer for peers' gradients (peer memory).

    Attributes:
        shared: all that there is of it; peers write into it.
        flat: it, as a tensor.
        views: what each bucket has cut it into.
    """

    def __init__(self, shared: FlatBuffer):
        self.shared, self.flat = shared, shared.flat
        self.views: dict[object, Any] = {}
        self.release: Work = COMPLETED  # completes the last bucket's use of it


class GradBufferPool:
    """The few buffers that all buckets of one dtype share, taken in turn.

    Stage 2 keeps no full gradient: a bucket's gradients are sent, reduced and forgotten, and the buffer serves the next
    bucket. Taking a buffer first completes its last use, so that is how far communication may fall behind.

    Args:
        allocate: the memory of a buffer for a bucket of so many elements.
        depth: how many buffers; None: one for each bucket, so that taking one never waits in a backward pass.
    """

    DEPTH = 3

    def __init__(self, allocate: Callable[[int], FlatBuffer], depth: int | None = DEPTH):
        self._allocate, self._depth = allocate, depth or 0
        self._grows = depth is None
        self._buffers: list[GradBuffer] = []
        self._numel = 0
        self._turn = 0

    def fit(self, numel: int) -> None:
        """Make room for one bucket more, of ``numel`` elements."""
        self._depth += self._grows
        if numel > self._numel:
            for buffer in self._buffers:
                buffer.release()  # a reduction may read it yet: its memory must not be given to others
            self._numel, self._buffers = numel, []

    def take(self) -> GradBuffer:
        """A buffer, which nothing else reads or writes until its ``release`` ran."""
        if len(self._buffers) < self._depth:
            buffer = self._add()
        else:
            buffer = self._buffers[self._turn % self._depth]
        self._turn += 1
        buffer.release()
        buffer.release = COMPLETED
        return buffer

    def fill(self) -> None:
        """Allocate all buffers now."""
        while len(self._buffers) < self._depth:
            self._add()

    def _add(self) -> GradBuffer:
        self._buffers.append(GradBuffer(self._allocate(self._numel)))
        return self._buffers[-1]

    @property
    def nbytes(self) -> int:
        return sum(buffer.flat.nbytes for buffer in self._buffers)
