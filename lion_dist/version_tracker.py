"""Who has written a parameter: the optimizer, or somebody else (``load_state_dict``, an EMA swap, surgery).

Updates go through the flat buffer, which autograd does not see, so a parameter's version counter moves when somebody
else writes. Every update moves it too: a graph that still needs the old values says so when it runs backward.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from lion_dist.sharding.bucket import Bucket

if TYPE_CHECKING:
    from lion_dist.optional_guards import Guards

_version = operator.attrgetter("_version")


class VersionTracker:
    """The version counters of the buckets' parameters after the optimizer's last update."""

    def __init__(self, guards: Guards):
        self._guards = guards
        self._versions: dict[Bucket, list[int]] = {}

    def add(self, buckets: Iterable[Bucket]) -> None:
        self._versions.update((bucket, list(map(_version, bucket.params))) for bucket in buckets)

    def note_updates(self, buckets: Sequence[Bucket], params: Iterable[Parameter]) -> None:
        """The optimizer has updated ``params``, which are some or all of those in ``buckets``."""
        torch.autograd.graph.increment_version(list(params))
        self.add(buckets)

    def find_changes(self, bucket: Bucket) -> bool:
        """Whether somebody else has written parameters of ``bucket``, or given them other memory, since the last call.

        Afterwards they lie in the flat buffer. What is written through ``.data`` in place leaves no trace.

        Raises:
            RuntimeError: one has the memory of another (``guards/``), or is of another dtype, device or shape.
        """
        moved = bucket.moved_params()
        if moved:
            self._guards.check_moved(bucket, moved, list(self._versions))
            bucket.take_back_params(moved)
        known = self._versions[bucket]
        self.add([bucket])
        return bool(moved) or known != self._versions[bucket]
