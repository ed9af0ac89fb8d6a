"""The phases of a step, as labels under a profiler.

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
``metrics/phase_clock.py`` measures phases, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Literal, get_args

from torch.autograd import _profiler_enabled
from torch.profiler import record_function

Phase = Literal["grad_sync", "norm", "update", "param_sync", "measure", "elsewhere"]
PHASES: tuple[Phase, ...] = get_args(Phase)

_UNLABELLED = contextlib.nullcontext()
LABEL = "lion_dist."  # labels begin so, and go on with the phase


class PhaseLabels:
    """What buckets and steps open a phase at: it labels them for a profiler."""

    is_running = False  # phases are measured

    def phase(self, name: Phase, of: str = ""):
        """A context; what runs inside belongs to ``name``, or to a phase opened inside of it. ``of``: for the label."""
        return record_function(f"{LABEL}{name} {of}".rstrip()) if _profiler_enabled() else _UNLABELLED


NO_CLOCK = PhaseLabels()


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
