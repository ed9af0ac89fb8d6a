"""Who has written a parameter: the optimizer, or somebody else (``load_state_dict``, an EMA swap, surgery).

Updates go through the flat buffer, which autograd does not see, so a parameter's version counter moves when somebody
else writes. Every update moves it too: a graph that still needs the old values says so when it runs backward.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import Parameter

from lion_dist.sharding.bucket import Bucket


class ParamWatch:
    """The version counters of parameters after the optimizer's last update."""

    def __init__(self):
        self._versions: dict[Parameter, int] = {}

    def add(self, params: Iterable[Parameter]) -> None:
        self._versions.update((p, p._version) for p in params)

    def note_updates(self, params: Iterable[Parameter]) -> None:
        """The optimizer has updated them."""
        params = list(params)
        torch.autograd.graph.increment_version(params)
        self.add(params)

    def find_changes(self, bucket: Bucket) -> bool:
        """Whether somebody else has written parameters of ``bucket``, or given them other memory, since the last call.

        Afterwards they lie in the flat buffer. What is written through ``.data`` in place leaves no trace.
        """
        moved = bucket.take_back_params()
        written = [p for p in bucket.params if self._versions[p] != p._version]
        self.add(written)
        return moved or bool(written)
