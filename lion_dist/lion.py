"""``Lion``: a ``torch.optim.Optimizer`` over whatever tensors are local to this rank.

Plain parameters, the local shards of DTensors (FSDP2, tensor parallel), FSDP1's flat parameters, DeepSpeed's flat
partitions: Lion is elementwise, so the engine decides what is local and this class updates it. It never asks DTensor
to dispatch an operation in ``step()``.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lion_dist import values
from lion_dist.adopted_state import adopt_groups, adopt_state, check_group, fits
from lion_dist.canonical_index import CanonicalStarts
from lion_dist.config import HyperparameterWatch, PrecisionPolicy, check_hyperparameters, check_interval, check_policy
from lion_dist.engine_state import is_flat_param, movable_state, share_mesh_axes
from lion_dist.kernels.reference import StepScalars, cautious_lrs, join_main, skip_unusable, split_main
from lion_dist.kernels.update import LionTensors, choose_backend, count_aligned_elements, lion_update_
from lion_dist.local_tensors import check_memory, flat, local_tensor
from lion_dist.metrics.step_metrics import OFF, Meter, measure_batch, metrics_of_rank
from lion_dist.param_batch import STATE_KEYS, GroupBatches, ParamBatch
from lion_dist.param_checks import check_grad, check_no_overlap, check_param
from lion_dist.spike_guard import SpikeGuard, SpikeWatch, check_guard, not_guarded
from lion_dist.step_rule import StepRule, check_torch_options, note_max_lr
from lion_dist.unused_params import NoGradientWarning

_grad, _version = map(operator.attrgetter, ("grad", "_version"))


def effective_weight_decay(group: dict, decoupled_from: float | None, corrected: bool = False):
    """What a step multiplies by lr to have its decay.

    lion-pytorch's ``decoupled_weight_decay``: the decay is divided by the constructor's learning rate. ``corrected``
    (arXiv 2512.08217): it is multiplied by lr / max_lr, in fp64 on the host or, for tensors, on the device.
    """
    weight_decay, lr = group["weight_decay"], group["lr"]
    if decoupled_from is not None:
        weight_decay = (weight_decay if isinstance(weight_decay, Tensor) else float(weight_decay)) / decoupled_from
    if corrected:
        lr, max_lr, weight_decay = map(_as_fp64, (lr, group["max_lr"], weight_decay))
        weight_decay = weight_decay * (lr / max_lr)
    return weight_decay


def _as_fp64(value):
    return value.double().reshape(()) if isinstance(value, Tensor) else float(value)


def decoupling_lr(lr, decoupled_weight_decay: bool) -> float | None:
    if not values.flag("decoupled_weight_decay", decoupled_weight_decay):
        return None
    if not float(lr) > 0:
        raise ValueError(
            f"decoupled_weight_decay divides by the initial lr, which must be above 0, got {values.shown(lr)}. Let a "
            "schedule begin above 0, or pass decoupled_weight_decay=False."
        )
    return float(lr)


_warned_of_decay: set[float] = set()


def warn_if_decay_vanishes(lr, weight_decay) -> None:
    """``1 - lr * weight_decay`` is 1 in fp32 below about 6e-8: say so, once; a schedule passes many such products."""
    if isinstance(lr, Tensor) or isinstance(weight_decay, Tensor):
        return
    product = float(lr) * float(weight_decay)
    if 0 < product < 2**-24 and not _warned_of_decay:
        _warned_of_decay.add(product)
        warnings.warn(
            f"lr * weight_decay = {product:.1e} is below 6e-8: 1 - lr * weight_decay rounds to 1 in fp32 and weights "
            "do not decay. Raise weight_decay, or ignore this during warm-up.",
            stacklevel=3,
        )


def main_for(param: Tensor, kind: str) -> Tensor | None:
    """Fresh main params for a local ``param``: ``kind`` is ``PrecisionPolicy.main_params_for``'s answer."""
    if kind == "fp32":
        return param.detach().float()
    if kind == "split":
        return torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
    return None


