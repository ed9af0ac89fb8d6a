"""Ranks with different numbers of batches, by torch's ``Join``: who has none left takes part with zeros.

    with Join([UnevenInputs(opt, max_norm=1.0)]):
        for batch in batches:
            model(batch).backward()
            opt.clip_grad_norm_(1.0)
            opt.step()

Before each forward with gradients a rank says that it has one more, and what its optimizer multiplies with; a rank that
has left its loop then runs a backward without a batch, and a step where the others take one, with their learning rate.
Gradients are averaged over all ranks, also those that have none (``divide_by_initial_world_size=True``, as DDP does).

Without ``Join`` a program can do the same itself: every rank calls ``step()`` equally often, with or without a batch.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from lion_dist import values
from lion_dist.ddp_takeover import wrapper_of
from lion_dist.sharded_lion import ShardedLion
from lion_dist.sharding import collectives
from lion_dist.sharding.forward_hooks import OwnModelHook

HYPERPARAMETERS = ("lr", "weight_decay")


class UnevenInputs(Joinable):
    """What ``torch.distributed.algorithms.Join`` takes in the place of a :class:`lion_dist.ShardedLion`.

    Args:
        optimizer: constructed with ``module``, whose forward comes before each backward.
        max_norm: that the loop passes to ``clip_grad_norm_``; None: it does not clip.
        micro_batches: forward passes in a step. Those inside ``no_sync()`` are noticed.

    Raises:
        ValueError: the optimizer has no module, updates in backward, or has replicas of its shards; or DDP around the
            module sends buffers.
    """

    def __init__(self, optimizer: ShardedLion, *, max_norm: float | None = None, micro_batches: int = 1):
        super().__init__()
        values.instance("optimizer", optimizer, ShardedLion, "Pass the optimizer of the loop.")
        if max_norm is not None:
            max_norm = values.number("max_norm", max_norm, "above 0", above=0.0, remedy="Pass the loop's, or None.")
        expected, remedy = "at least 1", "Pass the number of forward passes in a step."
        self._micro_batches = values.whole_number("micro_batches", micro_batches, expected, least=1, remedy=remedy)
        self._optimizer, self._max_norm = optimizer, max_norm
        self._passes = 0  # forward passes of this rank, and those that it has matched
        self._module = _module_of(optimizer)
        self._module.register_forward_pre_hook(_BeforeForward(weakref.ref(self)))

    # ---- what Join asks for

    def join_hook(self, divide_by_initial_world_size: bool = True, **_kwargs) -> JoinHook:
        if not divide_by_initial_world_size:
            raise ValueError(
                "divide_by_initial_world_size=False: ShardedLion averages over all of its ranks. Leave it True, or "
                "divide by what you count: opt.set_grad_divisor(samples_over_all_ranks), without Join."
            )
        self._passes = 0
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        return self._optimizer.counters.device

    @property
    def join_process_group(self):
        return self._optimizer.groups.shard_group

    # ---- on a rank that has a batch

    def before_forward(self) -> None:
        """Say that this rank has one more batch, and what its optimizer multiplies with."""
        if self._join_config.enable and torch.is_grad_enabled():
            work = Join.notify_join_context(self)
            if work is not None:
                work.wait()
            self._passes += 1
            self._exchange(self._own_message())

    # ---- on a rank that has none

    def match_pass(self) -> None:
        """Take part in what the others do from one forward to the next."""
        opt = self._optimizer
        self._passes += 1
        own = self._own_message()
        message = self._exchange(torch.full_like(own, -torch.inf))
        for group, lr_and_decay in zip(opt.param_groups, message[1:].view(-1, len(HYPERPARAMETERS)), strict=True):
            for name, value in zip(HYPERPARAMETERS, lr_and_decay, strict=True):
                if isinstance(group[name], Tensor):
                    group[name].copy_(value)
                else:
                    group[name] = value.item()
        if message[0].item():
            with opt.no_sync():
                opt.backward_without_batch()
        else:
            opt.backward_without_batch()
        if self._passes % self._micro_batches == 0:
            if self._max_norm is not None:
                opt.clip_grad_norm_(self._max_norm)
            opt.step()

    def _own_message(self) -> Tensor:
        """[1 + 2 * param groups] fp64 on the device: inside no_sync(); lr and weight decay of each group."""
        numbers = [float(self._optimizer.grad_scheduler.in_no_sync)]
        numbers += [group[name] for group in self._optimizer.param_groups for name in HYPERPARAMETERS]
        return torch.stack([torch.as_tensor(x, dtype=torch.float64).to(self.join_device).reshape(()) for x in numbers])

    def _exchange(self, message: Tensor) -> Tensor:
        """The message of those that have a batch, which all say the same."""
        collectives.all_reduce_max(message, self.join_process_group)
        return message


class _BeforeForward(OwnModelHook):
    def __call__(self, _module, _args) -> None:
        inputs = None if self.hooks is None else self.hooks()  # pyrefly: ignore[not-callable] # a weak reference
        if inputs is not None:
            inputs.before_forward()


class _Shadow(JoinHook):
    def __init__(self, inputs: UnevenInputs):
        self._inputs = inputs

    def main_hook(self) -> None:
        self._inputs.match_pass()


def _module_of(optimizer: ShardedLion) -> torch.nn.Module:
    module = optimizer._params.module
    if module is None or optimizer.sharding.update_in_backward or len(optimizer.groups.axes) > 1:
        raise ValueError(
            "Join needs a ShardedLion that was constructed with module=model, without update_in_backward, and with one "
            "group of ranks (no replicas of shards). Otherwise let all ranks call step() equally often: one without a "
            "batch takes part with zeros."
        )
    wrapper = wrapper_of(optimizer.grad_scheduler)
    if wrapper is not None and wrapper.syncs_buffers:
        raise ValueError(
            "DistributedDataParallel sends the model's buffers before each forward, and a rank without a batch runs "
            "none. Construct it with broadcast_buffers=False, and call opt.broadcast_buffers() on all ranks afterwards."
        )
    return module
