"""What ``ShardedLion.state_dict()`` and its kin return and take, and the whole state that one rank may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lion_dist.sharding.process_groups import ShardGroups
from lion_dist.state_dict.full_state import Consolidated, check_rank, copied_containers, maker_of_parts, meet
from lion_dist.state_dict.live_state import LiveState
from lion_dist.state_dict.load_plan import LoadPlan

if TYPE_CHECKING:
    from lion_dist.spike_guard.watch import SpikeWatch


class StateAccess:
    """``settled`` returns the live state, with parameters whole and main params that follow them."""

    def __init__(self, settled: Callable[[], LiveState], groups: ShardGroups):
        self._settled, self._groups = settled, groups
        self._consolidated: Consolidated | None = None

    def forget_consolidated(self) -> None:
        """The state is about to change."""
        self._consolidated = None

    def state_dict(self) -> dict:
        """This rank's part; all of it where :meth:`consolidate` has gathered it since the last change."""
        live = self._settled()
        consolidated = self._fresh_consolidated(live)
        if consolidated is not None and consolidated.state_dict is not None:
            return copied_containers(consolidated.state_dict)
        # The rank that holds the whole takes no part in gathering it once more.
        return live.packed(live.by_param(maker_of_parts(gatherable=consolidated is None)))

    def load(self, state_dict: dict, spikes: SpikeWatch | None) -> None:
        plan = LoadPlan(self._settled(), state_dict)
        window = None if spikes is None else spikes.checked(state_dict.get("spike_guard"))
        plan.apply()
        if spikes is not None:
            spikes.load(window)
        self._consolidated = None

    @torch.no_grad()
    def consolidate(self, to: int) -> None:
        check_rank(to, self._groups)
        live = self._settled()
        self._consolidated = None
        meet(self._groups, "consolidate_state_dict")
        self._consolidated = Consolidated.of(live, to)

    def full_state_dict(self, live: LiveState) -> dict:
        """What :meth:`consolidate` gathered on this rank.

        Raises:
            RuntimeError: nothing has been consolidated on this rank since the state last changed.
        """
        consolidated = self._fresh_consolidated(live)
        if consolidated is None or consolidated.state_dict is None:
            where = "" if consolidated is None else f" (it has, on rank {consolidated.to})"
            raise RuntimeError(
                f"the state has not been consolidated on this rank since it last changed{where}. Call "
                "consolidate_state_dict(to=...) on all ranks first, and this on that rank alone."
            )
        return copied_containers(consolidated.state_dict)

    def _fresh_consolidated(self, live: LiveState) -> Consolidated | None:
        if self._consolidated is not None and not self._consolidated.is_of(live.param_groups, live.shards):
            self._consolidated = None
        return self._consolidated
