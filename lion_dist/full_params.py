"""The full parameters on this rank: whole or on their way, and written by the optimizer or by somebody else."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch.nn import Parameter

from lion_dist.averages import WeightSwap
from lion_dist.param_sync import GatherParams
from lion_dist.shard_state import ShardState
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.forward_hooks import ForwardHooks
from lion_dist.version_tracker import VersionTracker

if TYPE_CHECKING:
    from lion_dist.optional_guards import Guards


class FullParams:
    """Keeps parameters and main params in step with each other, and replicas with their owners.

    Args:
        shards: of the optimizer; more may come to the list.
        hooks: on the module, which waits for its parameters; None: whoever updates waits itself.
        param_sync: how updated shards reach the other ranks.
        guards: refuse and warn.
    """

    def __init__(
        self,
        shards: Sequence[ShardState],
        hooks: ForwardHooks | None,
        param_sync: GatherParams,
        guards: Guards,
    ):
        self._shards, self._hooks, self.param_sync = shards, hooks, param_sync
        self._versions = VersionTracker(guards)
        self.weight_swap = WeightSwap()
        self.averages_move = False  # they have; until then they begin at whatever the parameters become
        self._changed: set[Bucket] = set()  # by somebody else, since the last step
        self._updating: set[Bucket] = set()  # by the update under way, or by one that an exception has ended

    @property
    def buckets(self) -> list[Bucket]:
        return [shard.bucket for shard in self._shards]

    def add(self, shards: Sequence[ShardState]) -> None:
        self._versions.add(shard.bucket for shard in shards)
        if self._hooks is not None:
            self._hooks.add_buckets([shard.bucket for shard in shards])

    def finish_sync(self) -> None:
        """Whatever follows may read every parameter."""
        for shard in self._shards:
            shard.bucket.finish_param_sync()

    # ---- an update

    def follow_outside_writes(self, shards: Iterable[ShardState]) -> None:
        """Main params follow parameters that somebody else has changed since our last update."""
        self.weight_swap.refuse("a call that needs the weights (a step, a state dict, check_replicas())")
        for shard in shards:
            if self._versions.find_changes(shard.bucket):
                self._follow(shard)
                self._changed.add(shard.bucket)

    def _follow(self, shard: ShardState) -> None:
        shard.refresh_main()
        if not self.averages_move:
            shard.begin_average()

    def begin_updates(self, buckets: Collection[Bucket]) -> None:
        """Note that from here to :meth:`end_updates` an exception leaves parameters that may differ between ranks."""
        self._updating.update(buckets)

    def note_updates(self, buckets: Sequence[Bucket], params: Iterable[Parameter]) -> None:
        """``params`` of ``buckets`` are the optimizer's own, new values."""
        self.averages_move = True
        self._versions.note_updates(buckets, params)

    def end_updates(self, buckets: Collection[Bucket]) -> None:
        self._updating.difference_update(buckets)

    def finish_sending(self) -> None:
        """All buckets of the step have been updated."""
        self.param_sync.after_updates(self._changed)
        self._changed.clear()

    def finish_step(self) -> None:
        """Wait for parameters that no module waits for."""
        if self._hooks is None:
            self.finish_sync()
        else:
            self._hooks.finish_outside()

    def note_sync_starts(self) -> None:
        if self._hooks is not None:
            self._hooks.note_sync_starts()

    def look_at_modules(self) -> None:
        """Parameters have moved within the module."""
        if self._hooks is not None:
            self._hooks.look_at_modules()

    # ---- repairs

    def refuse_interrupted(self) -> None:
        if self._updating:
            raise RuntimeError(
                "an exception has ended an update of parameters: ranks may hold different ones. Call zero_grad() on "
                "every rank, which gathers them anew, and run the step again from its first backward."
            )

    def gather_what_was_interrupted(self) -> None:
        """If an exception has ended an update or a replay of codes, every rank gets what the owners hold."""
        if not self._updating and not self.param_sync.is_interrupted:
            return
        self.param_sync.give_up()
        for bucket in self.buckets:
            bucket.gather_again()
        self._note_all_updated()
        self._updating.clear()

    def sync_main_params(self) -> None:
        """Main params follow parameters that were written through ``.data``, which leaves no trace."""
        self.finish_sync()
        self.weight_swap.refuse("refresh_main_params()")
        for shard in self._shards:
            self._versions.find_changes(shard.bucket)
            self._follow(shard)

    def resync(self) -> None:
        """Every rank's parameters become their owners'."""
        self.param_sync.give_up()
        self.finish_sync()
        self.follow_outside_writes(self._shards)
        for shard in self._shards:
            shard.resync()

    def close(self) -> None:
        self.finish_sync()
        if self._hooks is not None:
            self._hooks.close()

    # ---- what CapturedStep asks for

    @contextlib.contextmanager
    def synced_by(self, strategy: GatherParams) -> Iterator[None]:
        """Updates inside leave parameters to ``strategy``."""
        before, self.param_sync = self.param_sync, strategy
        try:
            yield
        finally:
            self.param_sync = before

    def start_sync(self) -> None:
        """Gather every bucket's parameters, beside what follows."""
        self.note_sync_starts()
        GatherParams().after_update(self.buckets)

    def leave_stale(self) -> None:
        """A captured step has updated the shards, and no gather is on its way."""
        for bucket in self.buckets:
            bucket.leave_stale()
        self.note_sync_starts()
        self._note_all_updated()

    def _note_all_updated(self) -> None:
        buckets = self.buckets
        self.note_updates(buckets, [param for bucket in buckets for param in bucket.params])
