"""How parameters become full again after an update: a strategy, chosen once at construction.

* :class:`GatherParams`: each rank sends the parameters that it has updated, 2 or 4 bytes each.
* ``SendCodes`` (``coded_sync/``): each rank sends how they moved, a fifth to a third of a byte each, and every rank
  replays that on its own copy.
* :class:`LeaveStale`: a captured step gathers at the head of its next replay.

They are told of buckets when their shards are updated, and once more when all are. The first two leave one collective
per bucket in flight, which ``bucket.finish_param_sync()`` waits for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lion_dist.sharding.bucket import Bucket


class GatherParams:
    """Each bucket's all-gather starts when its shard is updated, together with those of one launch."""

    is_interrupted = False  # whole parameters may be received again

    def after_update(self, buckets: Sequence[Bucket]) -> None:
        with buckets[0].stream.fork():  # once: each bucket's own changes nothing then
            for bucket in buckets:
                bucket.start_param_sync()

    def after_updates(self, changed: Collection[Bucket]) -> None:
        """Nothing is left to start."""

    def give_up(self) -> None:
        """What is under way is whole parameters: it does no harm."""


class LeaveStale:
    """Nothing is sent: the next step gathers at its head (``captured_step.py``)."""

    is_interrupted = False

    def after_update(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            bucket.leave_stale()

    def after_updates(self, changed: Collection[Bucket]) -> None:
        """Nothing is left to start."""

    def give_up(self) -> None:
        """Nothing is under way."""
