"""Where a step's time and bytes go: one timeline cut into phases.

The timeline is the one that computes: the host on a CPU, the current stream on a GPU. Each moment belongs to one phase
(``sharding/phases.py``), so phases add up to the step. Communication that overlaps with backward or forward is in no
phase of its own: what counts as ``grad_sync`` or ``param_sync`` is what the computation stood still for: on a CPU the
packing, too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lion_dist.sharding import collectives
from lion_dist.sharding.phases import PHASES, Phase, PhaseLabels

WAITING: tuple[Phase, ...] = ("grad_sync", "norm", "param_sync")


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


class PhaseClock(PhaseLabels):
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
        label = super().phase(name, of)
        return self._measured(name, label) if self.is_running else label

    @contextlib.contextmanager
    def _measured(self, name: Phase, label: contextlib.AbstractContextManager) -> Iterator[None]:
        outer = self._marks[-1].phase
        self._mark(name)
        try:
            with label:
                yield
        finally:
            self._mark(outer)

    def _mark(self, phase: Phase) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            now = torch.cuda.current_stream(self.device).record_event(event)
        else:
            now = time.perf_counter()
        self._marks.append(_Boundary(now, collectives.sent_bytes, phase))
