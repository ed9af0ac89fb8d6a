"""What must not be when a step begins: each is refused by name, before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lion_dist.membership import Membership
from lion_dist.sharded_params import ShardedParams, refuse_sparse_gradients
from lion_dist.sharding.foreign_wrappers import refuse_sharded_since, refuse_wrapped
from lion_dist.unused_params import NoGradientWarning

if TYPE_CHECKING:
    from lion_dist.ddp_takeover import Takeover


class StepGuard:
    """Refuses models that somebody else reduces or replaces, and steps that would do something else than they say.

    Attributes:
        no_gradients: warns of an optimizer that trains nothing.
    """

    def __init__(self, params: ShardedParams, taken: Takeover | None):
        refuse_wrapped(params.names, params.module, None if taken is None else taken.ddp)
        if taken is not None:
            taken.check(params.names, params.groups.num_ranks)
        refuse_sparse_gradients(params.names, params.module)
        self.no_gradients = NoGradientWarning()
        self._params, self._membership = params, Membership(params.module)
        self._has_looked_for_wrappers = False  # before a step
        self._is_closed = False

    def note_params(self, groups: Sequence[dict]) -> None:
        """The present parameters of ``groups`` and of the module are those that belong."""
        self._membership.note(groups)

    def check_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether parameters have moved within the module: whoever looked at it looks again.

        Raises:
            RuntimeError: the optimizer cannot take a step.
        """
        if self._is_closed:
            raise RuntimeError("this ShardedLion has been closed: its model is no longer hooked up. Construct another.")
        self.refuse_new_wrappers()
        return self._membership.check(optimizer.param_groups)

    def refuse_new_wrappers(self) -> None:
        """Before the first step, in which every wrapper must be known that is to be."""
        if not self._has_looked_for_wrappers:
            refuse_wrapped(self._params.names, self._params.module)
            refuse_sharded_since(self._params.module_names, self._params.module)
            self._has_looked_for_wrappers = True

    def close(self) -> None:
        self._is_closed = True


def refuse_blind_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError under a scaler of torch's, which sees no gradients; and where the live state was emptied."""
    if isinstance(getattr(optimizer, "found_inf", None), int):  # torch's GradScaler summed an empty dict
        del optimizer.found_inf, optimizer.grad_scale  # which the scaler, interrupted here, would leave for later steps
        raise RuntimeError(
            "torch.amp.GradScaler found no gradients to check, for ShardedLion keeps them in shards. Use "
            "lion_dist.GradScaler, which finds them; everything else about it is torch's."
        )
    if not optimizer.state:  # torch's get_optimizer_state_dict would start it by a step of its own
        raise RuntimeError(
            "optimizer.state has been emptied, which changes nothing: ShardedLion's momentum lives in its shards. To "
            'start afresh load {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}, or construct '
            "another; optimizer.state itself must keep its entries."
        )


def refuse_bare_capture() -> None:
    """Raise RuntimeError while a CUDA graph is captured that is not ``CapturedStep``'s."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step() inside torch.cuda.graph() would leave a gather in flight that no replay waits for. Use "
            "lion_dist.CapturedStep, which captures the whole step and knows what lies between replays."
        )
