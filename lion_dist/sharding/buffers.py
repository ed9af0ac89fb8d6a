"""One 1-D tensor and its views; a few of them, reused; and the stream that communication is queued on."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lion_dist.sharding.collectives import Finish, nothing
from lion_dist.sharding.layout import BucketLayout
from lion_dist.sharding.memory_format import MemoryFormat
from lion_dist.sharding.peer_memory import PeerMemory, zeros


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


class Mark:
    """A place in the queue of communication. Made once, and moved along: who waited for it before is not affected."""

    def __init__(self):
        self.event = torch.cuda.Event()
        self.number = 0  # places are counted: whoever has waited for one has waited for all with lower numbers


class CommStream:
    """Where communication is queued: a CUDA stream of its own, or on the CPU the order of the program.

    ``fork()`` is a context in which operations run behind everything queued so far, beside what follows; it yields the
    stream that it leaves, and one within another changes nothing. ``mark(m)`` moves a mark to the present end of the
    queue; ``join(m)`` lets what follows wait for it, never the host. ``hold(tensors)`` keeps what the queue reads.

    ``bounded``: computation waits when the queue falls behind by ``HELD`` buckets; False: what is held grows instead.

    Each of these is called dozens of times a step, where micro-batches are small and the host is the limit. So events
    are reused (2 us instead of 5), the current stream is asked for by the device's index (``torch.cuda.stream()`` would
    ask three times), and a stream that has waited for a later mark does not wait again.
    """

    HELD = 2  # buckets: so far may the queue fall behind before computation waits

    def __init__(self, device: torch.device, bounded: bool = True):
        self.stream = self._index = None
        self._bounded = bounded
        self._left: torch.cuda.Stream | None = None  # by the fork that is open
        self._joined: tuple[torch.cuda.Stream | None, int] = (None, 0)  # who has waited last, for which number at most
        self._held: deque[tuple[Mark | None, Sequence[Tensor | None]]] = deque()
        self._numbers = itertools.count(1)
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self._index = self.stream.device.index
            self._forked = torch.cuda.Event()
            self._hold_marks = itertools.cycle([Mark() for _ in range(self.HELD + 1)])

    def new_mark(self) -> Mark | None:
        return None if self.stream is None else Mark()

    def fork(self):
        return contextlib.nullcontext() if self.stream is None else self._on_stream()

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[torch.cuda.Stream]:
        outer = torch.cuda.current_stream(self._index)
        if outer == self.stream:
            yield self._left
            return
        self._left = outer
        self._forked.record(outer)
        self.stream.wait_event(self._forked)
        torch.cuda.set_stream(self.stream)
        try:
            yield outer
        finally:
            torch.cuda.set_stream(outer)

    def mark(self, mark: Mark | None) -> None:
        if mark is not None:
            mark.event.record(self.stream)
            mark.number = next(self._numbers)

    def join(self, mark: Mark | None, stream: torch.cuda.Stream | None = None) -> None:
        """``stream``: the one that waits; None: the current one."""
        if mark is None:
            return
        stream = stream or torch.cuda.current_stream(self._index)
        last, number = self._joined
        if stream != self.stream and (stream != last or number < mark.number):
            stream.wait_event(mark.event)
            self._joined = stream, mark.number

    def hold(self, tensors: Sequence[Tensor | None]) -> None:
        """Within a fork: keep ``tensors``, which what was queued until now reads, in memory.

        They belong to the stream that was left. Forgotten, their memory would serve its next kernels while the queue
        still reads; so it waits for the queue first. (``record_stream`` would cost an event a tensor.)
        """
        if self.stream is not None and not self._bounded:
            self._held.append((None, tensors))
        elif self.stream is not None:
            mark = next(self._hold_marks)
            self.mark(mark)
            self._held.append((mark, tensors))
            if len(self._held) > self.HELD:
                mark, _ = self._held.popleft()
                self.join(mark, self._left)

    def release(self) -> None:
        """Forget what is held: the current stream has waited for all that read it."""
        self._held.clear()


class GradBuffer:
    """Of one bucket at a time: its gradients on their way out, packed; over peer memory what other ranks send here.

    Attributes:
        shared: all that there is of it; peers write into it.
        flat: it, as a tensor.
        views: what each bucket has cut it into.
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, peer_memory: PeerMemory | None):
        if peer_memory is not None:
            numel = peer_memory.received_numel(numel)
        self.shared = zeros(numel, dtype, device, peer_memory)
        self.flat = self.shared.flat
        self.views: dict[object, object] = {}
        self.release: Finish = nothing  # completes the last bucket's use of it


class GradBufferPool:
    """The few buffers that all buckets of one dtype share, taken in turn.

    Stage 2 keeps no full gradient: a bucket's gradients are packed, reduced and forgotten, and the buffer serves the
    next bucket. Taking a buffer first completes its last use, so that is how far communication may fall behind. On a
    CUDA stream one buffer does, for its uses queue up in order, packing included; what waits there is the gradients of
    ``CommStream.HELD`` buckets. So three buckets are in memory on either device. Over peer memory two buffers receive
    in turn (``grad_push.py``), each of all but a rank's own share of a bucket: three buckets on two ranks, up to four.

    ``bounded`` False: on a CPU each bucket has a buffer of its own, so that taking one never waits in a backward pass.
    """

    DEPTH = 3
    RECEIVING = 2

    def __init__(
        self, dtype: torch.dtype, device: torch.device, peer_memory: PeerMemory | None = None, bounded: bool = True
    ):
        self.dtype, self.device, self.peer_memory = dtype, device, peer_memory
        self._bounded = bounded or device.type == "cuda" or peer_memory is not None
        self._buckets = 0
        self._depth = self.DEPTH
        if device.type == "cuda":
            self._depth = 1 if peer_memory is None else self.RECEIVING
        self._buffers: list[GradBuffer] = []
        self._numel = 0
        self._turn = 0

    def fit(self, numel: int) -> None:
        """Make room for one bucket more, of ``numel`` elements."""
        self._buckets += 1
        if not self._bounded:
            self._depth = self._buckets
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
        buffer.release = nothing
        return buffer

    def reserve(self) -> None:
        """Memory that peers write is allocated now, by all ranks together: they come to ``take()`` at other times."""
        while self.peer_memory is not None and len(self._buffers) < self._depth:
            self._add()

    def _add(self) -> GradBuffer:
        self._buffers.append(GradBuffer(self._numel, self.dtype, self.device, self.peer_memory))
        return self._buffers[-1]

    @property
    def nbytes(self) -> int:
        return sum(buffer.flat.nbytes for buffer in self._buffers)
