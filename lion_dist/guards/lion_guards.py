"""What ``Lion`` refuses or warns of beside what it checks of each tensor (``param_checks.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.parameter import is_lazy

from lion_dist.guards.hidden_tensors import refuse_hidden
from lion_dist.guards.unused_params import NoGradientWarning
from lion_dist.local_shard import local_tensor

if TYPE_CHECKING:
    from lion_dist.lion import Lion


class LionGuards:
    """Knows the parameters that ``optimizer`` was given, to tell them from what an engine puts in their place.

    Args:
        groups: that it has already.
    """

    def __init__(self, optimizer: Lion, groups: Sequence[dict]):
        self._optimizer, self._no_gradients = optimizer, NoGradientWarning()
        self._given = {id(param) for group in groups for param in group["params"]}

    def add_group(self, group: dict) -> None:
        """Note the parameters of a new param group, and :meth:`check_group` them."""
        self._given.update(map(id, group["params"]))
        self.check_group(group, is_first_step=False)

    def check_group(self, group: dict, is_first_step: bool) -> None:
        """Raise ValueError where an engine hides of a group's parameters what this optimizer needs to know."""
        rule, guard = self._optimizer.rule, self._optimizer.skip_spikes
        if rule.is_cautious or rule.ema_decay is not None or guard is not None:
            refuse_hidden(self._optimizer, group, rule, guard, self._given, is_first_step)

    def note_step(self, any_gradients: bool) -> None:
        """Warn of steps that train nothing and were to: with a learning rate, and parameters on this rank."""
        if not self._no_gradients.is_waiting:
            return
        groups = self._optimizer.param_groups
        if not any(isinstance(group["lr"], Tensor) or group["lr"] for group in groups):
            return  # torch.distributed.checkpoint makes state by such a step, with gradients of its own
        params = [param for group in groups for param in group["params"]]
        if any_gradients or any(is_lazy(p) or local_tensor(p).numel() for p in params):
            self._no_gradients.note_step(any_gradients)
