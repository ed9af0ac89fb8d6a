"""What a program calls on a sharded optimizer beside ``step()``: its gradients, parameters and state.

Nothing here knows the update. ``sharded_lion.py`` has the step, and makes what is asked here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lion_dist import values
from lion_dist.averages import KIND as AVERAGE
from lion_dist.full_params import FullParams
from lion_dist.observers import StepObservers, copies_of
from lion_dist.param_sync import GatherParams
from lion_dist.shard_builder import ShardBuilder
from lion_dist.shard_state import ShardState
from lion_dist.sharded_averages import HoldsAverages
from lion_dist.sharded_params import ShardedParams
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.process_groups import Progress, ShardGroups, explained
from lion_dist.sharding.scheduler import GradScheduler
from lion_dist.state_dict.access import StateAccess
from lion_dist.state_dict.live_state import LiveState
from lion_dist.step_gradients import StepGradients
from lion_dist.step_rule import not_guarded
from lion_dist.update_terms import GroupScalars

if TYPE_CHECKING:
    from lion_dist.composed.axes import ModelAxes
    from lion_dist.optional_guards import Guards


class ShardedOptimizer(HoldsAverages, Optimizer):
    """The calls between steps. Attributes are made by ``ShardedLion``."""

    groups: ShardGroups
    shards: list[ShardState]
    grad_scheduler: GradScheduler
    guards: Guards
    _builder: ShardBuilder
    _counters: Tensor
    _full_params: FullParams
    _gradients: StepGradients
    _observers: StepObservers
    _params: ShardedParams
    _progress: Progress
    _scalars: GroupScalars
    _states: StateAccess

    def _forget_step(self) -> None:
        raise NotImplementedError

    @property
    def buckets(self) -> list[Bucket]:
        return [shard.bucket for shard in self.shards]

    @property
    def metrics_every(self) -> int:
        return self._observers.metrics_every

    @property
    def _loss_scale(self) -> Tensor | None:
        """[] on the device; set by GradScaler around ``step()``, unless it has unscaled."""
        return getattr(self, "grad_scale", None)

    def __getstate__(self) -> dict:
        raise TypeError(
            "ShardedLion cannot be copied or pickled: it is tied to process groups and to the model's memory. Save "
            "its state_dict() with torch.distributed.checkpoint and construct another."
        )

    # ---- gradients

    @explained("clip_grad_norm_()")
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the global norm of this step's gradients; the next ``step()`` applies it.

        Returns:
            [] fp32 on the device: the norm before clipping, over all ranks and parameters.
        """
        remedy = "Pass the largest norm that a step may have, such as 1.0."
        max_norm = values.number("max_norm", max_norm, "above 0", above=0.0, remedy=remedy)
        self._gradients.check()
        return self._gradients.gradient_check.clip(max_norm, self._loss_scale)

    @explained("grad_norm()")
    def grad_norm(self) -> Tensor:
        """[] fp32 on the device: the global norm of this step's gradients, averaged and unscaled, before clipping."""
        self._gradients.check()
        return self._gradients.gradient_check.norm(self._loss_scale)

    @explained("GradScaler.unscale_()")
    def unscale_and_check_(self, inverse_loss_scale: Tensor, loss_scale: Tensor | None = None) -> Tensor:
        """For ``lion_dist.GradScaler``: multiply gradients by ``inverse_loss_scale`` in the next step.

        ``loss_scale``: the scaler's, which ranks compare, whether this call unscales by it or ``step()``.

        Returns:
            [] fp32 on the device: 1 when a gradient is not finite on any rank.
        """
        values.instance("inverse_loss_scale", inverse_loss_scale, Tensor, "Use lion_dist.GradScaler, which passes it.")
        values.scalar_tensor("inverse_loss_scale", inverse_loss_scale)
        check = self._gradients.gradient_check
        check.inverse_loss_scale, check.scaler_scale = inverse_loss_scale, loss_scale
        return self._gradients.check().skip

    def observe(self, loss: Tensor) -> None:
        """Hand over the loss of this rank's batch, a tensor on the device: ``skip_spikes`` judges the next step by the
        mean over all ranks, too, beside the gradient norm. All ranks do so, or none."""
        if self._gradients.spikes is None:
            raise not_guarded()
        self._gradients.spikes.observe(loss)

    def set_grad_divisor(self, count: float | Tensor) -> None:
        """Divide this step's summed gradients by ``count`` (say, its tokens over all ranks) instead of the ranks.

        Call it before ``clip_grad_norm_`` and ``step``; it holds for one step. A tensor is not read by the host.
        """
        self._gradients.gradient_check.set_divisor(count)

    def full_grad(self, param: Parameter) -> Tensor:
        """The gradient that ``step()`` will use for ``param``, whole, on every rank. All ranks call it together.

        It is summed over ranks and micro-batches, averaged (or divided as :meth:`set_grad_divisor` says), and unscaled
        once GradScaler has unscaled; not clipped: the unit of :meth:`grad_norm`. Zeros where no rank has a gradient.

        Returns:
            fp64, so that :meth:`set_full_grad` of what was read changes no bit of the sum; a copy.
        """
        return self._gradients.read(param)

    def set_full_grad(self, param: Parameter, grad: Tensor) -> None:
        """Let the next ``step()`` use ``grad`` for ``param``, in the unit of :meth:`full_grad`.

        All ranks call it together, with the same ``grad``, after the last backward of the step and before
        :meth:`clip_grad_norm_`. The parameter counts as used. It is kept in fp32, or in the dtype of the wire where
        that carries one micro-batch's 16-bit sums.

        Raises:
            RuntimeError: gradients have been clipped already, by a norm that does not know of ``grad``.
        """
        self._gradients.write(param, grad)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside add up gradients locally (stage 1) and send nothing.

        Stage 2 reduces them all the same: keeping them would be the full gradient that it exists to avoid. So one
        training loop serves both stages.
        """
        before, self.grad_scheduler.in_no_sync = self.grad_scheduler.in_no_sync, True
        try:
            yield
        finally:
            self.grad_scheduler.in_no_sync = before

    @explained("backward_without_batch()")
    def backward_without_batch(self) -> None:
        """This rank has no micro-batch where others run one more backward: it takes part with zeros.

        Needed only when ranks run different numbers of synchronized backward passes within one step; a rank that
        runs none just calls ``step()``. What the program has written into ``p.grad`` takes part instead of zeros, so
        that all ranks can add gradients of their own after backward by calling it.
        """
        self.grad_scheduler.join_backward()

    @explained("zero_grad()")
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget this step's gradients and divisor. It does not wait for parameters in flight: it touches none.

        After an exception anywhere in a step, all ranks call it and go on: an update that was under way is ended by
        gathering all parameters anew, so replicas agree, but a part of them may have been updated.
        """
        if not values.flag("set_to_none", set_to_none):
            raise ValueError("ShardedLion keeps no full gradients to zero: call zero_grad() with set_to_none=True")
        try:
            self._forget_step()
        finally:
            self.grad_scheduler.reset()
        for param in self._params.frozen:
            param.grad = None
        for left_by_scaler in ("grad_scale", "found_inf"):  # by one whose step() was interrupted
            self.__dict__.pop(left_by_scaler, None)
        self._full_params.gather_what_was_interrupted()

    # ---- parameters

    @explained("finish_param_sync()")
    def finish_param_sync(self) -> None:
        """Whatever follows may read every parameter of the model."""
        self._full_params.finish_sync()

    @explained("refresh_main_params()")
    def refresh_main_params(self) -> None:
        """Make main params follow parameters that were written through ``.data``, which leaves no trace.

        ``load_state_dict``, ``copy_`` and other in-place operations are noticed without this call.
        """
        self._full_params.sync_main_params()

    @explained("close()")
    def close(self) -> None:
        """Let go of the model: parameters are whole, hooks are removed, gradients stay with autograd.

        The optimizer takes no step afterwards; another can be constructed over the same parameters.
        """
        self._full_params.close()
        self.grad_scheduler.close()
        self._params.own_groups.give_back()
        self.guards.close()

    @torch.no_grad()
    @explained("broadcast_buffers()")
    def broadcast_buffers(self) -> None:
        """Make the module's buffers (such as BatchNorm's running statistics) the first rank's, on every rank.

        All ranks call it together: before they evaluate, and before they save a checkpoint, which holds the first
        rank's, and all ranks get those at a resume. In between, each rank's buffers follow its own batches.

        Raises:
            RuntimeError: no ``module`` was given.
        """
        if self._params.module is None:
            raise RuntimeError("broadcast_buffers() needs the model: construct ShardedLion with module=model")
        for buffer in self._params.module.buffers():
            self.groups.broadcast(buffer)

    @explained("check_replicas()")
    def check_replicas(self) -> None:
        """Compare checksums of all ranks' parameters, and wait for the result. All ranks call it together.

        Raises:
            ReplicaError: on every rank, naming who differs from the owner in which bucket and parameters.
        """
        self._settled_state()
        self._observers.check_replicas()

    @explained("resync_params()")
    def resync_params(self) -> None:
        """Replace every rank's parameters by their owners': the repair after a ``ReplicaError``. All ranks call it.

        Where shards have replicas (hybrid sharding), momentum and main params become the first replica's too.
        """
        self._full_params.resync()
        for _, param, groups in copies_of(self._params, self.buckets)[1]:
            groups.broadcast(param.data)

    # ---- what CapturedStep asks for

    @contextlib.contextmanager
    def capturing(self, strategy: GatherParams) -> Iterator[None]:
        """A step inside begins with the gather, and leaves parameters to ``strategy``."""
        with self._full_params.synced_by(strategy):
            self._full_params.start_sync()
            yield

    def before_replay(self) -> None:
        """Main params follow parameters that somebody else has written since the last step."""
        self._full_params.follow_outside_writes(self.shards)

    def after_replay(self) -> None:
        """A captured step has updated the shards."""
        self._states.forget_consolidated()
        self._full_params.leave_stale()

    # ---- what there is

    def skipped_steps(self) -> int:
        """Steps skipped, for a gradient that was not finite or for a spike. Waits for the device."""
        return int(self._counters[1])

    def taken_steps(self) -> int:
        """Steps that changed weights. Waits for the device."""
        return int(self._counters[0])

    @explained("metrics()")
    def metrics(self) -> dict:
        """What the last measured step did, over all ranks; ``docs/metrics.md`` defines every key.

        All ranks call it together. It waits for the device, and ranks exchange one short message. Before the first
        measured step ``step`` is 0 and norms, shares and times are NaN.

        Raises:
            RuntimeError: ``metrics_every`` is 0.
        """
        spikes = {} if self._gradients.spikes is None else self._gradients.spikes.report()
        return self._observers.metrics() | {"skipped_steps": self.skipped_steps()} | spikes

    def memory_bytes(self) -> dict[str, int]:
        """Bytes on this rank by kind, counted from the tensors. ``grads``: grad shards and the pooled buffers."""
        kinds = [shard.memory_bytes() for shard in self.shards]
        averages = [] if self._builder.ema_decay is None else [AVERAGE]
        keys = ("params", "main_params", "exp_avg", *averages, "grads")
        total = {key: sum(kind[key] for kind in kinds) for key in keys}
        total["params"] += sum(p.nbytes for p in self._params.frozen)
        total["grads"] += self._builder.pooled_nbytes
        return total

    @property
    def parts(self) -> ModelAxes | None:
        """The ranks that hold other parts of the model; for checkpoints."""
        return self._params.parts

    # ---- state_dict: this rank's part in torch's format (``state_dict/``), or on one rank the whole

    @property
    def counters(self) -> Tensor:
        """[2] int64 on the device, live: steps taken, steps skipped."""
        return self._counters

    @property
    def spike_window(self) -> Tensor | None:
        """[2 * window + 5] fp64 on the device, live: the state of ``skip_spikes``."""
        return None if self._gradients.spikes is None else self._gradients.spikes.state

    @property
    def _live_state(self) -> LiveState:
        counters, decoupled_from = self._counters, self._scalars.decoupled_from
        names = self._params.names
        return LiveState(self.param_groups, self.shards, names, counters, decoupled_from, self.spike_window)

    def _settled_state(self) -> LiveState:
        """Return the live state, once parameters are whole and main params follow them."""
        self._full_params.finish_sync()
        self._full_params.follow_outside_writes(self.shards)
        return self._live_state

    @explained("state_dict()")
    def state_dict(self) -> dict:
        """This rank's part of the state; between :meth:`consolidate_state_dict` and the next step, on its rank, all.

        ``{"state": {i: {"exp_avg": ..., "main_param": ..., "step": ...}}, "param_groups": [...], "counters": ...}``,
        where ``i`` counts parameters as in torch. On one rank values are tensors. On several they are
        :class:`BoxedTensor`: views of the live shards, so that loading into them loads the optimizer. They have the
        parameter's full shape, depend on neither ranks nor buckets, and are what torch.distributed.checkpoint and its
        ``get_optimizer_state_dict`` take. Pickling them is refused: see ``lion_dist.this_ranks_part``.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        result = self._states.state_dict()
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, result)
            result = result if changed is None else changed
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take a :meth:`state_dict` of this rank, or a full one, of which each rank takes its slices.

        A full one is :meth:`full_state_dict` or that of ``Lion`` or lion-pytorch's Lion, of any number of ranks. Load
        the model first. The keys of param groups stay those of a fresh optimizer, except for schedulers' own.

        Raises:
            ValueError: another rank's part, other parameters, shapes or settings; nothing is changed.
        """
        if isinstance(state_dict, Mapping):
            state_dict = dict(state_dict)
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                changed = hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
        self._states.load(state_dict, self._gradients.spikes)
        self.keep_averages()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @explained("consolidate_state_dict()")
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state in host memory of one rank. All ranks call it together.

        Until the next step :meth:`full_state_dict` and :meth:`state_dict` return it there. Other ranks hold one bucket
        at a time. Parameters with a ``process_group`` of their own (experts) are those of the group of ``to``.

        Args:
            to: a global rank.

        Raises:
            ValueError: no such rank. RuntimeError: other ranks do not call it.
        """
        self._states.consolidate(to)

    def full_state_dict(self) -> dict:
        """What :meth:`consolidate_state_dict` gathered on this rank, in the format of plain ``Lion``: tensors in host
        memory by number of the parameter, groups with ``param_names``. ``Lion``, lion-pytorch's Lion and
        :meth:`load_state_dict` on any number of ranks take it.

        Raises:
            RuntimeError: nothing has been consolidated on this rank since the last step.
        """
        return self._states.full_state_dict(self._live_state)
