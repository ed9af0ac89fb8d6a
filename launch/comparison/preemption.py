"""Signals: SIGTERM saves and ends the run, as before a preemption; SIGUSR1 saves and goes on.

A handler only notes the signal. It is acted on where the ranks exchange losses anyway, every --log-every steps: what
each has noted travels with that message, so that all act on it after the same step, and one rank's signal is enough.

During start-up, which may take longer than a launcher's grace period, there is nothing to save: SIGTERM still ends the
process at once, as it does any other, and SIGUSR1 is noted for the first exchange.
"""

import os
import signal
import time
from types import FrameType
from typing import NamedTuple

START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
SPREAD_SECONDS = 2.0  # in which a launcher's SIGTERM reaches all ranks


class Request(NamedTuple):
    """What signals ask for: 0 or 1 on one rank, or the mean over ranks, so that above 0 means somebody asks."""

    save: float
    stop: float


NOTHING = Request(0, 0)


class SignalRequests:
    """From construction on SIGUSR1 does not end the process, and from ``begin_training`` on neither does SIGTERM."""

    def __init__(self):
        self._noted: set[int] = set()
        self._terminated = False
        signal.signal(signal.SIGUSR1, self._note)

    def begin_training(self) -> None:
        """From here on there is something to save."""
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._noted.add(number)
        self._terminated |= number == signal.SIGTERM

    def take(self) -> Request:
        """What this rank has been asked since the last call."""
        noted, self._noted = self._noted, set()
        return Request(save=float(signal.SIGUSR1 in noted), stop=float(signal.SIGTERM in noted))

    def exit_code(self) -> int:
        """Of a run that SIGTERM has ended, on this rank.

        Launchers signal their ranks one after the other, and a preemption may take one node of several. So a rank that
        was stopped by another's SIGTERM waits a moment for its own. When none comes and torchrun may restart ranks, it
        asks for that: after exit code 0 torchrun would take the job for finished.
        """
        deadline = time.monotonic() + SPREAD_SECONDS
        while not self._terminated and time.monotonic() < deadline:
            time.sleep(0.05)
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        return 0 if self._terminated or not restarts else START_AGAIN
