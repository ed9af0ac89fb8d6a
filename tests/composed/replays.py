"""A captured step without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lion_dist import ShardedLion
from lion_dist.param_sync import LeaveStale
from lion_dist.sharding.bucket import ParamState


class Replays:
    """Takes the place of ``CapturedStep``: one eager step, then steps that move parameters as replays do.

    Each begins with the gather of what the step before has updated, and leaves parameters stale.
    """

    def __init__(self, step: Callable[..., Any], optimizer: ShardedLion):
        self._step, self._optimizer, self._warm_up = step, optimizer, True

    def __call__(self, *inputs: Any) -> Any:
        optimizer = self._optimizer
        if self._warm_up:
            self._warm_up = False
            output = self._step(*inputs)
            optimizer.finish_param_sync()
            return output
        optimizer.before_replay()
        with optimizer.capturing(LeaveStale()):
            assert all(bucket.param_state is ParamState.GATHERING for bucket in optimizer.buckets)
            output = self._step(*inputs)
        optimizer.after_replay()
        assert all(bucket.param_state is ParamState.STALE for bucket in optimizer.buckets)
        return output
