"""``averaged_parameters()`` of ``ShardedLion``: every rank's parameters are the averages, which lie in shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lion_dist.averages import WeightSwap, not_averaged
from lion_dist.full_params import FullParams
from lion_dist.shard_builder import ShardBuilder
from lion_dist.shard_state import ShardState


class HoldsAverages:
    """A part of ``ShardedOptimizer``, which has the attributes."""

    shards: list[ShardState]
    _builder: ShardBuilder
    _full_params: FullParams

    @property
    def weight_swap(self) -> WeightSwap:
        return self._full_params.weight_swap

    @contextlib.contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """A context in which the model holds the average of the weights (``ema_decay``) on every rank, for evaluation
        or to save its ``state_dict()``. All ranks enter together: each gathers the averages, rounded to nearest where
        parameters are narrower. Afterwards parameters have the bits that they had before, also after an exception, and
        nothing is sent.

        Inside, what needs the weights is refused: :meth:`step`, state dicts of this optimizer, checkpoints, a backward
        pass into parameters. One copy of all parameters is kept meanwhile.
        """
        if self._builder.ema_decay is None:
            raise not_averaged()
        from lion_dist.weight_swap import swapped

        self.weight_swap.refuse("averaged_parameters()")
        self._full_params.finish_sync()
        self._full_params.follow_outside_writes(self.shards)
        buckets = [shard.bucket for shard in self.shards]
        params = [param for bucket in buckets for param in bucket.params]
        with swapped(self.weight_swap, params, [bucket.flat_params for bucket in buckets], self._gather_averages):
            yield

    def _gather_averages(self) -> None:
        for shard in self.shards:
            bucket = shard.bucket
            bucket.param_shard.copy_(shard.weight_avg)
            bucket.groups.all_gather(bucket.flat_params, bucket.param_shard)()

    def keep_averages(self) -> None:
        """Averages have been loaded: they do not begin anew where somebody writes parameters before the next step."""
        self._full_params.averages_move = True
