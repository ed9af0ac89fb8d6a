"""What looks on at the steps of ``ShardedLion`` and may be absent: metrics, the check of replicas, and
the watch for spikes. All are imported when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from lion_dist.local_shard import local_tensor
from lion_dist.optional_metrics import make_step_metrics, refuse_unmeasured
from lion_dist.shard_state import ShardBatch
from lion_dist.sharded_params import ShardedParams
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.process_groups import RankGroups, ShardGroups
from lion_dist.step_rule import SpikeGuard
from lion_dist.update_terms import UpdateTerms

if TYPE_CHECKING:
    from lion_dist.composed.axes import ModelAxes
    from lion_dist.spike_guard.watch import SpikeWatch


class StepObservers:
    """Asked before and after a step, and before each launch.

    Args:
        parts: the ranks that hold other parts of the model, whose metrics count too.
        copies: returns what all ranks must hold alike, as ``ReplicaCheck`` takes it.

    Attributes:
        clock: cuts the step into phases, for metrics and for labels under a profiler.
    """

    def __init__(
        self,
        groups: ShardGroups,
        stream: CommStream,
        device: torch.device,
        *,
        parts: ModelAxes | None = None,
        metrics_every: int,
        check_replicas_every: int,
        copies: Callable[[], tuple],
    ):
        self._groups, self._stream, self._device, self._copies = groups, stream, device, copies
        self._parts = parts
        self.metrics_every, self._check_replicas_every = metrics_every, check_replicas_every
        self._step_metrics, self._replica_check = make_step_metrics(metrics_every, device), None
        self.clock = self._step_metrics.clock

    def begin_step(self) -> None:
        if self._check_replicas_every:
            with self.clock.phase("measure"):
                self._replicas().begin_step(self._copies)
        self._step_metrics.begin_step()

    def before_update(self, batch: ShardBatch, active: Tensor | None, terms: UpdateTerms) -> None:
        """``batch`` is about to be updated. Each element is measured once, by the first replica."""
        measuring = self._step_metrics.is_measuring and batch.owning and batch.is_counted
        if not measuring or batch.groups.replicate_rank:
            return
        from lion_dist.metrics.statistics import measure

        with self.clock.phase("measure"):
            arguments = terms.arguments(batch, active)
            self._step_metrics.add(measure(batch.tensors, batch.grads(), terms.of(batch), **arguments))

    def end_step(self, skip: Tensor, counters: Tensor) -> None:
        self._step_metrics.end_step(skip, counters)

    def metrics(self) -> dict:
        refuse_unmeasured(self._step_metrics)
        from lion_dist.metrics.step_metrics import metrics_over_ranks

        return metrics_over_ranks(self._step_metrics, self._all_ranks)

    def check_replicas(self) -> None:
        self._replicas().check(*self._copies())

    def _replicas(self):
        if self._replica_check is None:
            from lion_dist.replica_check import ReplicaCheck

            every, told = self._check_replicas_every, self._all_ranks
            self._replica_check = ReplicaCheck(self._groups, self._stream, self._device, every, told)  # pyrefly: ignore
        return self._replica_check

    @property
    def _all_ranks(self) -> RankGroups:
        return self._groups if self._parts is None else self._parts.all_ranks(self._groups)


def copies_of(params: ShardedParams, buckets: list[Bucket]) -> tuple[list[Bucket], list[tuple]]:
    """What all ranks must hold alike: buckets, and parameters that are not trained, the module's others too."""
    names, groups_for = params.names, params.groups_for
    frozen = [(names[p], local_tensor(p), groups_for(group)) for p, group in params.frozen.items()]
    frozen += [] if params.parts is None else params.parts.copies()
    for param, name in params.module_names.items():
        if param not in names and not param.requires_grad and type(param) is Parameter:
            frozen.append((name, param, groups_for({})))
    return buckets, frozen


def watch_of(guard: SpikeGuard | None, device: torch.device, backend: str) -> SpikeWatch | None:
    """Watch for spikes, where ``guard`` asks for that."""
    if guard is None:
        return None
    from lion_dist.spike_guard.watch import SpikeWatch

    return SpikeWatch(guard, device, backend)
