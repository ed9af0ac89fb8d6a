"""Who has written a parameter: the optimizer, or somebody else (``load_state_dict``, an EMA swap, surgery).

Updates go through the flat buffer, which autograd does not see, so a parameter's version counter moves when somebody
else writes. Every update moves it too: a graph that still needs the old values says so when it runs backward.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch.nn import Parameter

from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.memory_checks import is_shared_with_processes, warn_of_another_format, warn_of_shared_memory
from lion_dist.sharding.memory_format import MemoryFormat

_version = operator.attrgetter("_version")


class VersionTracker:
    """The version counters of the buckets' parameters after the optimizer's last update."""

    def __init__(self):
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
            RuntimeError: one has the memory of another, or is of another dtype, device or shape.
        """
        moved = bucket.moved_params()
        if moved:
            self._refuse_tied_memory(bucket, moved)
            _warn_of_loss(bucket, moved)
            bucket.take_back_params(moved)
        known = self._versions[bucket]
        self.add([bucket])
        return bool(moved) or known != self._versions[bucket]

    def _refuse_tied_memory(self, bucket: Bucket, moved: Sequence[int]) -> None:
        for i in moved:
            param, own = bucket.params[i], bucket.place_of(i)
            address = param.data_ptr()
            if own.data_ptr() == address:
                continue  # its own memory, seen with other strides
            names = [name for other in self._versions if (name := other.name_at(address)) is not None]
            if names:
                raise RuntimeError(
                    f"parameter {bucket.names[i]!r} was given the memory of {names[0]!r} after ShardedLion was made, "
                    "which keeps each parameter in a place of its own: they would be trained apart. Tie the "
                    "parameters themselves (head.weight = embedding.weight) before constructing the optimizer."
                )


def _warn_of_loss(bucket: Bucket, moved: Sequence[int]) -> None:
    """Values are kept when parameters are taken back; sharing with other processes, or a memory format, is not."""
    pairs = [(bucket.names[i], bucket.params[i], bucket.place_of(i)) for i in moved]
    warn_of_shared_memory([name for name, param, _ in pairs if is_shared_with_processes(param)])
    alike = [(name, param, place) for name, param, place in pairs if param.shape == place.shape]
    orders = [(name, MemoryFormat.of(param).dims, MemoryFormat.of(place).dims) for name, param, place in alike]
    warn_of_another_format([name for name, now, then in orders if now != then])
