"""``ShardedLion``: ZeRO stages 1 and 2. Where the update without ranks and the ranks without Lion meet.

Alternatives considered:

* One flat buffer for the whole model: no overlap, and nothing can start before the last gradient.
* ``p.grad`` as views of the grad buffer: autograd then adds into zeroed memory, 8 bytes a parameter where one fused
  copy moves 4, and ``zero_grad(set_to_none=True)`` silently breaks the views.
* Parameters of ``param_groups`` replaced by shard parameters (as DeepSpeed does): GradScaler would see gradients, but
  every other user of ``param_groups`` would see tensors that the model does not have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from lion_dist import values
from lion_dist.averages import with_average
from lion_dist.cautious_steps import cautious_lrs_of_slices
from lion_dist.config import PrecisionPolicy, ShardingConfig, check_interval, check_policy, check_sharding
from lion_dist.full_params import FullParams
from lion_dist.hyperparameters import check_hyperparameters, decoupling_lr
from lion_dist.kernels.backends import choose_backend
from lion_dist.kernels.reference import skip_unusable
from lion_dist.observers import StepObservers, copies_of, watch_of
from lion_dist.optional_guards import make_guards
from lion_dist.param_sync import GatherParams
from lion_dist.shard_builder import ShardBuilder
from lion_dist.shard_state import ShardBatch, ShardState, UpdateOrder
from lion_dist.sharded_optimizer import ShardedOptimizer
from lion_dist.sharded_params import ShardedParams
from lion_dist.sharding.comm_stream import make_comm_stream
from lion_dist.sharding.forward_hooks import ForwardHooks
from lion_dist.sharding.grad_norm import GradNorm
from lion_dist.sharding.gradient_check import CheckResult, GradientCheck
from lion_dist.sharding.process_groups import Progress, ShardGroups, explained, resolve_groups
from lion_dist.sharding.scheduler import GradScheduler
from lion_dist.state_dict.access import StateAccess
from lion_dist.state_dict.full_state import maker_of_parts
from lion_dist.step_gradients import StepGradients, choose_sum_of_squares
from lion_dist.step_rule import SpikeGuard, StepRule, check_guard, check_torch_options, note_max_lr
from lion_dist.update_terms import GroupScalars, UpdateTerms

if TYPE_CHECKING:
    from lion_dist.composed.axes import ModelAxes
    from lion_dist.composed.model_parallel import ModelParallel
    from lion_dist.two_levels.levels import TwoLevels
    from lion_dist.update_in_backward.step import BackwardStep

logger = logging.getLogger(__name__)


class ShardedLion(ShardedOptimizer):
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
        lr, betas, weight_decay, use_triton, decoupled_weight_decay, precision, from cautious to skip_spikes, and
            ema_decay: as :class:`~lion_dist.Lion`.
        module: the model that owns the parameters. Given, its parameters and buffers are made equal to the first
            rank's, its forward waits for each module's parameters only, and parameters get their names. A
            DistributedDataParallel gives up its reducer for this optimizer (``ddp_takeover.py``).
        process_group: the ranks that train this model: None for all, a ProcessGroup, a 1-D DeviceMesh, or a 2-D
            one (replicate, shard), or TwoLevels.
        model_parallel: the ranks that hold other parts of it (tensor and pipeline parallel), see ``docs/composed.md``.
        sharding: ZeRO stage, bucket size, what is on the wire.
        metrics_every: measure every n-th step, for :meth:`metrics`; 0 measures nothing and costs nothing.

    An unused parameter (no gradient on any rank) is left as it was. A rank without a batch calls ``step()`` all the
    same and takes part with zeros. Between ``step()`` and the next forward, reading parameters through the module waits
    for them; a reference held elsewhere needs :meth:`finish_param_sync` first, or
    ``ShardingConfig(overlap_param_sync=False)`` (see "the hazard" in ``sharding/forward_hooks.py``).
    """

    _step_supports_amp_scaling = True  # the check and the factor stay on the device

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
        process_group: ProcessGroup | DeviceMesh | TwoLevels | None = None,
        model_parallel: ModelParallel | None = None,
        sharding: ShardingConfig = ShardingConfig(),
        precision: PrecisionPolicy = PrecisionPolicy(),
        cautious: bool = False,
        cautious_factor: float | None = None,
        cautious_wd: bool = False,
        corrected_weight_decay: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        skip_spikes: SpikeGuard | None = None,
        metrics_every: int = 0,
        ema_decay: float | None = None,
    ):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        check_hyperparameters(defaults)
        metrics_every = check_interval("metrics_every", metrics_every)
        self.precision, self.sharding = check_policy(precision), check_sharding(sharding)
        use_triton = values.flag("use_triton", use_triton, optional=True)
        check_torch_options(foreach, fused, capturable, differentiable)
        self.rule = StepRule.of(cautious, cautious_factor, cautious_wd, corrected_weight_decay, maximize, ema_decay)
        self.precision = with_average(self.precision, self.rule.ema_decay)
        check_guard(skip_spikes)
        values.instance("module", module, nn.Module, "Pass the model that owns the parameters.", optional=True)
        _refuse_together(sharding, self.rule, metrics_every, skip_spikes)
        corrected = self.rule.corrected_weight_decay
        taken = _takeover_of(module)
        if taken is not None:
            module, process_group = taken.ddp.module, process_group or taken.ddp.process_group
        self._scalars = GroupScalars(decoupling_lr(lr, decoupled_weight_decay), corrected)
        self._progress = Progress()
        choices = self.sharding, self.precision, self._scalars.decoupled_from, self.rule, skip_spikes, metrics_every
        parts = _model_axes(model_parallel)
        self._params = ShardedParams(module, resolve_groups(process_group), self.precision, parts)
        self.guards = make_guards(self, self._params, choices)
        self._builder: ShardBuilder | None = None  # until all param groups have been checked
        super().__init__(values.params(params), defaults)
        self.guards.check_model(taken)
        device = self._params.first_device()
        # All user input has been checked: from here on ranks communicate, and tensors change.
        self.groups = self._meet_ranks()
        backend = choose_backend(device, use_triton)
        stream = make_comm_stream(device, bounded=sharding.wait_in_backward)
        self.shards: list[ShardState] = []
        self.grad_scheduler = GradScheduler(keep_local_grads=sharding.zero_stage == 1)
        self._counters = torch.zeros(2, dtype=torch.int64, device=device)  # steps taken, steps skipped
        self._observers = StepObservers(
            self.groups,
            stream,
            device,
            parts=self._params.parts,
            metrics_every=metrics_every,
            check_replicas_every=sharding.check_replicas_every,
            copies=lambda: copies_of(self._params, self.buckets),
        )
        hooks = None if module is None else ForwardHooks(module)
        self._full_params = FullParams(self.shards, hooks, self._make_param_sync(backend), self.guards)
        self._order = UpdateOrder(device, one_by_one=sharding.update_in_backward)
        self._states = StateAccess(self._settled_state, self.groups, self._params.parts)
        divisor, norm = self.groups.num_ranks if sharding.average else 1, self._make_grad_norm(device, backend)
        self._gradients = StepGradients(
            self._params,
            lambda: self._loss_scale,
            self.grad_scheduler,
            GradientCheck(norm, divisor),
            watch_of(skip_spikes, device, backend),
            stream,
            self._observers.clock,
            self.guards,
            before_reducing=self._full_params.finish_sync,  # a step without a forward since the last
            adopt=self._add_buckets,
            used_in_backward=sharding.update_in_backward,
        )
        self.guards.watch(self._gradients, norm)
        self._in_backward: BackwardStep | None = None
        if sharding.update_in_backward:
            from lion_dist.update_in_backward.step import BackwardStep

            self._in_backward = BackwardStep(
                *(self._params, self.guards, self._full_params, self._gradients, self.grad_scheduler),
                *(stream, self._order, self._terms, self._update, self._send),
                may_wait=sharding.wait_in_backward,
            )
        clock, decay = self._observers.clock, self.rule.ema_decay
        self._builder = ShardBuilder(self._params, self.precision, sharding, stream, clock, backend, decay)
        self._build(self.param_groups)
        if taken is not None:
            taken.take_over(self.grad_scheduler)

    # ---- construction

    @explained("the construction of ShardedLion")
    def _meet_ranks(self) -> ShardGroups:
        self._params.own_groups = self.guards.borrow_groups(self._progress)
        if self._params.parts is not None:
            self._params.parts.take_own_groups(self._params.own_groups)
        groups = self._params.groups_for({})
        self.guards.check_agreement(self.param_groups)  # before anything is hooked up or changed
        return groups

    @explained("the construction of ShardedLion")
    def _build(self, groups: list[dict]) -> None:
        self._params.number_over_parts()
        for tensor in self._params.others_in_module():
            self.groups.broadcast(tensor)
        self._add_buckets([(p, g) for g in groups for p in g["params"]])
        self._params.check_copies(groups)
        if self.groups.is_first:
            logger.info("%s", self._builder.description(self.shards))
        self.guards.note_params()

    def _make_grad_norm(self, device: torch.device, backend: str) -> GradNorm:
        of_parts = GradNorm if self._params.parts is None else self._params.parts.grad_norm
        return of_parts(self.groups, device, choose_sum_of_squares(backend))

    def _make_param_sync(self, backend: str) -> GatherParams:
        if self.sharding.param_sync != "coded":
            return GatherParams()
        from lion_dist.coded_sync.send_codes import SendCodes

        return SendCodes(self.precision, backend, cautious_wd=self.rule.cautious_wd)

    @explained("add_param_group()")
    def add_param_group(self, param_group: dict) -> None:
        """Append a param group; its parameters get buckets of their own. All ranks do so together, between steps."""
        values.param_group(param_group)
        super().add_param_group(param_group)
        group, is_built = self.param_groups[-1], self._builder is not None
        try:
            if self.rule.corrected_weight_decay:
                note_max_lr(group)
            self._params.check(group, next((p for g in self.param_groups for p in g["params"]), None))
            GradScheduler.refuse_others(group["params"], self._params.names_of(group))
            self.guards.check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._params.add(group)
        if is_built:
            self._add_buckets([(p, group) for p in group["params"]])
            self._params.check_copies([group])
            self.guards.note_params()

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
        checked = self._gradients.checked(skip_unusable(None, scalars.values()))
        self._full_params.note_sync_starts()
        self.guards.note_step(self.buckets)
        terms = self._terms(checked, scalars)
        self._observers.begin_step()
        self._full_params.follow_outside_writes(self.shards)
        if self.rule.is_cautious:
            with self._observers.clock.phase("norm"):
                terms.lrs.update(cautious_lrs_of_slices(self._order.batches, terms))
        buckets = self.buckets
        self._full_params.begin_updates(buckets)
        with self._observers.clock.phase("update"):
            for batch, active in self._order.with_used(checked.used):
                self._update(batch, active, terms)
                self._send(batch)  # the next forward waits, not this line
        with self._observers.clock.phase("param_sync"):
            self._full_params.finish_sending()
        self._full_params.note_updates(buckets, [param for bucket in buckets for param in bucket.params])
        self._full_params.end_updates(buckets)
        self._counters += checked.outcome
        self._end_step()
        self._observers.end_step(checked.skip, self._counters)
        return loss

    def _begin_step(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        values.closure(closure)
        self.weight_swap.refuse("step()")
        self.guards.before_closure()
        self._states.forget_consolidated()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.guards.check_step(self._full_params.param_sync.leaves_gathers):
            self._full_params.look_at_modules()
        self._full_params.refuse_interrupted()
        return loss

    def _terms(self, checked: CheckResult | None = None, scalars: dict | None = None) -> UpdateTerms:
        """Inside backward there is no ``checked`` result, and only a setting that cannot be used skips."""
        scalars = self._scalars.of(self.param_groups) if scalars is None else scalars
        skip = skip_unusable(None, scalars.values()) if checked is None else checked.skip
        grad_scale = self._gradients.gradient_check.grad_scale(None if checked is None else self._loss_scale)
        grad_scale = self.rule.signed(grad_scale, self._counters.device)
        return UpdateTerms(scalars, grad_scale, skip, self.rule, self.precision.seed, self._builder.backend)

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
        self._in_backward.finish(self._loss_scale)
        skip = skip_unusable(None, self._scalars.of(self.param_groups).values())
        if skip is None:
            self._counters[0] += 1
        else:
            self._counters += torch.stack([skip == 0, skip != 0])
        self._end_step()

    def _end_step(self) -> None:
        self.guards.end_step()
        self._progress.step += 1
        self._forget_step()
        self._full_params.finish_step()
        if not self.sharding.overlap_param_sync:
            self._full_params.finish_sync()

    def _forget_step(self) -> None:
        if self._in_backward is not None:
            self._in_backward.forget_step()
        self._gradients.gradient_check.forget_step()


def _model_axes(model_parallel: ModelParallel | None) -> ModelAxes | None:
    if model_parallel is None:
        return None
    from lion_dist.composed.axes import ModelAxes

    return ModelAxes(model_parallel)


def _takeover_of(module: nn.Module | None):
    """What replaces the reducer of a DistributedDataParallel; None for any other module."""
    if not isinstance(module, nn.parallel.DistributedDataParallel):
        return None
    from lion_dist.ddp_takeover import Takeover

    return Takeover.of(module)


def _refuse_together(sharding: ShardingConfig, rule: StepRule, metrics_every: int, guard: SpikeGuard | None) -> None:
    if rule.cautious_factor and sharding.param_sync == "coded":
        raise ValueError(
            f'cautious_factor={rule.cautious_factor} takes steps of two sizes, and param_sync="coded" sends '
            'codes for one. Use cautious_factor=0, or param_sync="gather".'
        )
    if sharding.update_in_backward and (rule.is_cautious or metrics_every or guard is not None):
        raise ValueError(
            "update_in_backward=True updates a bucket before the other buckets' gradients are there. cautious=True "
            "(statistics over whole tensors), metrics_every and skip_spikes (over a whole step) need "
            "update_in_backward=False."
        )
