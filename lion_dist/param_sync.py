"""How a launch updates shards, and how their parameters become full again: a strategy, chosen at construction.

* :class:`GatherParams`: each rank sends the parameters that it has updated, 2 or 4 bytes each.
* ``SendCodes`` (``coded_sync/``): each rank sends how they moved, a fifth to a third of a byte each, and every rank
  replays that on its own copy.
* :class:`LeaveStale`: a captured step gathers at the head of its next replay.

A strategy updates one batch after another, is told when a batch may leave, and once more when all have been updated.
The first two leave one collective per bucket in flight, which ``bucket.finish_param_sync()`` waits for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from torch.nn import Parameter

from lion_dist.kernels.update import lion_update_
from lion_dist.shard_state import ShardBatch, ShardState
from lion_dist.sharding.bucket import Bucket
from lion_dist.update_terms import UpdateTerms


class GatherParams:
    """Each bucket's all-gather starts when its shard is updated, together with those of one launch."""

    is_interrupted = False  # whole parameters may be received again
    leaves_gathers = True  # on their way when the step ends

    def add(self, shards: Sequence[ShardState], index_starts: Mapping[Parameter, int]) -> None:
        """New shards, before their first update."""

    def update(self, batch: ShardBatch, active: Tensor | None, terms: UpdateTerms) -> None:
        if batch.owning:  # unchecked: gradients are cut as the tensors are
            arguments = terms.arguments(batch, active)
            lion_update_(batch.tensors, batch.grads(), terms.of(batch), skip=terms.skip, check=False, **arguments)

    def after_update(self, buckets: Sequence[Bucket]) -> None:
        """``buckets``, of one launch, may leave."""
        with buckets[0].stream.fork():  # once: each bucket's own changes nothing then
            for bucket in buckets:
                bucket.start_param_sync()

    def after_updates(self, changed: Collection[Bucket]) -> None:
        """All are updated. ``changed``: buckets with parameters that somebody else has written on this rank."""

    def give_up(self) -> None:
        """An exception has ended an update. What is under way is whole parameters: it does no harm."""


class LeaveStale(GatherParams):
    """Nothing is sent: the next step gathers at its head (``captured_step.py``)."""

    leaves_gathers = False

    def after_update(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            bucket.leave_stale()
