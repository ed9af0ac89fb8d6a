"""The gradients of the next step: reduced, checked by all ranks together, and multiplied by one factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Parameter

from lion_dist.grad_placement import local_grads_like
from lion_dist.local_shard import with_local
from lion_dist.sharded_params import ShardedParams
from lion_dist.sharding import full_grad
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.grad_norm import SumOfSquares, sum_of_squares
from lion_dist.sharding.gradient_check import CheckResult, GradientCheck
from lion_dist.sharding.phases import PhaseLabels
from lion_dist.sharding.scheduler import GradScheduler
from lion_dist.step_rule import SpikeGuard

if TYPE_CHECKING:
    from lion_dist.optional_guards import Guards
    from lion_dist.spike_guard.watch import SpikeWatch


class StepGradients:
    """What ``clip_grad_norm_``, ``grad_norm``, ``full_grad`` and ``step`` ask of a step's gradients.

    Args:
        loss_scale: returns that of a GradScaler around ``step()`` that has not unscaled.
        gradient_check: checks the gradients as a whole and keeps the factor that multiplies them.
        spikes: of ``skip_spikes``; None: no step is skipped for one.
        guards: refuse gradients that would not count.
        before_reducing: called before the gradients that are left are reduced.
        used_in_backward: backward updates with each gradient as it comes, and none is left to ask about.
        adopt: gives buckets to parameters (and their groups) that take gradients now.
    """

    def __init__(
        self,
        params: ShardedParams,
        loss_scale: Callable[[], Tensor | None],
        scheduler: GradScheduler,
        gradient_check: GradientCheck,
        spikes: SpikeWatch | None,
        stream: CommStream,
        clock: PhaseLabels,
        guards: Guards,
        before_reducing: Callable[[], None],
        adopt: Callable[[list[tuple[Parameter, dict]]], None],
        *,
        used_in_backward: bool,
    ):
        self._params, self.loss_scale, self._guards = params, loss_scale, guards
        self._scheduler, self.gradient_check, self.spikes = scheduler, gradient_check, spikes
        self._stream, self.clock = stream, clock
        self._before_reducing, self._adopt = before_reducing, adopt
        self._used_in_backward = used_in_backward
        self.buckets: list[Bucket] = []

    # ---- reductions

    def reduce(self) -> None:
        """Every gradient that there is has been reduced, or is on its way."""
        if self._used_in_backward:
            raise RuntimeError(
                "with update_in_backward=True gradients are used as they come: there is no norm to clip by, to read or "
                "to scale by. Construct ShardedLion with ShardingConfig(update_in_backward=False)."
            )
        self.gradient_check.drop_outdated(self._scheduler.version)
        if self.gradient_check.result is None:
            self._reduce_what_is_left()
        self._guards.refuse_late_grads()

    def _reduce_what_is_left(self) -> None:
        if self._scheduler.in_no_sync:
            raise RuntimeError(
                "step(), clip_grad_norm_() and grad_norm() inside no_sync() would use gradients that have not been "
                "reduced. Leave the no_sync() block before the last backward of the step."
            )
        self._guards.before_reducing()
        self._before_reducing()
        self._scheduler.finish_backward()
        if self._params.unfrozen():
            self._run_check()  # what ranks without such parameters do now, too
            self.adopt_unfrozen()
            self._scheduler.start_added()
            self.gradient_check.result = None  # it knows nothing of the new buckets

    def adopt_unfrozen(self) -> None:
        """Parameters that take gradients now get buckets. Every rank has started the reductions of the others, so that
        ranks with and without a batch come to the new ones' broadcast at the same point; and ranks have compared that
        they are the same ones."""
        unfrozen = self._params.unfrozen()
        self._guards.check_unfrozen([param for param, _ in unfrozen])
        self._adopt(unfrozen)
        for param, _ in unfrozen:
            del self._params.frozen[param]

    # ---- what all ranks know

    def check(self) -> CheckResult:
        """Wait for every reduction, then ask all ranks once: norm, finite, used. Kept until ``step()``."""
        self.reduce()
        if self.gradient_check.result is None:
            self._run_check()
            self._stream.release()
        return self.gradient_check.result  # pyrefly: ignore[bad-return] # it has run

    def checked(self, skip: Tensor | None) -> CheckResult:
        """Return the result of the check, which skips also where ``skip`` ([] on the device) is not 0, and spikes."""
        if self.spikes is not None:
            with self.clock.phase("norm"):
                loss = self.spikes.take_mean_loss(self._params.groups_for({}))
                skip = self.spikes.verdict(self.gradient_check.norm(self.loss_scale()), loss, skip)
            self.gradient_check.clip_by(self.spikes.clip_coefficient)
        return self.gradient_check.skip_unusable(skip)

    @property
    def guard(self) -> SpikeGuard | None:
        return None if self.spikes is None else self.spikes.guard

    def _run_check(self) -> None:
        with self.clock.phase("norm"):
            agreement = self._guards.agreement
            self.gradient_check.run(self.buckets, self._scheduler.version, agreement.begin(), agreement.end)

    # ---- one parameter's

    def read(self, param: Parameter) -> Tensor:
        """Return what ``ShardedLion.full_grad`` returns."""
        bucket, position = self._place_of(param)
        return with_local(param, full_grad.read(bucket, position, self.gradient_check.unscaling(self.loss_scale())))

    def write(self, param: Parameter, grad: Tensor) -> None:
        """Do what ``ShardedLion.set_full_grad`` does."""
        if not isinstance(grad, Tensor) or grad.shape != param.shape or not grad.dtype.is_floating_point:
            raise ValueError(
                f"set_full_grad() takes a floating-point tensor of the parameter's shape {tuple(param.shape)}, got "
                f"{f'{grad.dtype} {tuple(grad.shape)}' if isinstance(grad, Tensor) else repr(grad)}"
            )
        self.gradient_check.refuse_clipped("set_full_grad()")
        bucket, position = self._place_of(param)
        (local,) = local_grads_like([grad], [param])
        full_grad.write(bucket, position, local.to(bucket.device), self.gradient_check.unscaling(self.loss_scale()))
        self._scheduler.version += 1

    def _place_of(self, param: Parameter) -> tuple[Bucket, int]:
        """Where the reduced gradient of ``param`` is."""
        self.reduce()
        place = self._scheduler.place_of(param)
        if place is None:
            raise ValueError(
                f"parameter {self._params.names.get(param, '(unknown)')!r} is frozen or not this optimizer's, and has "
                "no gradient"
            )
        return place


def choose_sum_of_squares(backend: str) -> SumOfSquares:
    """Choose how gradient shards are summed, by the backend of the update."""
    if backend != "triton":
        return sum_of_squares
    from lion_dist.triton_backend import squares

    return squares.SumOfSquares()
