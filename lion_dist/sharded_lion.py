"""``ShardedLion``: ZeRO stages 1 and 2. Where the update without ranks and the ranks without Lion meet.

Alternatives considered:

* One flat buffer for the whole model: no overlap, and nothing can start before the last gradient.
* ``p.grad`` as views of the grad buffer: autograd then adds into zeroed memory, 8 bytes a parameter where one fused
  copy moves 4, and ``zero_grad(set_to_none=True)`` silently breaks the views.
* Parameters of ``param_groups`` replaced by shard parameters (as DeepSpeed does): GradScaler would see gradients, but
  every other user of ``param_groups`` would see tensors that the model does not have.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter
from torch.optim import Optimizer

from lion_dist import values
from lion_dist.backward_step import BackwardStep
from lion_dist.config import PrecisionPolicy, ShardingConfig, check_interval, check_policy, check_sharding
from lion_dist.full_params import FullParams
from lion_dist.full_state import maker_of_parts
from lion_dist.hyperparameters import check_hyperparameters, decoupling_lr
from lion_dist.kernels.reference import skip_unusable
from lion_dist.kernels.update import choose_backend
from lion_dist.observers import StepObservers, copies_of
from lion_dist.param_sync import GatherParams
from lion_dist.shard_builder import ShardBuilder
from lion_dist.shard_state import BucketShard, ShardBatch, UpdateOrder
from lion_dist.sharded_params import ShardedParams
from lion_dist.sharding.agreement import check_ranks_agree
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.buffers import CommStream
from lion_dist.sharding.foreign_wrappers import refuse_wrapped
from lion_dist.sharding.forward_hooks import ForwardHooks
from lion_dist.sharding.own_groups import OwnGroups
from lion_dist.sharding.process_groups import Progress, ShardGroups, explained, resolve_groups
from lion_dist.sharding.scheduler import GradScheduler
from lion_dist.sharding.verdict import Judge, Verdict
from lion_dist.state_access import StateAccess
from lion_dist.state_dicts import LiveState
from lion_dist.step_gradients import StepGradients, choose_sum_of_squares
from lion_dist.step_guard import StepGuard, refuse_bare_capture, refuse_blind_scaler
from lion_dist.update_terms import GroupScalars, UpdateTerms, cautious_lrs

logger = logging.getLogger(__name__)


class ShardedLion(Optimizer):
    """Lion with its state sharded over ranks, for a replicated ``nn.Module`` on 1 to N ranks.

    Each rank keeps the momentum (and main params) of 1/N of the elements, updates those, and gathers the others'.
    Gradients are reduced to their owners from within backward; the gather overlaps the next forward when ``module``
    is given and is complete when ``step()`` returns otherwise.

    After backward ``p.grad`` is None, for the gradients live in shards: use :meth:`clip_grad_norm_` and
    :meth:`grad_norm`, which see all of them; :meth:`full_grad` and :meth:`set_full_grad` are for one parameter's.
    ``torch.nn.utils.clip_grad_norm_`` sees nothing: it returns 0 and clips nothing. Gradients that the program writes
    into ``p.grad`` count, unless it does so after backward has reduced them: ``step()`` raises then.

    Args:
        params: parameters, (name, parameter) pairs or param groups with their own ``lr``, ``betas``,
            ``weight_decay`` and ``process_group`` (the ranks that share that group's parameters: experts).
        lr, betas, weight_decay, use_triton, decoupled_weight_decay, precision, cautious: as :class:`~lion_dist.Lion`.
        module: the model that owns the parameters. Given, its parameters and buffers are made equal to the first
            rank's, its forward waits for each module's parameters only, and parameters get their names.
        process_group: the ranks that train this model: None for all, a ProcessGroup, a 1-D DeviceMesh, or a 2-D
            one (replicate, shard).
        sharding: ZeRO stage, bucket size, what is on the wire.
        metrics_every: measure every n-th step, for :meth:`metrics`; 0 measures nothing and costs nothing.

    An unused parameter (no gradient on any rank) is left as it was. A rank without a batch calls ``step()`` all the
    same and takes part with zeros. Between ``step()`` and the next forward, reading parameters through the module waits
    for them; a reference held elsewhere needs :meth:`finish_param_sync` first (see "the hazard" in
    ``sharding/forward_hooks.py``).
    """

    _step_supports_amp_scaling = True  # the verdict and the factor stay on the device

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        use_triton: bool | None = None,
        decoupled_weight_decay: bool = False,
        *,
        module: nn.Module | None = None,
        process_group: ProcessGroup | DeviceMesh | None = None,
        sharding: ShardingConfig = ShardingConfig(),
        precision: PrecisionPolicy = PrecisionPolicy(),
        cautious: bool = False,
        metrics_every: int = 0,
    ):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        check_hyperparameters(defaults)
        metrics_every = check_interval("metrics_every", metrics_every)
        self.precision, self.sharding = check_policy(precision), check_sharding(sharding)
        use_triton = values.flag("use_triton", use_triton, optional=True)
        self.cautious = values.flag("cautious", cautious)
        values.instance("module", module, nn.Module, "Pass the model that owns the parameters.", optional=True)
        _refuse_together(sharding, self.cautious, metrics_every)
        self._scalars = GroupScalars(decoupling_lr(lr, decoupled_weight_decay))
        self._progress = Progress()
        self._params = ShardedParams(module, resolve_groups(process_group), self.precision)
        self._builder: ShardBuilder | None = None  # until all param groups have been checked
        super().__init__(values.params(params), defaults)
        self._guard = StepGuard(self._params, module)
        device = self._params.first_device()
        # All user input has been checked: from here on ranks communicate, and tensors change.
        self.groups = self._take_own_groups()
        backend = choose_backend(device, use_triton)
        stream = CommStream(device, bounded=sharding.wait_in_backward)
        self.shards: list[BucketShard] = []
        self.grad_scheduler = GradScheduler(keep_local_grads=sharding.zero_stage == 1)
        self._counters = torch.zeros(2, dtype=torch.int64, device=device)  # steps taken, steps skipped
        self._observers = StepObservers(
            self.groups,
            stream,
            device,
            metrics_every=metrics_every,
            check_replicas_every=sharding.check_replicas_every,
            copies=lambda: copies_of(self._params, self.buckets),
        )
        hooks = None if module is None else ForwardHooks(module)
        self._full_params = FullParams(self.shards, hooks, _make_param_sync(sharding, self.precision, backend))
        self._order = UpdateOrder(device, one_by_one=sharding.update_in_backward)
        self._states = StateAccess(self._settled_state, self.groups)
        divisor = self.groups.num_ranks if sharding.average else 1
        self._gradients = StepGradients(
            self._params,
            lambda: self.param_groups,
            lambda: self._loss_scale,
            module,
            self.grad_scheduler,
            Judge(self.groups, device, divisor, choose_sum_of_squares(backend)),
            stream,
            self._observers.clock,
            before_reducing=self._before_reducing,
            adopt=self._add_buckets,
            used_in_backward=sharding.update_in_backward,
        )
        self._in_backward: BackwardStep | None = None
        if sharding.update_in_backward:
            self._in_backward = BackwardStep(
                *(self._params, self._full_params, self._gradients, self.grad_scheduler, stream, self._order),
                *(self._terms, self._update, self._send),
                may_wait=sharding.wait_in_backward,
            )
        self._builder = ShardBuilder(self._params, self.precision, sharding, stream, self._observers.clock, backend)
        self._build(self.param_groups)

    # ---- construction

    @explained("the construction of ShardedLion")
    def _take_own_groups(self) -> ShardGroups:
        self._params.own_groups = OwnGroups(self, self._progress)
        return self._params.groups_for({})

    @explained("the construction of ShardedLion")
    def _build(self, groups: list[dict]) -> None:
        self._check_agreement(groups)
        for tensor in self._params.others_in_module():
            self.groups.broadcast(tensor)
        self._add_buckets([(p, g) for g in groups for p in g["params"]])
        if self.groups.is_first:
            logger.info("%s", self._builder.description(self.shards))
        self._guard.note_params(groups)

    def __getstate__(self) -> dict:
        raise TypeError(
            "ShardedLion cannot be copied or pickled: it is tied to process groups and to the model's memory. Save "
            "its state_dict() with torch.distributed.checkpoint and construct another."
        )

    @explained("add_param_group()")
    def add_param_group(self, param_group: dict) -> None:
        """Append a param group; its parameters get buckets of their own. All ranks do so together, between steps."""
        values.param_group(param_group)
        super().add_param_group(param_group)
        group, is_built = self.param_groups[-1], self._builder is not None
        try:
            self._params.check(group, next((p for g in self.param_groups for p in g["params"]), None))
            GradScheduler.refuse_others(group["params"], self._params.names_of(group))
            if is_built:
                refuse_wrapped(group["params"], None)
                self._check_agreement([group])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._params.add(group)
        if is_built:
            self._add_buckets([(p, group) for p in group["params"]])
            self._guard.note_params(self.param_groups)

    def _check_agreement(self, groups: list[dict]) -> None:
        options = self._scalars.decoupled_from, self.cautious, self.metrics_every
        torch_release = torch.__version__.split("+")[0]  # builds for other devices compute alike
        entries = [("torch", (torch_release,))]
        entries += [("ShardedLion", tuple(map(str, (self.sharding, self.precision, *options))))]
        for axis in self.groups.axes:
            check_ranks_agree(entries + self._params.described(groups), axis)

    def _add_buckets(self, params: list[tuple[Parameter, dict]]) -> None:
        """Buckets for ``params`` and their param groups, on all ranks together."""
        new = self._builder.build(params, self._full_params.param_sync)
        self.grad_scheduler.add_buckets([shard.bucket for shard in new])
        self.shards += new
        self._gradients.buckets = self.buckets
        self._full_params.add(new)
        self._order.add(new)
        self.state.update(self._live_state.by_param(maker_of_parts(gatherable=False)))  # for those who look at it

    # ---- the step

    @property
    def buckets(self) -> list[Bucket]:
        return [shard.bucket for shard in self.shards]

    @property
    def metrics_every(self) -> int:
        return self._observers.metrics_every

    @explained("step()")
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update this rank's shards and start gathering the others'. All ranks call it together.

        A step whose gradients are not finite on any rank is skipped on all: weights and momentum stay as they were.

        Raises:
            RuntimeError: inside ``no_sync()``; or the param groups or the module hold other parameters than they did.
            ValueError: a param group holds an lr, betas or weight_decay that cannot be used; nothing is changed.
        """
        loss = self._begin_step(closure)
        if self._in_backward is not None:
            self._finish_backward_step()
            return loss
        scalars = self._scalars.of(self.param_groups)
        self._gradients.check()
        verdict = self._gradients.judge.skip_unusable(skip_unusable(None, scalars.values()))
        self._full_params.note_sync_starts()
        if self._guard.no_gradients.is_waiting:
            self._guard.no_gradients.note_step(any(any(bucket.used) for bucket in self.buckets))
        terms = self._terms(verdict, scalars)
        self._observers.begin_step()
        self._full_params.follow_outside_writes(self.shards)
        if self.cautious:
            with self._observers.clock.phase("norm"):
                terms.cautious_lrs.update(cautious_lrs(self.shards, scalars, terms.grad_scale))
        buckets = self.buckets
        self._full_params.begin_updates(buckets)
        with self._observers.clock.phase("update"):
            for batch, active in self._order.with_used(verdict.used):
                self._update(batch, active, terms)
                self._send(batch)  # the next forward waits, not this line
        with self._observers.clock.phase("param_sync"):
            self._full_params.finish_sending()
        self._full_params.note_updates(buckets, [param for bucket in buckets for param in bucket.params])
        self._full_params.end_updates(buckets)
        self._counters += verdict.outcome
        self._end_step()
        self._observers.end_step(verdict.skip, self._counters)
        return loss

    def _begin_step(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        values.closure(closure)
        refuse_blind_scaler(self)
        self._states.forget_consolidated()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._counters.is_cuda and self._full_params.param_sync.leaves_gathers:
            refuse_bare_capture()
        if self._guard.check_step(self):
            self._full_params.look_at_modules()
        self._full_params.refuse_interrupted()
        return loss

    def _terms(self, verdict: Verdict | None = None, scalars: dict | None = None) -> UpdateTerms:
        """Without a ``verdict``, inside backward, only what cannot be used skips."""
        scalars = self._scalars.of(self.param_groups) if scalars is None else scalars
        skip = skip_unusable(None, scalars.values()) if verdict is None else verdict.skip
        grad_scale = self._gradients.judge.grad_scale(None if verdict is None else self._loss_scale)
        return UpdateTerms(scalars, grad_scale, skip, self.precision.seed, self._builder.backend)

    def _update(self, batch: ShardBatch, active: Tensor | None, terms: UpdateTerms) -> None:
        """Where Lion and ranks meet: this rank's shards of a batch, from gradients that all ranks have summed."""
        self._observers.before_update(batch, active, terms)
        self._full_params.param_sync.update(batch, active, terms)

    def _send(self, batch: ShardBatch) -> None:
        buckets = [shard.bucket for shard in batch.shards]
        for bucket in buckets:
            bucket.reset_grad()
        self._full_params.param_sync.after_update(buckets)

    def _finish_backward_step(self) -> None:
        self._in_backward.finish(self._loss_scale, self._params.module, self._guard.no_gradients)
        skip = skip_unusable(None, self._scalars.of(self.param_groups).values())
        if skip is None:
            self._counters[0] += 1
        else:
            self._counters += torch.stack([skip == 0, skip != 0])
        self._end_step()

    def _end_step(self) -> None:
        self._gradients.end_step()
        self._progress.step += 1
        self._forget_step()
        self._full_params.finish_step()

    def _forget_step(self) -> None:
        if self._in_backward is not None:
            self._in_backward.forget_step()
        self._gradients.judge.forget_step()

    def _before_reducing(self) -> None:
        self._guard.refuse_new_wrappers()
        self._full_params.finish_sync()  # a step without a forward since the last

    @property
    def _loss_scale(self) -> Tensor | None:
        """[] on the device; set by GradScaler around ``step()``, unless it has unscaled."""
        return getattr(self, "grad_scale", None)

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
        return self._gradients.judge.clip(max_norm, self._loss_scale)

    @explained("grad_norm()")
    def grad_norm(self) -> Tensor:
        """[] fp32 on the device: the global norm of this step's gradients, averaged and unscaled, before clipping."""
        self._gradients.check()
        return self._gradients.judge.norm(self._loss_scale)

    @explained("GradScaler.unscale_()")
    def unscale_and_check_(self, inverse_loss_scale: Tensor, loss_scale: Tensor | None = None) -> Tensor:
        """For ``lion_dist.GradScaler``: multiply gradients by ``inverse_loss_scale`` in the next step.

        ``loss_scale``: the scaler's, which ranks compare, whether this call unscales by it or ``step()``.

        Returns:
            [] fp32 on the device: 1 when a gradient is not finite on any rank.
        """
        values.instance("inverse_loss_scale", inverse_loss_scale, Tensor, "Use lion_dist.GradScaler, which passes it.")
        values.scalar_tensor("inverse_loss_scale", inverse_loss_scale)
        judge = self._gradients.judge
        judge.inverse_loss_scale, judge.scaler_scale = inverse_loss_scale, loss_scale
        return self._gradients.check().skip

    def set_grad_divisor(self, count: float | Tensor) -> None:
        """Divide this step's summed gradients by ``count`` (say, its tokens over all ranks) instead of the ranks.

        Call it before ``clip_grad_norm_`` and ``step``; it holds for one step. A tensor is not read by the host.
        """
        self._gradients.judge.set_divisor(count)

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
        self.grad_scheduler.finish_absent_pass()

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
        self._guard.close()

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
        """Steps skipped for a gradient that was not finite. Waits for the device."""
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
        return self._observers.metrics() | {"skipped_steps": self.skipped_steps()}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes on this rank by kind, counted from the tensors. ``grads``: grad shards and the pooled buffers."""
        kinds = [shard.memory_bytes() for shard in self.shards]
        total = {key: sum(kind[key] for kind in kinds) for key in ("params", "main_params", "exp_avg", "grads")}
        total["params"] += sum(p.nbytes for p in self._params.frozen)
        total["grads"] += self._builder.pooled_nbytes
        return total

    # ---- state_dict: this rank's part in torch's format (``state_dicts.py``), or on one rank the whole

    @property
    def counters(self) -> Tensor:
        """[2] int64 on the device, live: steps taken, steps skipped."""
        return self._counters

    @property
    def _live_state(self) -> LiveState:
        decoupled_from = self._scalars.decoupled_from
        return LiveState(self.param_groups, self.shards, self._params.names, self._counters, decoupled_from)

    def _settled_state(self) -> LiveState:
        """With parameters whole, and main params that follow them."""
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
        self._states.load(state_dict)
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


def _refuse_together(sharding: ShardingConfig, cautious: bool, metrics_every: int) -> None:
    if sharding.update_in_backward and (cautious or metrics_every):
        raise ValueError(
            "update_in_backward=True updates a bucket before the other buckets' gradients are there. cautious=True "
            "(statistics over whole tensors) and metrics_every (over a whole step) need update_in_backward=False."
        )


def _make_param_sync(sharding: ShardingConfig, precision: PrecisionPolicy, backend: str) -> GatherParams:
    if sharding.param_sync != "coded":
        return GatherParams()
    from lion_dist.coded_sync.send_codes import SendCodes

    return SendCodes(precision, backend)
