"""The gradients of the step that is to come: reduced, judged by all ranks together, and multiplied by one factor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import Parameter

from lion_dist.sharded_params import ShardedParams
from lion_dist.sharding import full_grad
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.foreign_wrappers import refuse_late_grads
from lion_dist.sharding.grad_norm import SumOfSquares, sum_of_squares
from lion_dist.sharding.phases import PhaseClock
from lion_dist.sharding.scheduler import GradScheduler
from lion_dist.sharding.verdict import Judge, Verdict
from lion_dist.spike_guard import SpikeGuard, SpikeWatch, mean_over_ranks
from lion_dist.step_choices import Factors, StepChoices

_requires_grad = operator.attrgetter("requires_grad")


class StepGradients:
    """What ``clip_grad_norm_``, ``grad_norm``, ``full_grad`` and ``step`` ask of a step's gradients.

    Args:
        param_groups: returns the optimizer's.
        loss_scale: returns that of a GradScaler around ``step()`` that has not unscaled.
        judge: keeps what all ranks know about the gradients, and what they are multiplied by.
        spikes: of ``skip_spikes``; None: no step is skipped for one.
        before_reducing: called before the gradients that are left are reduced.
        used_in_backward: backward updates with each gradient as it comes, and none is left to ask about.
        adopt: gives buckets to parameters (and their groups) that take gradients now.
    """

    def __init__(
        self,
        params: ShardedParams,
        param_groups: Callable[[], Sequence[dict]],
        loss_scale: Callable[[], Tensor | None],
        module: nn.Module | None,
        scheduler: GradScheduler,
        judge: Judge,
        spikes: SpikeWatch | None,
        stream: CommStream,
        clock: PhaseClock,
        before_reducing: Callable[[], None],
        adopt: Callable[[list[tuple[Parameter, dict]]], None],
        *,
        used_in_backward: bool,
    ):
        self._params, self._param_groups, self._loss_scale = params, param_groups, loss_scale
        self._module, self._scheduler, self.judge, self.spikes = module, scheduler, judge, spikes
        self._stream, self._clock = stream, clock
        self._before_reducing, self._adopt = before_reducing, adopt
        self._used_in_backward = used_in_backward
        self.buckets: list[Bucket] = []
        self._factors: Factors | None = None  # that the last step has used

    # ---- reductions

    def reduce(self) -> None:
        """Every gradient that there is has been reduced, or is on its way."""
        if self._used_in_backward:
            raise RuntimeError(
                "with update_in_backward=True gradients are used as they come: there is no norm to clip by, to read or "
                "to scale by. Construct ShardedLion with ShardingConfig(update_in_backward=False)."
            )
        self.judge.drop_outdated(self._scheduler.version)
        if self.judge.verdict is None:
            self._reduce_what_is_left()
        refuse_late_grads(self._params.names, self._module)

    def _reduce_what_is_left(self) -> None:
        if self._scheduler.in_no_sync:
            raise RuntimeError(
                "step(), clip_grad_norm_() and grad_norm() inside no_sync() would use gradients that have not been "
                "reduced. Leave the no_sync() block before the last backward of the step."
            )
        self._before_reducing()
        self._scheduler.finish_backward()
        if self._params.unfrozen():
            self._decide()  # what ranks without such parameters do now, too
            self.adopt_unfrozen()
            self._scheduler.start_added()
            self.judge.verdict = None  # it knows nothing of the new buckets

    def adopt_unfrozen(self) -> None:
        """Parameters that take gradients now get buckets. Every rank has started the reductions of the others, so that
        ranks with and without a batch come to the new ones' broadcast at the same point; and ranks have compared that
        they are the same ones."""
        self.judge.agreement.wait()
        unfrozen = self._params.unfrozen()
        if unfrozen:
            self._params.check_memory({self._params.names[param]: param for param, _ in unfrozen})
        self._adopt(unfrozen)
        for param, _ in unfrozen:
            del self._params.frozen[param]

    # ---- what all ranks know

    def check(self) -> Verdict:
        """Wait for every reduction, then ask all ranks once: norm, finite, used. Kept until ``step()``."""
        self.reduce()
        if self.judge.verdict is None:
            self._decide()
            self._stream.release()
        return self.judge.verdict

    def verdict(self, skip: Tensor | None) -> Verdict:
        """The checked gradients' verdict, which skips also where ``skip`` ([] on the device) is not 0, and spikes."""
        if self.spikes is not None:
            _, loss = self.spikes.take_given()
            loss = (
                None
                if loss is None
                else mean_over_ranks(loss.to(self.spikes.state.device), self._params.groups_for({}))
            )
            skip = self.spikes.verdict(self.judge.norm(self._loss_scale()), loss, skip)
        return self.judge.skip_unusable(skip)

    @property
    def guard(self) -> SpikeGuard | None:
        return None if self.spikes is None else self.spikes.guard

    def _decide(self) -> None:
        with self._clock.phase("norm"):
            self.judge.decide(self.buckets, self._scheduler.version, self.choices)

    def choices(self) -> StepChoices:
        """What has to be the same on all ranks in every step."""
        names = self._params.names
        unfrozen = [names[param] for param, _ in self._params.unfrozen()]
        partly = [bucket for bucket in self.buckets if not all(map(_requires_grad, bucket.params))]  # 25 ns a parameter
        frozen = [name for bucket in partly for name in bucket.names_without_grads()]
        return StepChoices(self._factors_now(), self._factors, unfrozen, frozen)

    def _factors_now(self) -> Factors:
        judge = self.judge
        loss_scale = self._loss_scale() if judge.scaler_scale is None else judge.scaler_scale
        others = judge.divisor, loss_scale, judge.inverse_loss_scale, judge.max_norm
        return Factors.of(self._param_groups(), *others)

    def end_step(self) -> None:
        self._factors = self._factors_now()

    # ---- one parameter's

    def read(self, param: Parameter) -> Tensor:
        """``ShardedLion.full_grad``."""
        bucket, position = self._place_of(param)
        return full_grad.read(bucket, position, self.judge.unscaling(self._loss_scale()))

    def write(self, param: Parameter, grad: Tensor) -> None:
        """``ShardedLion.set_full_grad``."""
        if not isinstance(grad, Tensor) or grad.shape != param.shape or not grad.dtype.is_floating_point:
            raise ValueError(
                f"set_full_grad() takes a floating-point tensor of the parameter's shape {tuple(param.shape)}, got "
                f"{f'{grad.dtype} {tuple(grad.shape)}' if isinstance(grad, Tensor) else repr(grad)}"
            )
        self.judge.refuse_clipped("set_full_grad()")
        bucket, position = self._place_of(param)
        full_grad.write(bucket, position, grad.to(bucket.device), self.judge.unscaling(self._loss_scale()))
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
    """Of gradient shards, by the backend of the update."""
    if backend != "triton":
        return sum_of_squares
    from lion_dist.kernels import squares_triton

    return squares_triton.SumOfSquares()