@torch.no_grad()
def refresh_main_(main: Tensor, param: Tensor) -> None:
    """Let fp32 ``main`` follow a low-precision ``param`` that was changed from outside; of one shape, in place.

    The upper 16 bits become the parameter's and the remainder stays: exactly what happens to ``"split"`` main params,
    whose upper half *is* the parameter, and nothing at all where the parameter did not change.
    """
    if param.dtype == torch.bfloat16:
        main.copy_(join_main(param, split_main(main)[1]))
    else:
        main.copy_(torch.where(main.to(param.dtype) == param, main, param.float()))


def has_fp32_main(tensors: LionTensors) -> bool:
    return tensors.mains is not None and tensors.mains[0].dtype == torch.float32


class Lion(Optimizer):
    """Lion (arXiv 2302.06675), a drop-in for lion-pytorch's class.

    Args:
        params: parameters, param groups or (name, parameter) pairs.
        lr: learning rate, a float or a 0-d tensor on the parameters' device; Lion wants 3 to 10 times less than AdamW.
        betas: of the update's interpolation and of the momentum; each in [0, 1).
        weight_decay: decoupled from the gradient as in AdamW: weights shrink by ``lr * weight_decay`` a step.
        use_triton: None uses the Triton kernel where it can run; True insists on it; False forbids it.
        decoupled_weight_decay: lion-pytorch's: divide ``weight_decay`` by the initial lr.
        precision: dtypes and rounding of the state.
        cautious: step only where update and gradient agree in sign, and further there (arXiv 2411.16085). It reads
            gradients and momentum twice, and needs whole tensors: FSDP1's flat parameters are refused.
        cautious_factor: lion-pytorch's: what a step elsewhere is multiplied by, 0 to 1. None: 0 with ``cautious``.
            Given, the step is cautious; 1 is the plain step.
        cautious_wd: decay only where the step and the parameter have the same sign (arXiv 2510.12402).
        corrected_weight_decay: weights shrink by ``weight_decay * lr**2 / max_lr`` a step (arXiv 2512.08217), where
            ``max_lr`` is the group's key of that name: its first learning rate, unless given or set by a scheduler.
            With ``decoupled_weight_decay`` that weight decay is divided by the initial lr first.
        maximize: follow the gradient upwards.
        foreach, fused, capturable, differentiable: torch.optim's. The first three ask for what a step is anyway; the
            last is refused.
        skip_spikes: skip a step whose gradient norm, over all parameters and ranks, is far above those before
            (``SpikeGuard``); a loss or a norm of the program's own is judged too (:meth:`observe`). FSDP1's flat
            parameters are refused.
        metrics_every: measure every so-manieth step, for :meth:`metrics`; 0 measures nothing and costs nothing.

    State of a parameter: ``exp_avg`` (its shape, fp32 or bf16); with main params ``main_param`` (fp32, or the int16
    remainder); with stochastic rounding ``step`` ([] int64). It is created when a gradient first comes.

    A parameter's *canonical index* (``sharding/layout.py``) counts elements of full tensors in the order of
    ``param_groups``. Bits of stochastic rounding are independent of sharding for plain tensors and for DTensors
    sharded on dim 0.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        use_triton: bool | None = None,
        decoupled_weight_decay: bool = False,
        *,
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
    ):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        check_hyperparameters(defaults)
        check_torch_options(foreach, fused, capturable, differentiable)
        self.rule = StepRule.of(cautious, cautious_factor, cautious_wd, corrected_weight_decay, maximize)
        self.precision, self.skip_spikes = check_policy(precision), check_guard(skip_spikes)
        self._spikes: SpikeWatch | None = None  # until the first step, when parameters are where they will stay
        self.use_triton = values.flag("use_triton", use_triton, optional=True)
        self._decoupled_from = decoupling_lr(lr, decoupled_weight_decay)
        self._no_gradients = NoGradientWarning()
        self._starts: CanonicalStarts | None = None  # of the known batches; None: no random bits were drawn
        self._hyperparameters = HyperparameterWatch(self._decoupled_from, self.rule.corrected_weight_decay)
        self.metrics_every = check_interval("metrics_every", metrics_every)
        self._meter: Meter = OFF  # until the first step, when parameters are where they will stay
        self._known_batches: dict[int, GroupBatches] = {}  # by id of the param group, from the last step
        # Of params with main params, by id: (version counter, address) after our last write; or the batch knows it.
        self._written: dict[int, tuple[int | None, int]] = {}
        super().__init__(values.params(params), defaults)

    shares_verdict = False  # lion_dist.GradScaler: every rank that holds a shard knows of every other's overflow

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler hands over grad_scale and found_inf as device tensors, and nothing waits for the device.

        Not under FSDP1: its ShardedGradScaler lets the ranks agree only where the scaler itself unscales.
        """
        return not any(is_flat_param(param) for group in self.param_groups for param in group["params"])

    def __getstate__(self) -> dict:
        """To copy or pickle: torch's own keeps defaults, state and param groups only."""
        kept = ("precision", "rule", "skip_spikes", "_spikes", "use_triton", "_decoupled_from", "metrics_every")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict) -> None:
        for cache in ("_known_batches", "_written"):  # present when load_state_dict() calls this
            self.__dict__.setdefault(cache, {})
        self.__dict__.setdefault("_meter", OFF)
        self.__dict__.setdefault("_starts", None)
        self.__dict__.setdefault("_no_gradients", NoGradientWarning())
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch's __setstate__ adds it; a fresh optimizer has no such key
        self._hyperparameters = HyperparameterWatch(self._decoupled_from, self.rule.corrected_weight_decay)

    def add_param_group(self, param_group: dict) -> None:
        """Append a param group, whose settings are checked as the first ones were."""
        values.param_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self._decoupled_from)
            if self.rule.corrected_weight_decay:
                note_max_lr(group)
            names = group.get("param_names", [f"parameter {i} of the group" for i in range(len(group["params"]))])
            for name, param in zip(names, group["params"], strict=True):
                check_param(param, name)
                self.precision.main_params_for(param.dtype)
                if self.rule.is_cautious:
                    _refuse_hidden_boundaries(param, name)
                if self.skip_spikes is not None:
                    _refuse_hidden_ranks(param, name)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch._disable_dynamo  # compiled, it updated nothing in the second step after add_param_group()
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """One step for every parameter that has a gradient. Returns what ``closure`` returned.

        Raises:
            ValueError: a param group holds an lr, betas or weight_decay that cannot be used; nothing is changed.
        """
        values.closure(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._hyperparameters.check(self.param_groups)
        grad_scale, skip = self._scaling()
        self._follow_moved_params()
        # Whatever may be refused is refused here, before anything is changed.
        found = [(group, *batch) for group in self.param_groups for batch in self._batches(group)]
        backends = [choose_backend(batch.tensors.device, self.use_triton) for _, batch, _ in found]
        scalars = [self._scalars(group) for group, _, _ in found]
        skip = skip_unusable(skip, scalars)
        if self.skip_spikes is not None:
            skip = self._judge_spikes(found, grad_scale, skip)
        if self._no_gradients.is_waiting:
            self._note_gradients(bool(found))
        self._make_meter()
        self._meter.begin_step()
        with self._meter.clock.phase("update"):
            for (_, batch, grads), backend, of_group in zip(found, backends, scalars, strict=True):
                self._update(batch, grads, of_group, backend, grad_scale, skip)
        self._meter.end_step(skip)
        return loss

    @property
    def spike_window(self) -> Tensor | None:
        """[2 * window + 5] fp64 on the device, live: the state of ``skip_spikes``."""
        return None if self.skip_spikes is None else self._spike_watch().state

    def observe(self, loss: Tensor | None = None, grad_norm: Tensor | None = None) -> None:
        """Hand over what ``skip_spikes`` is to judge the next step by, beside the gradients or instead of them.

        Args:
            loss: of the step, a tensor on the device; the same on all ranks that share parameters (their mean, say).
            grad_norm: in place of the one that the step computes itself: what ``clip_grad_norm_`` has returned, for
                the gradients that it leaves have no spikes.
        """
        if self.skip_spikes is None:
            raise not_guarded()
        self._spike_watch().observe(loss, grad_norm)

    def _spike_watch(self) -> SpikeWatch:
        if self._spikes is None:
            first = next(p for group in self.param_groups for p in group["params"])
            device = local_tensor(first).device
            self._spikes = SpikeWatch(self.skip_spikes, device, choose_backend(device, self.use_triton))
        return self._spikes

    def _judge_spikes(self, found: list[tuple], grad_scale: Tensor | None, skip: Tensor | None) -> Tensor | None:
        rates = [group["lr"] for group in self.param_groups]
        if not found or not any(isinstance(lr, Tensor) or lr for lr in rates):
            return skip  # torch.distributed.checkpoint makes state by a step of lr 0, with gradients of its own
        norm, loss = self._spike_watch().take_given()
        if norm is None:
            squares = []
            for _, batch, grads in found:
                of_batch = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)).square()
                sum_over_shards_(of_batch, batch.params)
                squares.append(of_batch.sum().to(self._spikes.state.device, non_blocking=True))
            norm = torch.stack(squares).sum().sqrt()
            norm = norm if grad_scale is None else norm * grad_scale.to(norm.device)
        return self._spikes.verdict(norm, loss, skip)

    def _scalars(self, group: dict) -> StepScalars:
        weight_decay = effective_weight_decay(group, self._decoupled_from, self.rule.corrected_weight_decay)
        warn_if_decay_vanishes(group["lr"], weight_decay)
        return StepScalars.from_group(group["lr"], group["betas"], weight_decay)

    def _note_gradients(self, any_gradients: bool) -> None:
        rates = [group["lr"] for group in self.param_groups]
        if not any(isinstance(lr, Tensor) or lr for lr in rates):
            return  # torch.distributed.checkpoint makes state by such a step, with gradients of its own
        params = [p for group in self.param_groups for p in group["params"]]
        if any_gradients or any(is_lazy(p) or local_tensor(p).numel() for p in params):  # else no part to train here
            self._no_gradients.note_step(any_gradients)

    def _update(
        self, batch: ParamBatch, grads: Sequence[Tensor], scalars: StepScalars, backend: str, grad_scale, skip
    ) -> None:
        params, tensors = batch.params, batch.tensors
        self._refresh_stale_main(batch)
        if skip is not None:
            skip = skip.to(tensors.device, non_blocking=True)  # where groups lie on several devices
        grad_scale = self.rule.signed(grad_scale, tensors.device)
        arguments = {
            "grad_scale": grad_scale,
            "seed": self.precision.seed,
            "cautious_wd": self.rule.cautious_wd,
            "backend": backend,
        }
        if self.rule.is_cautious:
            arguments["cautious_lrs"] = self._cautious_lrs(batch, grads, scalars, grad_scale, backend)
        if self._meter.is_measuring:
            with self._meter.clock.phase("measure"):
                measure_batch(self._meter, params, tensors, grads, scalars, **arguments)
        # Unchecked: each batch has accepted or made its gradients.
        lion_update_(tensors, grads, scalars, skip=skip, check=False, **arguments)
        batch.write_back()
        torch.autograd.graph.increment_version(params)  # the Triton kernel writes behind autograd's back
        if has_fp32_main(tensors):
            batch.written = list(map(_version, params))

    def _make_meter(self) -> None:
        if self._meter is OFF and self.metrics_every:
            first = next(p for group in self.param_groups for p in group["params"])
            self._meter = Meter(self.metrics_every, local_tensor(first).device)

    @torch.no_grad()
    def metrics(self, process_group: ProcessGroup | None = None) -> dict:
        """What the last measured step did; ``docs/metrics.md`` defines every key.

        It waits for the device. Over DTensors (FSDP2, tensor parallel) all ranks call it together: sums over shards are
        exchanged, one short message a mesh axis. Before the first measured step ``step`` is 0 and the rest NaN.

        Args:
            process_group: the ranks among which an engine cuts what this optimizer sees as plain tensors (FSDP1's and
                DeepSpeed's flat partitions); None: plain tensors are whole here.

        Raises:
            RuntimeError: ``metrics_every`` is 0.
        """
        remedy = "Pass the group among whose ranks an engine cuts the parameters."
        values.instance("process_group", process_group, ProcessGroup, remedy, optional=True)
        self._make_meter()
        params = [p for group in self.param_groups for p in group["params"]]
        spikes = {} if self.skip_spikes is None else self._spike_watch().report()
        return metrics_of_rank(self._meter, params, process_group) | spikes

    def _cautious_lrs(self, batch: ParamBatch, grads, scalars: StepScalars, grad_scale, backend: str) -> Tensor:
        """[T, 2] fp32, from counts over whole tensors: one small all-reduce per mesh axis that shards them."""
        counts = count_aligned_elements(
            batch.tensors, grads, scalars, grad_scale=grad_scale, backend=backend, check=False
        )
        sum_over_shards_(counts, batch.params)
        return cautious_lrs(scalars.lr, counts, batch.full_numels, self.rule.cautious_factor)

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """What GradScaler left on this object: (factor for the gradients, nonzero to skip)."""
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not isinstance(skip, Tensor):  # without any gradient torch's GradScaler sums an empty list: the int 0
            skip = None
        if skip is not None and not self.shares_verdict:
            params = [p for group in self.param_groups for p in group["params"]]
            if not share_mesh_axes(p if p.grad is None else p.grad for p in params):
                raise RuntimeError(
                    "torch's GradScaler asks only the ranks that share the first gradient whether one overflowed, and "
                    "these parameters are sharded over different axes: ranks would skip different steps. "
                    "Use lion_dist.GradScaler."
                )
        return None if scale is None else scale.double().reciprocal().float(), skip

    def _batches(self, group: dict) -> list[tuple[ParamBatch, Sequence[Tensor]]]:
        """The group's parameters that have a gradient, in batches of like tensors (one launch each), and gradients."""
        params = group["params"]
        grads = list(map(_grad, params))
        types = set(map(type, grads))
        if type(None) in types:
            types.discard(type(None))
            params, grads = [p for p in params if p.grad is not None], [g for g in grads if g is not None]
        known = self._known_batches.get(id(group))
        if known is None or not known.holds(params):
            if known is not None:
                self._remember_written(known.batches)
            known = GroupBatches(params)
        grads = known.placements.local_grads(grads, types)
        matched = known.match(grads, self.state)
        if matched is None:
            self._remember_written(known.batches)
            self._create_states()  # all at once: a group's state that comes later would outdate this group's batches
            matched = self._sort_into_batches(params, grads)
            known.set_batches([batch for batch, _ in matched], self.state)
            self._known_batches[id(group)] = known
        return matched

    def _create_states(self) -> None:
        """For every parameter with a gradient; state that a user put there, or of a parameter that has changed dtype or
        device, is made to fit."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                check_memory(local_tensor(param), "a parameter")
                state = self.state_of(param)
                if not fits(param, state, self._state_dtypes(param)):
                    self.state[param] = self._adopt_state(param, state)

    def _follow_moved_params(self) -> None:
        """Canonical indices count all parameters: where one was swapped, added or removed, those behind it moved."""
        if self._starts is None or self._starts.hold_for(self.param_groups):
            return
        for known in self._known_batches.values():
            self._remember_written(known.batches)
        self._known_batches.clear()
        self._starts = None

    def _sort_into_batches(self, params: list[Tensor], grads: Sequence[Tensor]):
        alike: dict[tuple, list[int]] = {}
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            check_grad(param, grad)
            check_no_overlap(param, "a parameter")
            alike.setdefault((grad.device, param.dtype, grad.dtype), []).append(i)
        result = []
        for (_, _, grad_dtype), positions in alike.items():
            members = [params[i] for i in positions]
            states = [self.state_of(p) for p in members]
            batch = ParamBatch(positions, members, states, self._flatten(members), grad_dtype)
            if has_fp32_main(batch.tensors):
                batch.written = self._written_versions(batch)
            result.append((batch, [grads[i].contiguous() for i in positions]))
        return result

    def _flatten(self, params: list[Tensor]) -> LionTensors:
        states = [self.state_of(p) for p in params]
        columns = {key: [flat(s[key]) for s in states] for key in STATE_KEYS[:2] if key in states[0]}
        starts = steps = None
        if "step" in states[0]:
            if self._starts is None:
                self._starts = CanonicalStarts(self.param_groups)
            starts, steps = self._starts, torch.stack([s["step"] for s in states])
            for state, step in zip(states, steps.unbind(), strict=True):  # views: one addition counts all
                state["step"] = step
        return LionTensors(
            params=[flat(p) for p in params],
            exp_avgs=columns["exp_avg"],
            mains=columns.get("main_param"),
            index_starts=None if starts is None else [starts.of(p) for p in params],
            steps=steps,
            stochastic_momentum=self.precision.momentum_rounding == "stochastic"
            and states[0]["exp_avg"].dtype == torch.bfloat16,
        )

    def _fresh_state(self, param: Tensor) -> dict[str, Tensor]:
        precision, dtype = self.precision, param.dtype
        exp_avg = torch.zeros_like(
            param, dtype=precision.momentum_dtype_for(dtype), memory_format=torch.contiguous_format
        )
        state = {"exp_avg": exp_avg}
        main = main_for(param, precision.main_params_for(dtype))
        if main is not None:
            state["main_param"] = main.contiguous()
            self._written[id(param)] = param._version, local_tensor(param).data_ptr()
        if precision.is_stochastic(dtype):
            state["step"] = torch.zeros((), dtype=torch.int64, device=local_tensor(param).device)
        return state

    def _state_dtypes(self, param: Tensor) -> dict[str, torch.dtype]:
        """Of every entry of :meth:`_fresh_state`."""
        precision, dtype = self.precision, param.dtype
        dtypes = {"exp_avg": precision.momentum_dtype_for(dtype)}
        kind = precision.main_params_for(dtype)
        if kind in ("fp32", "split"):
            dtypes["main_param"] = torch.float32 if kind == "fp32" else torch.int16
        if precision.is_stochastic(dtype):
            dtypes["step"] = torch.int64
        return dtypes

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """The state of ``param``, created if there is none yet."""
        if not self.state[param]:
            self.state[param] = self._fresh_state(param)
        return self.state[param]

    def _remember_written(self, batches: Sequence[ParamBatch]) -> None:
        """For the batches that take the place of these."""
        for batch in batches:
            if has_fp32_main(batch.tensors):
                marks = zip(batch.written, batch.addresses, strict=True)
                self._written.update(zip(map(id, batch.params), marks, strict=True))

    def _written_versions(self, batch: ParamBatch) -> list[int | None]:
        """The version counter after our last write of each parameter; None where that was elsewhere, or is unknown."""
        marks = [self._written.get(id(param), (None, None)) for param in batch.params]
        return [version if at == now else None for (version, at), now in zip(marks, batch.addresses, strict=True)]

    def _refresh_stale_main(self, batch: ParamBatch) -> None:
        """fp32 main params follow parameters that somebody else has written since our last step, or put elsewhere
        (load_state_dict, EMA, ``param.data = ...``)."""
        if not has_fp32_main(batch.tensors):
            return
        versions = list(map(_version, batch.params))
        if versions == batch.written:
            return
        mains = zip(batch.written, versions, batch.tensors.params, batch.tensors.mains, strict=True)
        for before, now, low_precision, main in mains:
            if before != now:
                refresh_main_(main, low_precision)

    # ---- state_dict, in the shape of torch's and lion-pytorch's

    def state_dict(self) -> dict:
        """As torch's; main params of parameters that FSDP shards as ``engine_state.py`` describes.

        State of a parameter that is in no group any more is left out; it is there again when the parameter is.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        present = set(params)
        orphans = {p: self.state.pop(p) for p in list(self.state) if isinstance(p, Tensor) and p not in present}
        try:
            result = super().state_dict()
        finally:
            self.state.update(orphans)
        state = {k: movable_state(params[k], v) if isinstance(k, int) else v for k, v in result["state"].items()}
        guard = {} if self.skip_spikes is None else {"spike_guard": self.spike_window}
        return {**result, "state": state} | guard

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a ``state_dict`` of this class, of lion-pytorch's Lion, or of any other that keeps ``exp_avg``.

        ``exp_avg`` takes the configured dtype (with a warning where the file's differs), main params are made from
        the parameters where the file has none, and missing group keys are filled in. Load the model first.
        """
        values.state_dict(state_dict)
        states: dict[Tensor, dict] = {}
        window: dict[str, Tensor | None] = {}

        def adopt(_self, state_dict: dict) -> dict:  # after a user's own hooks, which may have changed it
            groups = adopt_groups(state_dict["param_groups"], self.param_groups, self.defaults, self._decoupled_from)
            saved_ids = [i for group in groups for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            saved = state_dict["state"]
            pairs = zip(saved_ids, params, strict=False)  # torch says so when there are more or fewer
            states.update({param: self._adopt_state(param, saved[i]) for i, param in pairs if i in saved})
            if self.skip_spikes is not None:
                window["saved"] = self._spike_watch().checked(state_dict.get("spike_guard"))
            return {**state_dict, "state": {}, "param_groups": groups}

        def take_over(_self) -> None:  # before a user's own hooks, which may look at it
            self.state.update(states)
            self._known_batches.clear()
            if self._spikes is not None:
                self._spikes.load(window["saved"])

        hooks = [
            self.register_load_state_dict_pre_hook(adopt),
            self.register_load_state_dict_post_hook(take_over, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _adopt_state(self, param: Tensor, saved: dict) -> dict[str, Tensor]:
        state = adopt_state(param, saved, self._fresh_state(param))
        # The parameter may have been changed from outside just before the save. The next step lets fp32 main params
        # follow it; not now, for the model may be loaded after its optimizer.
        self._written.pop(id(param), None)
        return state


def _refuse_hidden_boundaries(param: Tensor, name: str) -> None:
    if is_flat_param(param):
        raise ValueError(
            f"cautious=True needs a statistic over each whole tensor, but {name} is part of FSDP1's flat parameter, "
            "which hides where tensors begin. Use fully_shard (FSDP2), or cautious=False."
        )


def _refuse_hidden_ranks(param: Tensor, name: str) -> None:
    if is_flat_param(param):
        raise ValueError(
            f"skip_spikes needs the norm over all ranks' gradients, but {name} is part of FSDP1's flat parameter, "
            "which does not say among which ranks it is cut. Use fully_shard (FSDP2), or skip_spikes=None."
        )


def sum_over_shards_(counts: Tensor, params: list[Tensor]) -> None:
    """Sum [T] ``counts`` of local shards, in place, over the ranks that hold the other shards of each DTensor."""
    axes: dict[tuple, list[int]] = {}  # (mesh, axis) -> positions of the tensors that it shards
    for i, param in enumerate(params):
        for axis, placement in enumerate(getattr(param, "placements", ())):
            if not placement.is_replicate():  # FSDP over tensor parallel is a strided shard, which denies is_shard()
                axes.setdefault((param.device_mesh, axis), []).append(i)
    for (mesh, axis), positions in axes.items():
        if len(positions) == len(params):
            torch.distributed.all_reduce(counts, group=mesh.get_group(axis))
        else:
            index = torch.tensor(positions).to(counts.device, non_blocking=True)
            part = counts[index]
            torch.distributed.all_reduce(part, group=mesh.get_group(axis))
            counts[index] = part
