"""What ``ShardedLion`` refuses or warns of: each by name, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import Parameter

from lion_dist.guards.agreement import check_agreement
from lion_dist.guards.foreign_wrappers import find_wrapper, refuse_late_grads, refuse_sharded_since, refuse_wrapped
from lion_dist.guards.membership import Membership
from lion_dist.guards.memory_checks import check_memory, refuse_tied_memory, warn_of_loss
from lion_dist.guards.own_groups import OwnGroups
from lion_dist.guards.step_agreement import StepAgreement
from lion_dist.guards.step_choices import RankChoices
from lion_dist.guards.unused_params import NoGradientWarning
from lion_dist.local_shard import local_tensor
from lion_dist.sharded_params import ShardedParams, clean_name
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.grad_norm import GradNorm
from lion_dist.sharding.process_groups import Progress

if TYPE_CHECKING:
    from lion_dist.ddp_takeover import Takeover
    from lion_dist.optional_guards import BorrowedGroups
    from lion_dist.sharded_lion import ShardedLion
    from lion_dist.step_gradients import StepGradients


class ShardedGuards:
    """Refuses models that somebody else reduces or replaces, and steps that would do something else than they say.

    Args:
        choices: of the optimizer, which have to be the same on all ranks.

    Attributes:
        agreement: compares in every step what ranks multiply with and train; made by :meth:`watch`.
    """

    agreement: StepAgreement

    def __init__(self, optimizer: ShardedLion, params: ShardedParams, choices: tuple):
        self._optimizer, self._params, self._choices = optimizer, params, choices
        self._membership, self._no_gradients = Membership(params.module), NoGradientWarning()
        self._is_constructed = False  # or about to be: the first param groups are known
        self._has_looked_for_wrappers = False  # before a step
        self._is_closed = False

    # ---- construction, and param groups that are added later

    def check_group(self, group: dict) -> None:
        """Raise TypeError or ValueError unless the parameters of ``group``, one by one checked, can be trained here."""
        names = self._params.names_of(group)
        self._check_memory({n: p for n, p in zip(names, group["params"], strict=True) if p.requires_grad})
        if self._is_constructed:
            refuse_wrapped(group["params"], None)
            self.check_agreement([group])

    def check_model(self, taken: Takeover | None) -> None:
        """Raise unless the optimizer alone reduces the gradients; ``taken``: what becomes of DDP's reducer."""
        names, module = self._params.names, self._params.module
        refuse_wrapped(names, module, None if taken is None else taken.ddp)
        if taken is not None:
            taken.check(names, self._params.groups.num_ranks)
        refuse_sparse_gradients(names, module)
        self._is_constructed = True

    def borrow_groups(self, progress: Progress) -> BorrowedGroups:
        """Process groups in which nobody else's collectives run."""
        return OwnGroups(self._optimizer, progress)

    def check_agreement(self, groups: list[dict]) -> None:
        """Raise ValueError on every rank unless ``groups`` and the optimizer's choices are the same on all."""
        check_agreement(self._params, self._choices, groups)

    def watch(self, gradients: StepGradients, norm: GradNorm) -> None:
        """Ranks compare what the steps of ``gradients`` are made with, in the message of ``norm``."""
        choices = RankChoices(self._optimizer, self._params, gradients)
        self.agreement = StepAgreement(norm.choosing_ranks, norm.device, choices)

    def note_params(self) -> None:
        """The present parameters of the param groups and of the module are those that belong."""
        self._membership.note(self._optimizer.param_groups)

    def find_wrapper(self) -> str | None:
        """Name who else reduces gradients of the optimizer's parameters."""
        return find_wrapper(self._params.names, None)

    # ---- gradients

    def before_reducing(self) -> None:
        """Before the first step, in which every wrapper must be known that is to be."""
        if not self._has_looked_for_wrappers:
            refuse_wrapped(self._params.names, self._params.module)
            refuse_sharded_since(self._params.module_names, self._params.module)
            self._has_looked_for_wrappers = True

    def check_unfrozen(self, params: Sequence[Parameter]) -> None:
        """Raise unless ``params``, which are to get buckets now, are the same on all ranks and can move there."""
        self.agreement.wait()
        if params:
            self._check_memory({self._params.names[param]: param for param in params})

    def refuse_late_grads(self) -> None:
        """Raise RuntimeError where a parameter has a gradient after those of the step were reduced."""
        refuse_late_grads(self._params.names, self._params.module)

    def check_updated(self, begun: set[Bucket]) -> None:
        """:meth:`refuse_late_grads`, and :meth:`note_step`, where backward has updated the buckets ``begun``."""
        names = self._params.names
        refuse_late_grads({p: names[p] for bucket in begun for p in bucket.params}, self._params.module)
        if self._no_gradients.is_waiting:
            self._no_gradients.note_step(bool(begun) or any(param.grad is not None for param in names))

    # ---- memory

    def _check_memory(self, params: dict[str, Parameter]) -> None:
        """Raise ValueError unless ``params``, which are about to get buckets, can move there."""
        module = self._params.module
        others = {name: param for param, name in (self._params.module_names | self._params.names).items()}
        if module is not None:
            others |= {f"buffer {clean_name(name)}": buffer for name, buffer in module.named_buffers()}
        for dtype in dict.fromkeys(param.dtype for param in params.values()):
            alike = {name: local_tensor(param) for name, param in params.items() if param.dtype == dtype}
            everything = {name: local_tensor(param) for name, param in (others | params).items()}
            check_memory(alike, everything, row_major=self._params.precision.is_stochastic(dtype))

    def check_moved(self, bucket: Bucket, moved: Sequence[int], buckets: Sequence[Bucket]) -> None:
        """Raise RuntimeError where one of the parameters ``moved`` of ``bucket`` has the memory of another of
        ``buckets``, and warn of what they lose when they are taken back."""
        refuse_tied_memory(bucket, moved, buckets)
        warn_of_loss(bucket, moved)

    # ---- steps

    def before_closure(self) -> None:
        """Raise RuntimeError under a scaler of torch's, and where the live state was emptied."""
        refuse_blind_scaler(self._optimizer)

    def check_step(self, leaves_gathers: bool) -> bool:
        """Whether parameters have moved within the module: whoever looked at it looks again.

        Args:
            leaves_gathers: the step will leave some in flight.

        Raises:
            RuntimeError: the optimizer cannot take a step.
        """
        if leaves_gathers and self._params.first_device().type == "cuda":
            refuse_bare_capture()
        if self._is_closed:
            raise RuntimeError("this ShardedLion has been closed: its model is no longer hooked up. Construct another.")
        self.before_reducing()
        return self._membership.check(self._optimizer.param_groups)

    def note_step(self, buckets: Sequence[Bucket]) -> None:
        """Warn of an optimizer that trains nothing."""
        if self._no_gradients.is_waiting:
            self._no_gradients.note_step(any(any(bucket.used) for bucket in buckets))

    def end_step(self) -> None:
        self.agreement.end_step()

    def close(self) -> None:
        self._is_closed = True


def refuse_sparse_gradients(names: Mapping[Parameter, str], module: nn.Module | None) -> None:
    """Raise TypeError when a layer of ``module`` gives one of the parameters sparse gradients."""
    for layer in [] if module is None else module.modules():
        weight = layer.weight if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse else None
        if weight in names and weight.requires_grad:
            raise TypeError(
                f"the gradient of {names[weight]!r} is sparse, and Lion has no sparse update. Use "
                f"nn.{type(layer).__name__}(sparse=False): untouched rows stay where they are without it too."
            )


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
