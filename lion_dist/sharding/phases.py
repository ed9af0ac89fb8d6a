"""Where a step's time and bytes go: one timeline cut into phases.

The timeline is the one that computes: the host on a CPU, the current stream on a GPU. Each moment belongs to one phase,
so phases add up to the step. Communication that overlaps with backward or forward is in no phase of its own: what
counts as ``grad_sync`` or ``param_sync`` is what the computation stood still for: on a CPU the packing, too.

    ===========  ======================================================================================
    grad_sync    gradients packed; computation waiting for their reduction
    norm         the check of the gradients: norm, finite, used (and cautious Lion's counts); one message
    update       the update of this rank's shards
    param_sync   gathers started; computation waiting for parameters
    measure      the measuring itself: statistics, checksums of replicas
    elsewhere    all the rest: forward, backward, the data, the program
    ===========  ======================================================================================

Other ranks are waited for in grad_sync, norm and param_sync only.

Under ``torch.profiler`` (and ``emit_nvtx``) each phase carries a label, ``lion_dist.grad_sync blocks.0.up.weight ..
blocks.1.down.bias``: of a bucket its first and last parameter. Where nobody profiles this costs one question.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.autograd import _profiler_enabled
from torch.profiler import record_function

from lion_dist.sharding import collectives

Phase = Literal["grad_sync", "norm", "update", "param_sync", "measure", "elsewhere"]
PHASES: tuple[Phase, ...] = get_args(Phase)
WAITING: tuple[Phase, ...] = ("grad_sync", "norm", "param_sync")

_NOT_RUNNING = contextlib.nullcontext()
LABEL = "lion_dist."  # labels begin so, and go on with the phase


@dataclass(frozen=True)
class _Boundary:
    """From here on, time and bytes belong to ``phase``."""

    time: float | torch.cuda.Event  # seconds, or an event
    sent_bytes: int
    phase: Phase


class Interval:
    """One measured stretch of the timeline."""

    def __init__(self, marks: list[_Boundary]):
        self._marks = marks

    def ms_by_phase(self) -> dict[Phase, float]:
        """Waits for the device to have come to the interval's end."""
        for mark in self._marks:
            if isinstance(mark.time, torch.cuda.Event):
                mark.time.synchronize()
        result = dict.fromkeys(PHASES, 0.0)
        for mark, following in zip(self._marks, self._marks[1:], strict=False):
            result[mark.phase] += _ms_between(mark.time, following.time)
        return result

    def bytes_by_phase(self) -> dict[Phase, int]:
        """Bytes that this rank handed to collectives (``collectives.sent_bytes``)."""
        result = dict.fromkeys(PHASES, 0)
        for mark, following in zip(self._marks, self._marks[1:], strict=False):
            result[mark.phase] += following.sent_bytes - mark.sent_bytes
        return result


def _ms_between(start, stop) -> float:
    return start.elapsed_time(stop) if isinstance(start, torch.cuda.Event) else 1e3 * (stop - start)


class PhaseClock:
    """Cuts the timeline into phases between ``start()`` and ``stop()``; outside of them ``phase()`` only labels.
    Nothing waits for the device: on a GPU marks are events on the current stream."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last: Interval | None = None  # between the last start() and stop()
        self.is_running = False
        self._marks: list[_Boundary] = []

    def start(self) -> None:
        self.is_running, self._marks = True, []
        self._mark("elsewhere")

    def stop(self) -> None:
        if self.is_running:
            self._mark("elsewhere")
            self.last, self.is_running = Interval(self._marks), False

    def phase(self, name: Phase, of: str = ""):
        """A context; what runs inside belongs to ``name``, or to a phase opened inside of it. ``of``: for the label."""
        return self._open(name, of) if self.is_running or _profiler_enabled() else _NOT_RUNNING

    @contextlib.contextmanager
    def _open(self, name: Phase, of: str) -> Iterator[None]:
        outer = self._marks[-1].phase if self.is_running else None
        if outer is not None:
            self._mark(name)
        try:
            with record_function(f"{LABEL}{name} {of}".rstrip()):
                yield
        finally:
            if outer is not None:
                self._mark(outer)

    def _mark(self, phase: Phase) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            now = torch.cuda.current_stream(self.device).record_event(event)
        else:
            now = time.perf_counter()
        self._marks.append(_Boundary(now, collectives.sent_bytes, phase))


NO_CLOCK = PhaseClock(torch.device("cpu"))  # is never started


def in_phase(name: Phase) -> Callable[[Callable], Callable]:
    """Decorates a method of an object that has a ``clock`` and a ``label``."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def within(self, *args):
            if not self.clock.is_running and not _profiler_enabled():  # the common case, in a third of the time
                return method(self, *args)
            with self.clock.phase(name, self.label):
                return method(self, *args)

        return within

    return decorate
