"""The stream on which communication is enqueued."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class CommStream:
    """Where communication is enqueued. This one is a CPU's: the order of the program. See :class:`CudaCommStream`.

    ``fork()`` enqueues what runs inside on the communication stream, after all work already enqueued; it yields the
    caller's stream and is re-entrant. ``record_event(e)`` moves an event to the present end of the queue;
    ``wait_event(e)`` lets what follows wait for it, never the host. ``keep_alive_until_done(tensors)`` keeps what the
    queue reads. ``complete_enqueued(work)`` completes a ``Work`` where that enqueues and does not wait.
    """

    HELD = 2  # buckets: so far may the queue fall behind before computation waits
    stream: torch.cuda.Stream | None = None

    def new_event(self) -> Event | None:
        return None

    def fork(self) -> contextlib.AbstractContextManager[torch.cuda.Stream | None]:
        return contextlib.nullcontext()

    def complete_enqueued(self, work: Callable[[], None]) -> None:
        """Here ``work`` waits on the host: whoever needs the result completes it."""

    def record_event(self, event: Event | None) -> None:
        """The program is in order."""

    def wait_event(self, event: Event | None, stream: torch.cuda.Stream | None = None) -> None:
        """The program is in order."""

    def keep_alive_until_done(self, tensors: Sequence[Tensor | None]) -> None:
        """What has been enqueued has run."""

    def release(self) -> None:
        """Nothing is kept."""


class Event:
    """A place in the queue of communication. Made once, and moved along: who waited for it before is not affected."""

    def __init__(self):
        self.event = torch.cuda.Event()
        self.number = 0  # places are counted: whoever has waited for one has waited for all with lower numbers


class CudaCommStream(CommStream):
    """A CUDA stream of its own.

    ``bounded``: computation waits when the queue falls behind by ``HELD`` buckets; False: what is kept grows instead.

    Each method is called dozens of times a step, where micro-batches are small and the host is the limit. So events are
    reused (2 us instead of 5), the current stream is known by its handle (``torch.cuda.current_stream()`` makes an
    object, for 2 to 10 us), and a stream that has waited for a later event does not wait again.
    """

    def __init__(self, device: torch.device, bounded: bool = True):
        self._bounded = bounded
        self._left: torch.cuda.Stream | None = None  # by the fork that is open
        self._joined: tuple[torch.cuda.Stream | None, int] = (None, 0)  # who has waited last, for which number at most
        self._held: deque[tuple[Event | None, Sequence[Tensor | None]]] = deque()
        self._numbers = itertools.count(1)
        self.stream = torch.cuda.Stream(device)
        self._index = self.stream.device.index
        self._streams = {self.stream.cuda_stream: self.stream}  # those that have been current, by their handles
        self._forked = torch.cuda.Event()
        self._held_events = itertools.cycle([Event() for _ in range(self.HELD + 1)])

    def new_event(self) -> Event:
        return Event()

    @contextlib.contextmanager
    def fork(self) -> Iterator[torch.cuda.Stream | None]:
        outer = self._current()
        if outer is self.stream:
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

    def _current(self) -> torch.cuda.Stream:
        """Always the same object for the same stream."""
        handle = torch._C._cuda_getCurrentRawStream(self._index)
        if handle not in self._streams:
            self._streams[handle] = torch.cuda.current_stream(self._index)
        return self._streams[handle]

    def complete_enqueued(self, work: Callable[[], None]) -> None:
        work()

    def record_event(self, event: Event) -> None:
        event.event.record(self.stream)
        event.number = next(self._numbers)

    def wait_event(self, event: Event, stream: torch.cuda.Stream | None = None) -> None:
        """``stream``: the one that waits; None: the current one."""
        stream = stream or self._current()
        last, number = self._joined
        if stream is not self.stream and (stream is not last or number < event.number):
            stream.wait_event(event.event)
            self._joined = stream, event.number

    def keep_alive_until_done(self, tensors: Sequence[Tensor | None]) -> None:
        """Within a fork: keep ``tensors``, which what was enqueued until now reads, in memory.

        They belong to the stream that was left. Forgotten, their memory would serve its next kernels while the queue
        still reads; so it waits for the queue first. (``record_stream`` would cost an event a tensor.)
        """
        if not self._bounded:
            self._held.append((None, tensors))
            return
        event = next(self._held_events)
        self.record_event(event)
        self._held.append((event, tensors))
        if len(self._held) > self.HELD:
            event, _ = self._held.popleft()
            self.wait_event(event, self._left)

    def release(self) -> None:
        """Forget what is kept: the current stream has waited for all that read it."""
        self._held.clear()


def make_comm_stream(device: torch.device, bounded: bool = True) -> CommStream:
    return CudaCommStream(device, bounded) if device.type == "cuda" else CommStream()
