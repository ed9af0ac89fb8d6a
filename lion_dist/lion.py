"""``Lion``: a ``torch.optim.Optimizer`` over whatever tensors are local to this rank.

Plain parameters, the local shards of DTensors (FSDP2, tensor parallel), FSDP1's flat parameters, DeepSpeed's flat
partitions: Lion is elementwise, so the engine decides what is local and this class updates it. It never asks DTensor
to dispatch an operation in ``step()``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lion_dist import values
from lion_dist.adopted_state import adopt_state, adopting, check_group
from lion_dist.averages import KIND as AVERAGE
from lion_dist.averages import WeightSwap, init_average, not_averaged, with_average
from lion_dist.cautious import cautious_lrs_of_whole_tensors
from lion_dist.config import PrecisionPolicy, check_interval, check_policy
from lion_dist.hyperparameters import (
    HyperparameterWatch,
    check_hyperparameters,
    decoupling_lr,
    effective_weight_decay,
    warn_if_decay_vanishes,
)
from lion_dist.kernels import backends, update
from lion_dist.kernels.reference import StepScalars, skip_unusable
from lion_dist.lion_batches import LionBatches
from lion_dist.local_shard import LocalShard, local_tensor, share_axes
from lion_dist.main_params import collective_safe_state, init_main_param
from lion_dist.optional_guards import make_lion_guards
from lion_dist.optional_metrics import NO_METRICS, make_step_metrics, refuse_unmeasured
from lion_dist.param_checks import check_param
from lion_dist.step_rule import SpikeGuard, StepRule, check_guard, check_torch_options, not_guarded, note_max_lr
from lion_dist.update_batch import UpdateBatch


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
        skip_spikes: skip a step whose gradient norm, over all parameters and ranks, or whose loss (:meth:`observe`) is
            far above those before (``SpikeGuard``). FSDP1's flat parameters are refused.
        metrics_every: measure every n-th step, for :meth:`metrics`; 0 measures nothing and costs nothing.
        ema_decay: keep an average of the weights, ``average * ema_decay + weight * (1 - ema_decay)`` after each step,
            in the same launch and in ``precision.ema_dtype`` (fp32 or bf16); :meth:`averaged_parameters` puts it into
            the model. FSDP1's flat parameters are refused.

    State of a parameter: ``exp_avg`` (its shape, fp32 or bf16); with main params ``main_param`` (fp32, or the int16
    remainder); with ``ema_decay`` ``weight_avg``; with stochastic rounding ``step`` ([] int64). It is created when a
    gradient first comes.

    The *global element index* (``sharding/layout.py``) counts elements of full tensors in the order of
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
        ema_decay: float | None = None,
    ):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        check_hyperparameters(defaults)
        check_torch_options(foreach, fused, capturable, differentiable)
        self.rule = StepRule.of(cautious, cautious_factor, cautious_wd, corrected_weight_decay, maximize, ema_decay)
        self.precision = with_average(check_policy(precision), self.rule.ema_decay)
        self.skip_spikes, self.weight_swap = check_guard(skip_spikes), WeightSwap()
        self._spikes = None  # until the first step, when parameters are where they will stay
        self.use_triton = values.flag("use_triton", use_triton, optional=True)
        self._decoupled_from = decoupling_lr(lr, decoupled_weight_decay)
        self._guards = make_lion_guards(self)
        self._hyperparameters = HyperparameterWatch(self._decoupled_from, self.rule.corrected_weight_decay)
        self.metrics_every = check_interval("metrics_every", metrics_every)
        self._step_metrics = NO_METRICS  # until the first step, when parameters are where they will stay
        self._batches = LionBatches(self, self._guards)
        super().__init__(values.params(params), defaults)

    shares_verdict = False  # lion_dist.GradScaler: every rank that holds a shard knows of every other's overflow

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler hands over grad_scale and found_inf as device tensors, and nothing waits for the device.

        Not under FSDP1: its ShardedGradScaler lets the ranks agree only where the scaler itself unscales.
        """
        return not any(LocalShard.of(param).is_flat for group in self.param_groups for param in group["params"])

    def __getstate__(self) -> dict:
        """To copy or pickle: torch's own keeps defaults, state and param groups only."""
        kept = ("precision", "rule", "skip_spikes", "_spikes", "use_triton", "_decoupled_from", "metrics_every")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict) -> None:
        # Present when load_state_dict() calls this; absent in a copy.
        guards = make_lion_guards(self, state["param_groups"])
        fresh = {"_guards": guards, "_batches": LionBatches(self, guards)}
        fresh |= {"_step_metrics": NO_METRICS, "weight_swap": WeightSwap()}
        for name, value in fresh.items():
            self.__dict__.setdefault(name, value)
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
            self._guards.add_group(group)
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
        self.weight_swap.refuse("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._hyperparameters.check(self.param_groups)
        grad_scale, skip = self._scaling()
        self._batches.follow_moved_params()
        # Whatever may be refused is refused here, before anything is changed.
        found = [(group, *batch) for group in self.param_groups for batch in self._batches_of(group)]
        chosen = [backends.choose_backend(batch.tensors.device, self.use_triton) for _, batch, _ in found]
        scalars = [self._scalars(group) for group, _, _ in found]
        skip = skip_unusable(skip, scalars)
        if self.skip_spikes is not None:
            from lion_dist.spike_guard.lion import judge_spikes

            grad_scale, skip = judge_spikes(self._spike_watch(), found, grad_scale, skip)
        self._guards.note_step(bool(found))
        self._make_step_metrics()
        self._step_metrics.begin_step()
        with self._step_metrics.clock.phase("update"):
            for (_, batch, grads), backend, of_group in zip(found, chosen, scalars, strict=True):
                self._update(batch, grads, of_group, backend, grad_scale, skip)
        self._step_metrics.end_step(skip)
        return loss

    @property
    def spike_window(self) -> Tensor | None:
        """[2 * window + 5] fp64 on the device, live: the state of ``skip_spikes``."""
        return None if self.skip_spikes is None else self._spike_watch().state

    def observe(self, loss: Tensor | None = None, grad_norm: Tensor | None = None) -> None:
        """Hand over what ``skip_spikes`` is to judge the next step by, beside the gradients or instead of them.

        Args:
            loss: of the step, a tensor on the device; the same on all ranks that share parameters (their mean, say).
            grad_norm: in place of the step's own: what ``clip_grad_norm_`` returned, which leaves no spikes.
        """
        if self.skip_spikes is None:
            raise not_guarded()
        self._spike_watch().observe(loss, grad_norm)

    def _spike_watch(self):
        if self._spikes is None:
            from lion_dist.spike_guard.watch import SpikeWatch

            device = local_tensor(next(p for group in self.param_groups for p in group["params"])).device
            self._spikes = SpikeWatch(self.skip_spikes, device, backends.choose_backend(device, self.use_triton))
        return self._spikes

    @contextlib.contextmanager
    def averaged_parameters(self, module: torch.nn.Module | None = None) -> Iterator[None]:
        """A context in which the parameters hold the average of the weights (``ema_decay``), for evaluation or to save
        the model's ``state_dict()``. Afterwards they have the bits that they had before, also after an exception.

        Inside, :meth:`step`, this optimizer's state dicts and a backward pass are refused (FSDP2's at the end), and one
        copy of this rank's parameters is kept. A parameter without optimizer state stays as it is.

        Args:
            module: the model, where its parameters are DTensors (FSDP2); all ranks enter and leave together then.
        """
        if self.rule.ema_decay is None:
            raise not_averaged()
        params = [p for group in self.param_groups for p in group["params"] if AVERAGE in self.state.get(p, {})]
        from lion_dist.weight_swap import swap_local_shards

        with swap_local_shards(self.weight_swap, {p: self.state[p][AVERAGE] for p in params}, module):
            yield

    def _scalars(self, group: dict) -> StepScalars:
        weight_decay = effective_weight_decay(group, self._decoupled_from, self.rule.corrected_weight_decay)
        warn_if_decay_vanishes(group["lr"], weight_decay)
        return StepScalars.from_group(group["lr"], group["betas"], weight_decay)

    def _update(
        self, batch: UpdateBatch, grads: Sequence[Tensor], scalars: StepScalars, backend: str, grad_scale, skip
    ) -> None:
        params, tensors = batch.params, batch.tensors
        batch.follow_outside_writes()
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
            arguments["cautious_lrs"] = cautious_lrs_of_whole_tensors(
                batch, grads, scalars, self.rule.cautious_factor, grad_scale, backend
            )
        if self._step_metrics.is_measuring:
            from lion_dist.metrics.step_metrics import measure_batch

            with self._step_metrics.clock.phase("measure"):
                measure_batch(self._step_metrics, params, tensors, grads, scalars, **arguments)
        # Unchecked: each batch has accepted or made its gradients.
        update.lion_update_(tensors, grads, scalars, skip=skip, check=False, **arguments)
        batch.end_update()

    def _make_step_metrics(self) -> None:
        if self._step_metrics is NO_METRICS and self.metrics_every:
            first = next(p for group in self.param_groups for p in group["params"])
            self._step_metrics = make_step_metrics(self.metrics_every, local_tensor(first).device)  # pyrefly: ignore

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
        self._make_step_metrics()
        refuse_unmeasured(self._step_metrics)
        from lion_dist.metrics.step_metrics import metrics_of_rank

        params = [p for group in self.param_groups for p in group["params"]]
        spikes = {} if self.skip_spikes is None else self._spike_watch().report()
        return metrics_of_rank(self._step_metrics, params, process_group) | spikes

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """Return what GradScaler left on this object: (factor for the gradients, nonzero to skip)."""
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not isinstance(skip, Tensor):  # without any gradient torch's GradScaler sums an empty list: the int 0
            skip = None
        if skip is not None and not self.shares_verdict:
            params = [p for group in self.param_groups for p in group["params"]]
            if not share_axes(p if p.grad is None else p.grad for p in params):
                raise RuntimeError(
                    "torch's GradScaler asks only the ranks that share the first gradient whether one overflowed, and "
                    "these parameters are sharded over different axes: ranks would skip different steps. "
                    "Use lion_dist.GradScaler."
                )
        return None if scale is None else scale.double().reciprocal().float(), skip

    def _batches_of(self, group: dict) -> list[tuple[UpdateBatch, Sequence[Tensor]]]:
        return self._batches.of(group)

    def _fresh_state(self, param: Tensor) -> dict[str, Tensor]:
        precision, dtype = self.precision, param.dtype
        exp_avg = torch.zeros_like(
            param, dtype=precision.momentum_dtype_for(dtype), memory_format=torch.contiguous_format
        )
        state = {"exp_avg": exp_avg}
        main = init_main_param(param, precision.main_params_for(dtype))
        if main is not None:
            state["main_param"] = main.contiguous()
            self._batches.own_writes.note(param)
        average = init_average(param, precision.ema_dtype)
        if average is not None:
            state[AVERAGE] = average
        if precision.is_stochastic(dtype):
            state["step"] = torch.zeros((), dtype=torch.int64, device=local_tensor(param).device)
        return state

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """The state of ``param``, created if there is none yet."""
        if not self.state[param]:
            self.state[param] = self._fresh_state(param)
        return self.state[param]

    # ---- state_dict, in the shape of torch's and lion-pytorch's

    def state_dict(self) -> dict:
        """Return torch's form; main params of parameters that FSDP shards are as ``main_params.py`` describes.

        State of a parameter that is in no group any more is left out; it is there again when the parameter is.
        """
        self.weight_swap.refuse("state_dict()")
        params = [p for group in self.param_groups for p in group["params"]]
        present = set(params)
        orphans = {p: self.state.pop(p) for p in list(self.state) if isinstance(p, Tensor) and p not in present}
        try:
            result = super().state_dict()
        finally:
            self.state.update(orphans)
        state = {
            k: collective_safe_state(params[k], v) if isinstance(k, int) else v for k, v in result["state"].items()
        }
        guard = {} if self.skip_spikes is None else {"spike_guard": self.spike_window}
        return {**result, "state": state} | guard

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a ``state_dict`` of this class, of lion-pytorch's Lion, or of any other that keeps ``exp_avg``.

        ``exp_avg`` takes the configured dtype (with a warning where the file's differs), main params are made from
        the parameters where the file has none, averages of the weights begin there, and missing group keys are filled
        in. Load the model first.
        """
        values.state_dict(state_dict)
        self.weight_swap.refuse("load_state_dict()")
        with adopting(self, self._decoupled_from):
            super().load_state_dict(state_dict)

    def saved_window(self, state_dict: Mapping) -> Tensor | None:
        """The state of ``skip_spikes`` in ``state_dict``, checked; None without a guard."""
        return None if self.skip_spikes is None else self._spike_watch().checked(state_dict.get("spike_guard"))

    def take_over(self, states: Mapping[Tensor, dict], window: Tensor | None) -> None:
        """``states`` by parameter, made by :meth:`adopt_state`, and ``window`` are this optimizer's from here on."""
        self.state.update(states)
        self._batches.forget()
        if self._spikes is not None:
            self._spikes.load(window)

    def adopt_state(self, param: Tensor, saved: dict) -> dict[str, Tensor]:
        """State of ``param`` from what somebody else has saved or made of it."""
        state = adopt_state(param, saved, self._fresh_state(param))
        # The parameter may have been changed from outside just before the save. The next step lets fp32 main params
        # follow it; not now, for the model may be loaded after its optimizer.
        self._batches.own_writes.forget(param)
        return state
