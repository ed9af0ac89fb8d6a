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
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter
from torch.optim import Optimizer

from lion_dist import values
from lion_dist.coded_sync.send_codes import SendCodes
from lion_dist.config import (
    HyperparameterWatch,
    PrecisionPolicy,
    ShardingConfig,
    check_hyperparameters,
    check_interval,
    check_policy,
    check_sharding,
)
from lion_dist.full_state import Consolidated, check_rank, copied_containers, maker_of_parts, meet
from lion_dist.kernels.reference import StepScalars, cautious_lr, skip_unusable
from lion_dist.kernels.update import choose_backend, lion_update_
from lion_dist.lion import decoupling_lr, effective_weight_decay, warn_if_decay_vanishes
from lion_dist.membership import Membership
from lion_dist.metrics.statistics import measure
from lion_dist.metrics.step_metrics import Meter, metrics_over_ranks
from lion_dist.replica_check import Frozen, ReplicaCheck
from lion_dist.shard_state import BucketShard, ShardBatch, make_batches, params_of_slices
from lion_dist.sharded_params import ShardedParams, refuse_sparse_gradients
from lion_dist.sharding import collectives, full_grad
from lion_dist.sharding.agreement import check_ranks_agree
from lion_dist.sharding.backward_updates import BackwardUpdates
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.choose_transport import choose_transport
from lion_dist.sharding.comm_stream import make_comm_stream
from lion_dist.sharding.foreign_wrappers import refuse_late_grads, refuse_sharded_since, refuse_wrapped
from lion_dist.sharding.forward_hooks import ForwardHooks
from lion_dist.sharding.grad_norm import SumOfSquares, sum_of_squares
from lion_dist.sharding.layout import choose_bucket_numel, pack_into_buckets
from lion_dist.sharding.own_groups import OwnGroups
from lion_dist.sharding.param_sync import GatherParams, LeaveStale
from lion_dist.sharding.process_groups import Progress, ShardGroups, backend_for, explained, resolve_groups
from lion_dist.sharding.scheduler import GradScheduler
from lion_dist.sharding.transport import Transport
from lion_dist.sharding.verdict import Judge, Verdict
from lion_dist.state_dicts import LiveState, LoadPlan, refuse_emptied
from lion_dist.step_choices import Factors, StepChoices
from lion_dist.unused_params import NoGradientWarning
from lion_dist.version_tracker import ParamWatch

