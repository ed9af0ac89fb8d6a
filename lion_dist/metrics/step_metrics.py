"""``opt.metrics()``: what every K-th step did, measured on the device and read when somebody asks.

A measured step reads parameters, momentum and gradients once more, before the update (``statistics.py``), and
leaves a few numbers on the device. Nothing waits until :meth:`Lion.metrics` or :meth:`ShardedLion.metrics` is called;
ranks exchange one small message then. What every key means is in ``docs/metrics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lion_dist.kernels.update import LionTensors
from lion_dist.local_shard import LocalShard
from lion_dist.metrics.phase_clock import WAITING, Interval, PhaseClock
from lion_dist.metrics.statistics import COLUMNS, measure
from lion_dist.sharding import collectives
from lion_dist.sharding.phases import PHASES
from lion_dist.sharding.process_groups import RankGroups

Axes = tuple[tuple, ...]  # (mesh, axis) pairs along which a tensor is cut


class StepMetrics:
    """When to measure, and what the last measured step left on the device.

    Statistics are kept apart by the axes that cut their tensors, because they are summed along those later.

    Args:
        every: measure each ``every``-th step.
        device: of the parameters.
    """

    def __init__(self, every: int, device: torch.device):
        self.every, self.device = every, device
        self.clock = PhaseClock(device)
        self.steps = 0  # begun
        self.is_measuring = False
        self._sums: dict[Axes, Tensor] = {}  # [COLUMNS] fp64, of the step under way
        self._record: dict[Axes, Tensor] = {}  # [1 + COLUMNS] fp64: the last measured step's number, and its sums
        self._nothing = torch.zeros(1 + len(COLUMNS), dtype=torch.float64, device=device)
        self._skipped: Tensor | None = None
        self._start_clock_before_a_measured_step()

    def _start_clock_before_a_measured_step(self) -> None:
        if (self.steps + 1) % self.every == 0:
            self.clock.start()

    def begin_step(self) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"metrics_every={self.every}, but a CUDA graph is captured: a replayed step does not ask whether it is "
                "to be measured. Construct the optimizer with metrics_every=0."
            )
        self.steps += 1
        self.is_measuring, self._sums = self.steps % self.every == 0, {}

    def add(self, sums: Tensor, axes: Axes = ()) -> None:
        """``sums``: [COLUMNS] fp64 of tensors that are cut along ``axes``."""
        sums = sums.to(self.device, non_blocking=True)
        self._sums[axes] = self._sums[axes] + sums if axes in self._sums else sums

    def end_step(self, skip: Tensor | None = None, counters: Tensor | None = None) -> None:
        """``skip``: [] or [1] on the device; nonzero when the step was skipped: then the last record stays.

        ``counters``: [n] int64 on the device, the steps so far, taken or skipped; None: as counted here.
        """
        skipped = None
        if skip is not None and (self.is_measuring or counters is None):
            skipped = skip.reshape(()) != 0
        if skipped is not None and counters is None:
            self._skipped = skipped.long() if self._skipped is None else self._skipped + skipped
        if self.is_measuring:
            self.clock.stop()
            step = torch.full((1,), self.steps, dtype=torch.float64, device=self.device)
            if counters is not None:
                step = counters.sum(0, keepdim=True).double()
            self._record = {axes: self._replace(axes, step, skipped) for axes in self._sums | self._record | {(): None}}
            self.is_measuring = False
        self._start_clock_before_a_measured_step()

    def _replace(self, axes: Axes, step: Tensor, skipped: Tensor | None) -> Tensor:
        sums = self._sums.get(axes)
        new = torch.cat([step, torch.zeros_like(self._nothing[1:]) if sums is None else sums])
        return new if skipped is None else torch.where(skipped, self._record.get(axes, self._nothing), new)

    def record(self, axes: Iterable[Axes] = ((),)) -> dict[Axes, Tensor]:
        """[1 + COLUMNS] fp64 on the device for each of ``axes``: the number of the step, and its sums on this rank."""
        return {key: self._record.get(key, self._nothing) for key in dict.fromkeys(axes)}

    def skipped_steps(self) -> int:
        """Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)


def measure_batch(
    step_metrics: StepMetrics, params: Sequence[Tensor], tensors: LionTensors, grads, scalars, **arguments
) -> None:
    """Measure one of ``Lion``'s batches, apart by the axes that cut the ``params``. Arguments as ``measure``'s."""
    axes = [LocalShard.of(param).axes for param in params]
    kinds = dict.fromkeys(axes)
    for kind in kinds:
        active = None
        if len(kinds) > 1:
            active = torch.tensor([float(a == kind) for a in axes]).to(tensors.device, non_blocking=True)
        step_metrics.add(measure(tensors, grads, scalars, active=active, **arguments), kind)


