"""Whether an optimizer measures its steps: the seam to ``metrics/``, which is imported when one does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lion_dist.sharding.phases import NO_CLOCK

if TYPE_CHECKING:
    from lion_dist.metrics.step_metrics import StepMetrics


class NoMetrics:
    """The place of ``StepMetrics`` in an optimizer that does not measure."""

    is_measuring = False
    clock = NO_CLOCK  # labels phases for a profiler all the same

    def begin_step(self) -> None:
        """Nothing is measured."""

    def end_step(self, skip: Tensor | None = None, counters: Tensor | None = None) -> None:
        """Nothing was measured."""


NO_METRICS = NoMetrics()


def make_step_metrics(every: int, device: torch.device) -> StepMetrics | NoMetrics:
    """``every``: measure each ``every``-th step; 0: never."""
    if not every:
        return NO_METRICS
    from lion_dist.metrics.step_metrics import StepMetrics

    return StepMetrics(every, device)


def refuse_unmeasured(step_metrics: StepMetrics | NoMetrics) -> None:
    """Raise RuntimeError where there are no metrics to ask for."""
    if step_metrics is NO_METRICS:
        raise RuntimeError("metrics() of an optimizer that does not measure: construct it with metrics_every=K")
