"""A sharded optimizer in the place of DDP's reducer: the loop keeps its wrapper, and nothing is sent twice.

``ShardedLion(ddp.parameters(), module=ddp)`` trains ``ddp.module``. DDP's reducer, with its hooks on the parameters and
its buckets (one more copy of all gradients), is given up for good when the optimizer has been constructed. What is left
of DDP: ``forward`` moves inputs to the device, makes buffers the first rank's as before, and calls the module;
``no_sync()`` and ``require_backward_grad_sync`` decide about the optimizer's gradients.

``find_unused_parameters``, ``static_graph`` and ``gradient_as_bucket_view`` are settings of the reducer and mean
nothing afterwards: an unused parameter is never an error. What the optimizer cannot take over is refused by name.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from lion_dist.sharding.scheduler import GradScheduler

GONE = (
    "The reducer of this DistributedDataParallel has been replaced by a ShardedLion{}. Wrap ddp.module in a new "
    "DistributedDataParallel to train it without one."
)


class DDPWithoutReducer(DistributedDataParallel):
    """What a DistributedDataParallel becomes by :class:`Takeover`; never constructed."""

    _grad_scheduler: weakref.ref[GradScheduler]

    @property
    def syncs_buffers(self) -> bool:
        """Whether ``forward`` makes buffers the first rank's."""
        is_on = getattr(self, "forward_sync_buffers", None)  # broadcast_buffers until torch 2.12
        return bool(self.modules_buffers) and bool(self.broadcast_buffers if is_on is None else is_on)

    def forward(self, *inputs, **kwargs):
        """Call the module as DDP does; gradients are the optimizer's."""
        scheduler = self._grad_scheduler()
        if torch.is_grad_enabled() and (scheduler is None or scheduler.is_closed):
            raise RuntimeError(GONE.format(", which has been closed: gradients would stay on their ranks"))
        if self._check_sync_bufs_pre_fwd():
            self._sync_buffers()
        self.require_forward_param_sync = torch.is_grad_enabled() and self.require_backward_grad_sync
        if self.device_ids:
            moved, moved_kwargs = self.to_kwargs(inputs, kwargs, self.device_ids[0])
            inputs, kwargs = moved[0], moved_kwargs[0]
        return self.module(*inputs, **kwargs)

    @property
    def require_backward_grad_sync(self) -> bool:
        """False inside ``no_sync()``; some programs set it themselves."""
        scheduler = self._grad_scheduler()
        return scheduler is None or not scheduler.in_no_sync

    @require_backward_grad_sync.setter
    def require_backward_grad_sync(self, is_required: bool) -> None:
        scheduler = self._grad_scheduler()
        if scheduler is not None:
            scheduler.in_no_sync = not is_required

    @property
    def reducer(self):
        """Whatever else DDP does with it, such as registering a communication hook, is refused here."""
        raise RuntimeError(GONE.format(""))

    logger = reducer  # pyrefly: ignore[bad-assignment] # DDP's attribute, refused as well

    def __getstate__(self) -> dict:
        vars(self).update(reducer=None, logger=None)  # which DDP's own leaves out
        try:
            state = super().__getstate__()
        finally:
            del vars(self)["reducer"], vars(self)["logger"]
        del state["_grad_scheduler"]
        return state

    def __reduce_ex__(self, _protocol):
        """A copy is an ordinary DDP with a reducer of its own, as a copied module is an ordinary module."""
        return copyreg.__newobj__, (DistributedDataParallel,), self.__getstate__()


_wrapper_of: weakref.WeakKeyDictionary[GradScheduler, weakref.ref[DDPWithoutReducer]] = weakref.WeakKeyDictionary()


def wrapper_of(scheduler: GradScheduler) -> DDPWithoutReducer | None:
    """The wrapper whose reducer ``scheduler`` has replaced."""
    found = _wrapper_of.get(scheduler)
    return None if found is None else found()


@dataclass(frozen=True)
class Takeover:
    """What becomes of ``ddp`` when a sharded optimizer is constructed over it."""

    ddp: DistributedDataParallel

    @classmethod
    def of(cls, module: nn.Module) -> Takeover | None:
        """None for a subclass, which may do more than DDP, and for any other module."""
        return cls(module) if type(module) in (DistributedDataParallel, DDPWithoutReducer) else None

    def check(self, params: Mapping[Parameter, str], num_ranks: int) -> None:
        """Raise ValueError when ``ddp`` does what the optimizer would not do.

        Args:
            params: of the optimizer.
            num_ranks: that the optimizer reduces gradients over.
        """
        if self.ddp.process_group.size() != num_ranks:
            raise ValueError(
                f"DistributedDataParallel reduces gradients over {self.ddp.process_group.size()} ranks, and "
                f"ShardedLion over {num_ranks}. Pass the same ranks as process_group to both, or leave ShardedLion's "
                "out."
            )
        named = self.ddp.module.named_parameters()
        left = [name for name, param in named if param.requires_grad and param not in params]
        if left:
            raise ValueError(
                f"ShardedLion(..., module=ddp) takes the place of DDP's reducer, but {len(left)} parameters of the "
                f"model that take gradients are not among the optimizer's (first: {left[0]!r}): nobody would reduce "
                "theirs. Pass all of them (param groups may differ in lr), or freeze the others by "
                "requires_grad_(False)."
            )
        if type(self.ddp) is DDPWithoutReducer:
            return  # the rest has been looked at
        found = next((what for what, is_used in _what_else(self.ddp).items() if is_used), None)
        if found is not None:
            raise ValueError(
                f"the DistributedDataParallel that is passed as module has {found}, which ShardedLion cannot take over "
                "from its reducer. Construct DistributedDataParallel without it, or pass the bare module and call that."
            )

    def take_over(self, scheduler: GradScheduler) -> None:
        """From here on ``scheduler`` takes the gradients, and ``ddp`` reduces none. Its buckets' memory is free."""
        ddp = self.ddp
        if type(ddp) is not DDPWithoutReducer:
            ddp._remove_autograd_hooks()
            required = vars(ddp).pop("require_backward_grad_sync")
            del vars(ddp)["reducer"], vars(ddp)["logger"]
            ddp.__class__ = DDPWithoutReducer
            scheduler.in_no_sync = not required
        vars(ddp)["_grad_scheduler"] = weakref.ref(scheduler)
        _wrapper_of[scheduler] = weakref.ref(ddp)


def _what_else(ddp: DistributedDataParallel) -> dict[str, bool]:
    remedy = "(ShardingConfig(reduce_dtype=torch.bfloat16) sends less)"
    hook = ddp._get_ddp_logging_data().get("comm_hook")
    return {
        f"a communication hook {remedy}": bool(hook or ddp._comm_hooks),
        "a communication hook for buffers": hasattr(ddp, "buffer_hook"),
        "mixed_precision": ddp.mixed_precision is not None,
        "delay_all_reduce_named_params": bool(ddp._delay_all_reduce_params),
        "parameters or buffers to ignore": bool(ddp.parameters_to_ignore),
        'a reducer in Python (torch._dynamo.config.optimize_ddp="python_reducer")': ddp._use_python_reducer,
    }