def sum_over_shards(record: Mapping[Axes, Tensor], process_group: ProcessGroup | None) -> tuple[int, list[float]]:
    """(step, sums over whole tensors [COLUMNS]) of a :meth:`StepMetrics.record`; waits for the device.

    One message a mesh axis along which anything is cut: one in all under FSDP2 and HSDP. ``process_group``: the ranks
    among which an engine has cut what looks like plain tensors.
    """
    keys = list(record)
    rows = torch.stack([record[key] for key in keys])
    groups: dict[ProcessGroup, list[int]] = {}
    for i, key in enumerate(keys):
        for group in [mesh.get_group(axis) for mesh, axis in key] or [process_group]:
            if group is not None:
                groups.setdefault(group, []).append(i)
    for group, cut in groups.items():
        message = rows[cut, 1:].contiguous()
        collectives.all_reduce(message, group)
        rows[cut, 1:] = message
    values = rows.tolist()
    step, *sums = zip(*values, strict=True)
    return int(max(step)), list(map(math.fsum, sums))


def describe(step: int, sums: Sequence[float]) -> dict[str, float]:
    """The part of ``metrics()`` that comes from the statistics; NaN where there is nothing to divide by."""
    total = dict(zip(COLUMNS, sums, strict=True))
    measured = step > 0
    norms = {
        f"{kind}_norm": math.sqrt(total[f"{kind}_squares"]) if measured else math.nan
        for kind in ("grad", "param", "update", "exp_avg")
    }
    shares = {
        f"{kind}_share": total[kind] / total["numel"] if total["numel"] else math.nan
        for kind in ("flipped", "agreement", "zero", "lost")
    }
    ratio = norms["update_norm"] / norms["param_norm"] if norms["param_norm"] else math.nan
    return {"step": step, **norms, "update_ratio": ratio, **shares}


def metrics_over_ranks(step_metrics: StepMetrics, groups: RankGroups) -> dict:
    """All keys but ``skipped_steps``: one message, a row a rank. Every element is counted by one rank only."""
    rank = torch.distributed.get_rank() if groups.axes else 0
    times = torch.tensor([rank, *times_of(step_metrics.clock.last)], dtype=torch.float64).to(step_metrics.device)
    rows, finish = collectives.gather_rows(torch.cat([step_metrics.record()[()], times]), groups.axes)
    finish()
    values, end = rows.tolist(), 1 + len(COLUMNS)
    sums = [math.fsum(column) for column in zip(*(row[1:end] for row in values), strict=True)]
    ranks, times = [int(row[end]) for row in values], [row[end + 1 :] for row in values]
    return describe(int(values[0][0]), sums) | describe_times(ranks, times)


def metrics_of_rank(step_metrics: StepMetrics, params: Iterable[Tensor], process_group: ProcessGroup | None) -> dict:
    """All keys, for an optimizer of tensors that somebody else shards and whose communication somebody else does."""
    step, sums = sum_over_shards(step_metrics.record(LocalShard.of(param).axes for param in params), process_group)
    times = describe_times([0], [times_of(step_metrics.clock.last)])
    times["ms_by_phase"] = {phase: times["ms_by_phase"][phase] for phase in ("update", "measure", "elsewhere")}
    unknown = {"bytes_by_phase": {}, "rank_ms": [], "slowest_rank": None}
    return describe(step, sums) | {"skipped_steps": step_metrics.skipped_steps()} | times | unknown


TIMES = (*PHASES, *PHASES)  # columns of a rank's message: milliseconds, then bytes


def times_of(interval: Interval | None) -> list[float]:
    """[TIMES] of this rank; waits for the device."""
    if interval is None:
        return [math.nan] * len(TIMES)
    return [*interval.ms_by_phase().values(), *interval.bytes_by_phase().values()]


def describe_times(ranks: Sequence[int], times: Sequence[Sequence[float]]) -> dict:
    """The part of ``metrics()`` that comes from the clocks. ``times[i]``: [TIMES] of global rank ``ranks[i]``."""
    by_rank = dict(sorted(zip(ranks, times, strict=True)))
    means = [math.fsum(column) / len(by_rank) for column in zip(*by_rank.values(), strict=True)]
    ms = [dict(zip(PHASES, row, strict=False)) for row in by_rank.values()]
    own = [sum(value for phase, value in row.items() if phase not in WAITING) for row in ms]
    return {
        "ms_by_phase": dict(zip(PHASES, means, strict=False)),
        "bytes_by_phase": dict(zip(PHASES, means[len(PHASES) :], strict=True)),
        "rank_ms": own,
        "slowest_rank": None if any(map(math.isnan, own)) else max(zip(own, by_rank, strict=True))[1],
    }