_requires_grad = operator.attrgetter("requires_grad")

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
        metrics_every: measure every so-manieth step, for :meth:`metrics`; 0 measures nothing and costs nothing.

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
        self.metrics_every = check_interval("metrics_every", metrics_every)
        self.precision, self.sharding = check_policy(precision), check_sharding(sharding)
        self.use_triton = values.flag("use_triton", use_triton, optional=True)
        self.cautious = cautious = values.flag("cautious", cautious)
        values.instance("module", module, nn.Module, "Pass the model that owns the parameters.", optional=True)
        if sharding.update_in_backward and (cautious or metrics_every):
            raise ValueError(
                "update_in_backward=True updates a bucket before the other buckets' gradients are there. cautious=True "
                "(statistics over whole tensors) and metrics_every (over a whole step) need update_in_backward=False."
            )
        self._decoupled_from = decoupling_lr(lr, decoupled_weight_decay)
        self._progress = Progress()
        self.groups = resolve_groups(process_group)  # until ranks communicate; then of the optimizer's own
        self._hyperparameters = HyperparameterWatch(self._decoupled_from)
        self.shards: list[BucketShard] = []
        self._batches: list[ShardBatch] = []  # the same
        self._module = module
        self._params = ShardedParams(module, self.groups, precision)
        self._frozen: dict[Parameter, dict] = {}  # parameters that have no bucket yet, and their groups
        self._watch = ParamWatch()
        self._membership = Membership(module)
        self._changed: set[Bucket] = set()  # by somebody else, since the last step
        self._consolidated: Consolidated | None = None
        self._is_closed = False
        self._updating: set[Bucket] = set()  # by the update under way, or by one that an exception has ended
        self._has_looked_for_wrappers = False  # before a step
        self._no_gradients = NoGradientWarning()
        self._transports: dict[ShardGroups, Transport] = {}
        self.grad_scheduler = GradScheduler(keep_local_grads=sharding.zero_stage == 1)
        self.forward_hooks: ForwardHooks | None = None
        self._backward_updates: BackwardUpdates | None = None
        self._param_sync = SendCodes() if sharding.param_sync == "coded" else GatherParams()
        self._is_built = False
        self._factors: Factors | None = None  # that the last step has used
        super().__init__(values.params(params), defaults)
        refuse_wrapped(self._params.names, module)
        refuse_sparse_gradients(self._params.names, module)
        self._build(self.param_groups)

    # ---- construction

    @explained("the construction of ShardedLion")
    def _build(self, groups: list[dict]) -> None:
        """All user input has been checked: from here on ranks communicate, and tensors change."""
        params = [(p, g) for g in groups for p in g["params"]]
        if not params:
            raise ValueError("ShardedLion got no parameters: every param group is empty")
        self._device = params[0][0].device
        self._own_groups = self._params.own_groups = OwnGroups(self, self._progress)
        self.groups = self._own_groups.like(self.groups)
        self._stream = make_comm_stream(self._device, bounded=self.sharding.wait_in_backward)
        self._updates_event = self._stream.new_event()  # behind the last update in backward
        divisor = self.groups.num_ranks if self.sharding.average else 1
        self._judge = Judge(self.groups, self._device, divisor, self._choose_sum_of_squares())
        self._meter = Meter(self.metrics_every, self._device)
        self._replicas = ReplicaCheck(self.groups, self._stream, self._device, self.sharding.check_replicas_every)
        self._counters = torch.zeros(2, dtype=torch.int64, device=self._device)  # steps taken, steps skipped
        if self.sharding.update_in_backward:
            may_wait = self.sharding.wait_in_backward
            self._backward_updates = BackwardUpdates(self._stream, self._update_in_backward, may_wait)
            self.grad_scheduler.after_start = self._backward_updates
        self._check_agreement(groups)
        if self._module is not None:
            self.forward_hooks = ForwardHooks(self._module)
            strangers = [p.data for p in self._module.parameters() if p not in self._params.names]
            for tensor in [*strangers, *self._module.buffers()]:
                self.groups.broadcast(tensor)
        self._is_built = True
        self._add_buckets(params)
        if self.groups.is_first:
            logger.info("%s", self._description())
        self._membership.note(self.param_groups)

    def _description(self) -> str:
        """What was chosen at construction, in a line for the log."""
        numels = [bucket.layout.numel for bucket in self.buckets]
        axes = [backend_for(axis, self._device) for axis in self.groups.axes]
        names = {transport.name for transport in self._transports.values()}
        transport = "peer memory" if "peer memory" in names else (axes or ["none"])[0]
        parts = [
            f"{sum(p.numel() for p in self._params.names):,} parameters in {len(self._params.names)} tensors",
            f"{self.groups.shard_world_size} ranks x {self.groups.replicate_world_size} replicas",
            f"device: {self._device.type}",
            f"ZeRO stage {self.sharding.zero_stage}",
            f"{len(numels)} buckets of up to {max(numels, default=0):,} elements",
            f"transport: {transport}",
            f"param sync: {self.sharding.param_sync}",
            f"update: {choose_backend(self._device, self.use_triton)}",
            f"main params: {self.precision.main_params}",
            f"momentum: {self.precision.momentum_dtype or 'in the dtype of the parameters'}",
        ]
        return "ShardedLion: " + "; ".join(parts)

    def _choose_sum_of_squares(self) -> SumOfSquares:
        if choose_backend(self._device, self.use_triton) != "triton":
            return sum_of_squares
        from lion_dist.kernels import squares_triton

        return squares_triton.SumOfSquares()

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
        group = self.param_groups[-1]
        try:
            self._params.check(group, next((p for g in self.param_groups for p in g["params"]), None))
            GradScheduler.refuse_others(group["params"], self._params.names_of(group))
            if self._is_built:
                refuse_wrapped(group["params"], None)
                self._check_agreement([group])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._params.add(group)
        if self._is_built:
            self._add_buckets([(p, group) for p in group["params"]])
            self._membership.note(self.param_groups)

    def _check_agreement(self, groups: list[dict]) -> None:
        choices = (self.sharding, self.precision, self._decoupled_from, self.cautious, self.metrics_every)
        torch_release = torch.__version__.split("+")[0]  # builds for other devices compute alike
        entries = [("torch", (torch_release,)), ("ShardedLion", tuple(map(str, choices)))]
        entries += self._params.described(groups)
        for axis in self.groups.axes:
            check_ranks_agree(entries, axis)

    def _add_buckets(self, params: list[tuple[Parameter, dict]]) -> None:
        """Lay ``params`` out in new buckets, broadcast them, and hook them up. Frozen ones wait until they are not."""
        for param, group in params:
            if not param.requires_grad:
                self._frozen[param] = group
                self._params.groups_for(group).broadcast(param.data)
        trainable = [(p, g) for p, g in params if p.requires_grad]
        keys = [(id(g), p.dtype, self._params.groups_for(g)) for p, g in trainable]
        numels = [p.numel() for p, _ in trainable]
        bucket_numel = self.sharding.bucket_numel or choose_bucket_numel(sum(numels), self.groups.shard_world_size)
        new = []
        for members in pack_into_buckets(numels, keys, bucket_numel):
            group = trainable[members[0]][1]
            new.append(self._make_bucket([trainable[i][0] for i in members], group))
        for transport in self._transports.values():
            transport.reserve()
        self.grad_scheduler.add_buckets([shard.bucket for shard in new])
        if self.forward_hooks is not None:
            self.forward_hooks.add_buckets([shard.bucket for shard in new])
        self.shards += new
        if self.sharding.update_in_backward:
            self._batches += [ShardBatch([shard]) for shard in new]
        else:
            self._batches += make_batches(new)
        self._watch.add(shard.bucket for shard in new)
        self._slice_params = params_of_slices(self.shards, self._device)
        self.state.update(self._live_state.by_param(maker_of_parts(gatherable=False)))  # for those who look at it

    def _make_bucket(self, params: list[Parameter], group: dict) -> BucketShard:
        groups = self._params.groups_for(group)
        ordered = self.sharding.ordered_sum
        if ordered is None:
            ordered = any(backend_for(axis, self._device) == "gloo" for axis in groups.axes)
        wire = self.sharding.reduce_dtype or params[0].dtype
        if groups not in self._transports:
            self._transports[groups] = choose_transport(
                groups,
                self._device,
                self._stream,
                peer_memory=self.sharding.peer_memory,
                use_triton=self.use_triton,
                bounded=self.sharding.wait_in_backward,
            )
        names = [self._params.names[p] for p in params]
        clock = self._meter.clock
        bucket = Bucket(
            params,
            names,
            groups,
            self._transports[groups],
            reduce_dtype=wire,
            ordered_sum=ordered,
            stream=self._stream,
            clock=clock,
            row_major=self.precision.is_stochastic(params[0].dtype),
        )
        groups.broadcast(bucket.flat_params)
        starts = [self._params.canonical_starts[p] for p in params]
        shard = BucketShard(bucket, group, self.precision, starts)
        if isinstance(self._param_sync, SendCodes):
            backend = choose_backend(self._device, self.use_triton)
            self._param_sync.codecs[bucket] = shard.make_codec(self.precision, starts, backend)
        return shard

    def _adopt_unfrozen(self) -> None:
        """Parameters that take gradients now get buckets. Every rank has started the reductions of the others, so that
        ranks with and without a batch come to the new ones' broadcast at the same point; and ranks have compared that
        they are the same ones."""
        unfrozen = self._unfrozen()
        if unfrozen:
            self._params.check_memory({self._params.names[param]: param for param, _ in unfrozen})
        self._add_buckets(unfrozen)
        for param, _ in unfrozen:
            del self._frozen[param]

    def _unfrozen(self) -> list[tuple[Parameter, dict]]:
        """Parameters that take gradients and have no bucket yet, and their groups."""
        return [(p, g) for p, g in self._frozen.items() if p.requires_grad]

    # ---- what has to be the same on all ranks in every step

    def _choices(self) -> StepChoices:
        names = self._params.names
        unfrozen = [names[param] for param, _ in self._unfrozen()]
        partly = [bucket for bucket in self.buckets if not all(map(_requires_grad, bucket.params))]  # 25 ns a parameter
        frozen = [name for bucket in partly for name in bucket.names_without_grads()]
        return StepChoices(self._factors_now(), self._factors, unfrozen, frozen)

    def _factors_now(self) -> Factors:
        judge = self._judge
        loss_scale = self._loss_scale if judge.scaler_scale is None else judge.scaler_scale
        others = judge.divisor, loss_scale, judge.inverse_loss_scale, judge.max_norm
        return Factors.of(self.param_groups, *others)

    # ---- the step

    @property
    def buckets(self) -> list[Bucket]:
        return [shard.bucket for shard in self.shards]

    @explained("step()")
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """Update this rank's shards and start gathering the others'. All ranks call it together.

        A step whose gradients are not finite on any rank is skipped on all: weights and momentum stay as they were.

        Raises:
            RuntimeError: inside ``no_sync()``; or the param groups or the module hold other parameters than they did.
            ValueError: a param group holds an lr, betas or weight_decay that cannot be used; nothing is changed.
        """
        values.closure(closure)
        self._refuse_blind_scaler()
        refuse_emptied(self.state)
        self._consolidated = None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._device.type == "cuda" and not isinstance(self._param_sync, LeaveStale):
            self._refuse_bare_capture()
        if self._is_closed:
            raise RuntimeError("this ShardedLion has been closed: its model is no longer hooked up. Construct another.")
        self._refuse_new_wrappers()
        if self._membership.check(self.param_groups) and self.forward_hooks is not None:
            self.forward_hooks.look_at_modules()
        if self._updating:
            raise RuntimeError(
                "an exception has ended an update of parameters: ranks may hold different ones. Call zero_grad() on "
                "every rank, which gathers them anew, and run the step again from its first backward."
            )
        if self._backward_updates is not None:
            self._finish_backward_updates()
            return loss
        scalars = self._all_scalars()
        self._judge_gradients()
        verdict = self._judge.skip_unusable(skip_unusable(None, scalars.values()))
        if self.forward_hooks is not None:
            self.forward_hooks.note_sync_starts()
        if self._no_gradients.is_waiting:
            self._no_gradients.note_step(any(any(bucket.used) for bucket in self.buckets))
        grad_scale = self._judge.grad_scale(self._loss_scale)
        if self.sharding.check_replicas_every:
            with self._meter.clock.phase("measure"):
                self._replicas.begin_step(self._copies)
        self._meter.begin_step()
        self._refresh_stale_main(self.shards)
        with self._meter.clock.phase("norm"):
            cautious_lrs = self._cautious_lrs(scalars, grad_scale) if self.cautious else {}
        self._updating.update(self.buckets)
        with self._meter.clock.phase("update"):
            used = verdict.used.index_select(0, self._slice_params)  # as float, of every slice
            for batch, active in zip(self._batches, used.split([b.num_slices for b in self._batches]), strict=True):
                self._update(batch, active, verdict.skip, scalars[id(batch.group)], grad_scale, cautious_lrs)
                buckets = [shard.bucket for shard in batch.shards]
                for bucket in buckets:
                    bucket.reset_grad()
                self._param_sync.after_update(buckets)  # the next forward waits, not this line
        with self._meter.clock.phase("param_sync"):
            self._param_sync.after_updates(self._changed)
            self._changed.clear()
        buckets = self.buckets
        self._watch.note_updates(buckets, (param for bucket in buckets for param in bucket.params))
        self._updating.clear()
        self._counters += verdict.outcome
        self._end_step()
        if self.forward_hooks is None:
            self.finish_param_sync()
        else:
            self.forward_hooks.finish_outside()
        self._meter.end_step(verdict.skip, self._counters)
        return loss

    @torch.no_grad()
    def _update_in_backward(self, bucket: Bucket) -> None:
        (batch,) = [batch for batch in self._batches if batch.shards[0].bucket is bucket]
        if self.forward_hooks is not None:
            self.forward_hooks.note_sync_starts()
        bucket.finish_param_sync()  # one whose modules did not run forward since the last step
        self._refresh_stale_main(batch.shards)
        self._updating.add(bucket)
        trained = [param.requires_grad for param in bucket.params]
        scalars = self._all_scalars()
        if batch.tensors is not None:
            lion_update_(
                batch.tensors,
                batch.grads(),
                scalars[id(batch.group)],
                skip=skip_unusable(None, scalars.values()),
                grad_scale=self._judge.grad_scale(None),
                active=None if all(trained) else self._on_device([trained[s.param] for s in bucket.slices]),
                seed=self.precision.seed,
                backend=choose_backend(self._device, self.use_triton),
                check=False,
            )
        self._stream.record_event(self._updates_event)
        self._watch.note_updates([bucket], (param for param in bucket.params if param.requires_grad))
        bucket.reset_grad()
        bucket.start_param_sync()
        self._updating.discard(bucket)

    def _on_device(self, flags: list[bool]) -> Tensor:
        return torch.tensor(flags, dtype=torch.float32).to(self._device, non_blocking=True)

    def _finish_backward_updates(self) -> None:
        if self.grad_scheduler.in_no_sync:
            raise RuntimeError("step() inside no_sync(): the step's last backward pass has to run outside of it")
        if self._loss_scale is not None:
            raise RuntimeError("a GradScaler judges gradients before the update: use update_in_backward=False with it")
        begun = self._backward_updates.begun
        refuse_late_grads({p: self._params.names[p] for bucket in begun for p in bucket.params}, self._module)
        if self._no_gradients.is_waiting:
            self._no_gradients.note_step(bool(begun) or any(param.grad is not None for param in self._params.names))
        self.grad_scheduler.start_all_but(begun)
        with self._stream.fork():
            self._judge.agreement.exchange(self._choices)
            self._stream.record_event(self._updates_event)  # it has read a learning rate or divisor on the device, too
        if self._unfrozen():
            self._judge.agreement.wait()
            self._adopt_unfrozen()
            self.grad_scheduler.start_all_but(self._backward_updates.begun)
        self._backward_updates.finish()
        self._backward_updates.refuse_reduced_since()
        # A learning rate or divisor on the device may be changed from here on; the updates have read it.
        self._stream.wait_event(self._updates_event)
        self._stream.release()
        skip = skip_unusable(None, self._all_scalars().values())
        if skip is None:
            self._counters[0] += 1
        else:
            self._counters += torch.stack([skip == 0, skip != 0])
        self._end_step()
        if self.forward_hooks is None:
            self.finish_param_sync()
        else:
            self.forward_hooks.finish_outside()

    def _end_step(self) -> None:
        self._factors = self._factors_now()
        self._progress.step += 1
        self._forget_step()

    def _forget_step(self) -> None:
        if self._backward_updates is not None:
            self._backward_updates.forget_step()
        self._judge.forget_step()

    def _all_scalars(self) -> dict[int, StepScalars]:
        """By id of the param group."""
        self._hyperparameters.check(self.param_groups)
        return {id(group): self._scalars_of(group) for group in self.param_groups}

    def _scalars_of(self, group: dict) -> StepScalars:
        weight_decay = effective_weight_decay(group, self._decoupled_from)
        warn_if_decay_vanishes(group["lr"], weight_decay)
        return StepScalars.from_group(group["lr"], group["betas"], weight_decay)

    def _update(
        self,
        batch: ShardBatch,
        active: Tensor,  # [slices] fp32, 1 where the slice's parameter had a gradient
        skip: Tensor,  # [] fp32
        scalars: StepScalars,
        grad_scale: Tensor,  # [] fp32
        cautious_lrs: dict[BucketShard, Tensor],  # [slices] fp32
    ) -> None:
        backend = choose_backend(self._device, self.use_triton)
        sends_codes = isinstance(self._param_sync, SendCodes) and batch.groups.shard_group is not None
        encodes = sends_codes and backend == "triton" and not self.cautious  # in the update's own launch
        if batch.owning:
            arguments = {
                "grad_scale": grad_scale,
                "active": active,
                "seed": self.precision.seed,
                "cautious_lrs": torch.cat([cautious_lrs[shard] for shard in batch.owning]) if cautious_lrs else None,
                "backend": backend,
            }
            if self._meter.is_measuring and batch.groups.replicate_rank == 0:  # each element once
                with self._meter.clock.phase("measure"):
                    self._meter.add(measure(batch.tensors, batch.grads(), scalars, **arguments))
        if sends_codes:
            moves = ((active != 0) & (skip == 0)).split([len(shard.bucket.slices) for shard in batch.shards])
            for shard, moved in zip(batch.shards, moves, strict=True):
                codec = self._param_sync.codecs[shard.bucket]
                if encodes:
                    shard.update_and_encode(codec, scalars, moved, grad_scale)
                else:
                    shard.begin_codes(codec, scalars, moved, cautious_lrs.get(shard))
        if batch.owning and not encodes:  # unchecked: gradients are cut as the tensors are
            lion_update_(batch.tensors, batch.grads(), scalars, skip=skip, check=False, **arguments)

    def _cautious_lrs(self, scalars: dict[int, StepScalars], grad_scale: Tensor) -> dict[BucketShard, Tensor]:
        """[slices] fp32 for each shard, from counts over whole parameters: one small all-reduce a group of ranks."""
        by_groups: dict[ShardGroups, list[BucketShard]] = {}
        for shard in self.shards:
            by_groups.setdefault(shard.bucket.groups, []).append(shard)
        lrs = {}
        for groups, shards in by_groups.items():
            message = torch.cat([shard.count_aligned(scalars[id(shard.group)], grad_scale) for shard in shards])
            collectives.all_reduce(message, groups.shard_group)
            counts = message.split([len(shard.bucket.params) for shard in shards])
            for shard, count in zip(shards, counts, strict=True):
                lr = cautious_lr(scalars[id(shard.group)].lr, count, shard.param_numels)
                lrs[shard] = lr.index_select(0, shard.slice_params)
        return lrs

    @torch.no_grad()
    def _judge_gradients(self) -> Verdict:
        """Wait for every reduction, then ask all ranks once: norm, finite, used. Kept until ``step()``."""
        self._reduce_gradients()
        if self._judge.verdict is None:
            self._decide()
            self._stream.release()
        return self._judge.verdict

    def _reduce_gradients(self) -> None:
        """Every gradient that there is has been reduced, or is on its way."""
        if self._backward_updates is not None:
            raise RuntimeError(
                "with update_in_backward=True gradients are used as they come: there is no norm to clip by, to read or "
                "to scale by. Construct ShardedLion with ShardingConfig(update_in_backward=False)."
            )
        self._judge.drop_outdated(self.grad_scheduler.version)
        if self._judge.verdict is None:
            self._reduce_what_is_left()
        refuse_late_grads(self._params.names, self._module)

    def _reduce_what_is_left(self) -> None:
        if self.grad_scheduler.in_no_sync:
            raise RuntimeError(
                "step(), clip_grad_norm_() and grad_norm() inside no_sync() would use gradients that have not been "
                "reduced. Leave the no_sync() block before the last backward of the step."
            )
        self._refuse_new_wrappers()
        self.finish_param_sync()  # a step without a forward since the last
        self.grad_scheduler.finish_backward()
        if self._unfrozen():
            self._decide()  # what ranks without such parameters do now, too
            self._judge.agreement.wait()
            self._adopt_unfrozen()
            self.grad_scheduler.start_added()
            self._judge.verdict = None  # it knows nothing of the new buckets

    def _refuse_new_wrappers(self) -> None:
        """Before the first step, in which every wrapper must be known that is to be."""
        if not self._has_looked_for_wrappers:
            refuse_wrapped(self._params.names, self._module)
            refuse_sharded_since(self._params.module_names, self._module)
            self._has_looked_for_wrappers = True

    def _refuse_bare_capture(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() inside torch.cuda.graph() would leave a gather in flight that no replay waits for. Use "
                "lion_dist.CapturedStep, which captures the whole step and knows what lies between replays."
            )

    def _decide(self) -> None:
        with self._meter.clock.phase("norm"):
            self._judge.decide(self.buckets, self.grad_scheduler.version, self._choices)

    def _refuse_blind_scaler(self) -> None:
        if isinstance(getattr(self, "found_inf", None), int):  # the sum of no checks at all
            del self.found_inf, self.grad_scale  # which the scaler, interrupted here, would leave for later steps
            raise RuntimeError(
                "torch.amp.GradScaler found no gradients to check, for ShardedLion keeps them in shards. Use "
                "lion_dist.GradScaler, which finds them; everything else about it is torch's."
            )

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
        self._judge_gradients()
        return self._judge.clip(max_norm, self._loss_scale)

    @explained("grad_norm()")
    def grad_norm(self) -> Tensor:
        """[] fp32 on the device: the global norm of this step's gradients, averaged and unscaled, before clipping."""
        self._judge_gradients()
        return self._judge.norm(self._loss_scale)

    @explained("GradScaler.unscale_()")
    def unscale_and_check_(self, inverse_loss_scale: Tensor, loss_scale: Tensor | None = None) -> Tensor:
        """For ``lion_dist.GradScaler``: multiply gradients by ``inverse_loss_scale`` in the next step.

        ``loss_scale``: the scaler's, which ranks compare, whether this call unscales by it or ``step()``.

        Returns:
            [] fp32 on the device: 1 when a gradient is not finite on any rank.
        """
        values.instance("inverse_loss_scale", inverse_loss_scale, Tensor, "Use lion_dist.GradScaler, which passes it.")
        values.scalar_tensor("inverse_loss_scale", inverse_loss_scale)
        self._judge.inverse_loss_scale, self._judge.scaler_scale = inverse_loss_scale, loss_scale
        return self._judge_gradients().skip

    def set_grad_divisor(self, count: float | Tensor) -> None:
        """Divide this step's summed gradients by ``count`` (say, its tokens over all ranks) instead of the ranks.

        Call it before ``clip_grad_norm_`` and ``step``; it holds for one step. A tensor is not read by the host.
        """
        self._judge.set_divisor(count)

    def full_grad(self, param: Parameter) -> Tensor:
        """The gradient that ``step()`` will use for ``param``, whole, on every rank. All ranks call it together.

        It is summed over ranks and micro-batches, averaged (or divided as :meth:`set_grad_divisor` says), and unscaled
        once GradScaler has unscaled; not clipped: the unit of :meth:`grad_norm`. Zeros where no rank has a gradient.

        Returns:
            fp64, so that :meth:`set_full_grad` of what was read changes no bit of the sum; a copy.
        """
        bucket, position = self._reduced_place_of(param)
        return full_grad.read(bucket, position, self._judge.unscaling(self._loss_scale))

    def set_full_grad(self, param: Parameter, grad: Tensor) -> None:
        """Let the next ``step()`` use ``grad`` for ``param``, in the unit of :meth:`full_grad`.

        All ranks call it together, with the same ``grad``, after the last backward of the step and before
        :meth:`clip_grad_norm_`. The parameter counts as used. It is kept in fp32, or in the dtype of the wire where
        that carries one micro-batch's 16-bit sums.

        Raises:
            RuntimeError: gradients have been clipped already, by a norm that does not know of ``grad``.
        """
        if not isinstance(grad, Tensor) or grad.shape != param.shape or not grad.dtype.is_floating_point:
            raise ValueError(
                f"set_full_grad() takes a floating-point tensor of the parameter's shape {tuple(param.shape)}, got "
                f"{f'{grad.dtype} {tuple(grad.shape)}' if isinstance(grad, Tensor) else repr(grad)}"
            )
        self._judge.refuse_clipped("set_full_grad()")
        bucket, position = self._reduced_place_of(param)
        full_grad.write(bucket, position, grad.to(self._device), self._judge.unscaling(self._loss_scale))
        self.grad_scheduler.version += 1

    def _reduced_place_of(self, param: Parameter) -> tuple[Bucket, int]:
        """Where the reduced gradient of ``param`` is."""
        self._reduce_gradients()
        place = self.grad_scheduler.place_of(param)
        if place is None:
            raise ValueError(
                f"parameter {self._params.names.get(param, '(unknown)')!r} is frozen or not this optimizer's, and has "
                "no gradient"
            )
        return place

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
        for param in self._frozen:
            param.grad = None
        for left_by_scaler in ("grad_scale", "found_inf"):  # by one whose step() was interrupted
            self.__dict__.pop(left_by_scaler, None)
        if self._updating or self._param_sync.is_interrupted:
            self._gather_again()

    def _gather_again(self) -> None:
        """An exception has ended an update or a replay of codes: let every rank hold what the owners hold."""
        self._param_sync.give_up()
        buckets = self.buckets
        for bucket in buckets:
            bucket.gather_again()
        self._watch.note_updates(buckets, (param for bucket in buckets for param in bucket.params))
        self._updating.clear()

    # ---- parameters

    @explained("finish_param_sync()")
    def finish_param_sync(self) -> None:
        """Whatever follows may read every parameter of the model."""
        for shard in self.shards:
            shard.bucket.finish_param_sync()

    # ---- what CapturedStep asks for

    @contextlib.contextmanager
    def param_sync_by(self, strategy: LeaveStale) -> Iterator[None]:
        """Steps inside leave parameters to ``strategy``."""
        before, self._param_sync = self._param_sync, strategy
        try:
            yield
        finally:
            self._param_sync = before

    def start_param_sync(self) -> None:
        """Gather every bucket's parameters, beside what follows."""
        if self.forward_hooks is not None:
            self.forward_hooks.note_sync_starts()
        GatherParams().after_update(self.buckets)

    def before_replay(self) -> None:
        """Main params follow parameters that somebody else has written since the last step."""
        self._refresh_stale_main(self.shards)

    def after_replay(self) -> None:
        """A captured step has updated the shards."""
        buckets, self._consolidated = self.buckets, None
        for bucket in buckets:
            bucket.leave_stale()
        if self.forward_hooks is not None:
            self.forward_hooks.note_sync_starts()
        self._watch.note_updates(buckets, (param for bucket in buckets for param in bucket.params))

    @explained("refresh_main_params()")
    def refresh_main_params(self) -> None:
        """Make main params follow parameters that were written through ``.data``, which leaves no trace.

        ``load_state_dict``, ``copy_`` and other in-place operations are noticed without this call.
        """
        self.finish_param_sync()
        for shard in self.shards:
            self._watch.find_changes(shard.bucket)
            shard.refresh_main()

    def _refresh_stale_main(self, shards: Iterable[BucketShard]) -> None:
        """Main params follow parameters that somebody else has changed since our last update."""
        for shard in shards:
            if self._watch.find_changes(shard.bucket):
                shard.refresh_main()
                self._changed.add(shard.bucket)

    @explained("close()")
    def close(self) -> None:
        """Let go of the model: parameters are whole, hooks are removed, gradients stay with autograd.

        The optimizer takes no step afterwards; another can be constructed over the same parameters.
        """
        self.finish_param_sync()
        if self.forward_hooks is not None:
            self.forward_hooks.close()
        self.grad_scheduler.close()
        self._own_groups.give_back()
        self._is_closed = True

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
        return metrics_over_ranks(self._meter, self.groups) | {"skipped_steps": self.skipped_steps()}

    @explained("check_replicas()")
    def check_replicas(self) -> None:
        """Compare checksums of all ranks' parameters, and wait for the result. All ranks call it together.

        Raises:
            ReplicaError: on every rank, naming who differs from the owner in which bucket and parameters.
        """
        self.finish_param_sync()
        self._refresh_stale_main(self.shards)
        self._replicas.check(*self._copies())

    def _copies(self) -> tuple[list[Bucket], list[Frozen]]:
        """What all ranks must hold alike: buckets, and parameters that are not trained, the module's others too."""
        names, groups_for = self._params.names, self._params.groups_for
        frozen = [(names[p], p, groups_for(group)) for p, group in self._frozen.items()]
        for param, name in self._params.module_names.items():
            if param not in names and not param.requires_grad and type(param) is Parameter:
                frozen.append((name, param, self.groups))
        return self.buckets, frozen

    @torch.no_grad()
    @explained("broadcast_buffers()")
    def broadcast_buffers(self) -> None:
        """Make the module's buffers (such as BatchNorm's running statistics) the first rank's, on every rank.

        All ranks call it together: before they evaluate, and before they save a checkpoint, which holds the first
        rank's, and all ranks get those at a resume. In between, each rank's buffers follow its own batches.

        Raises:
            RuntimeError: no ``module`` was given.
        """
        if self._module is None:
            raise RuntimeError("broadcast_buffers() needs the model: construct ShardedLion with module=model")
        for buffer in self._module.buffers():
            self.groups.broadcast(buffer)

    @explained("resync_params()")
    def resync_params(self) -> None:
        """Replace every rank's parameters by their owners': the repair after a ``ReplicaError``. All ranks call it.

        Where shards have replicas (hybrid sharding), momentum and main params become the first replica's too.
        """
        self._param_sync.give_up()
        self.finish_param_sync()
        self._refresh_stale_main(self.shards)
        for shard in self.shards:
            shard.resync()
        for _, param, groups in self._copies()[1]:
            groups.broadcast(param.data)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes on this rank by kind, counted from the tensors. ``grads``: grad shards and the pooled buffers."""
        total = dict.fromkeys(("params", "main_params", "exp_avg", "grads"), 0)
        for shard in self.shards:
            total["params"] += shard.bucket.flat_params.nbytes
            total["main_params"] += 0 if shard.main_param is None else shard.main_param.nbytes
            total["exp_avg"] += shard.exp_avg.nbytes
            total["grads"] += shard.bucket.grad_shard_nbytes()
        total["params"] += sum(p.nbytes for p in self._frozen)
        total["grads"] += sum(transport.grad_buffer_nbytes for transport in self._transports.values())
        return total

    # ---- state_dict: this rank's part in torch's format (``state_dicts.py``), or on one rank the whole

    @property
    def counters(self) -> Tensor:
        """[2] int64 on the device, live: steps taken, steps skipped."""
        return self._counters

    @property
    def _live_state(self) -> LiveState:
        return LiveState(self.param_groups, self.shards, self._params.names, self._counters, self._decoupled_from)

    def _settled_state(self) -> LiveState:
        """With parameters whole, and main params that follow them."""
        self.finish_param_sync()
        self._refresh_stale_main(self.shards)
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
        live = self._settled_state()
        consolidated = self._fresh_consolidated()
        if consolidated is not None and consolidated.state_dict is not None:
            result = copied_containers(consolidated.state_dict)
        else:
            # The rank that holds the whole takes no part in gathering it once more.
            result = live.packed(live.by_param(maker_of_parts(gatherable=consolidated is None)))
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
        LoadPlan(self._settled_state(), state_dict).apply()
        self._consolidated = None
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @torch.no_grad()
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
        check_rank(to, self.groups)
        live = self._settled_state()
        self._consolidated = None
        meet(self.groups, "consolidate_state_dict")
        self._consolidated = Consolidated.of(live, to)

    def full_state_dict(self) -> dict:
        """What :meth:`consolidate_state_dict` gathered on this rank, in the format of plain ``Lion``: tensors in host
        memory by number of the parameter, groups with ``param_names``. ``Lion``, lion-pytorch's Lion and
        :meth:`load_state_dict` on any number of ranks take it.

        Raises:
            RuntimeError: nothing has been consolidated on this rank since the last step.
        """
        consolidated = self._fresh_consolidated()
        if consolidated is None or consolidated.state_dict is None:
            where = "" if consolidated is None else f" (it has, on rank {consolidated.to})"
            raise RuntimeError(
                f"the state has not been consolidated on this rank since it last changed{where}. Call "
                "consolidate_state_dict(to=...) on all ranks first, and this on that rank alone."
            )
        return copied_containers(consolidated.state_dict)

    def _fresh_consolidated(self) -> Consolidated | None:
        if self._consolidated is not None and not self._consolidated.is_of(self.param_groups, self.shards):
            self._consolidated = None
        return self._consolidated
