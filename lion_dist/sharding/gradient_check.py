"""The check of a step's gradients as a whole, which all ranks share, and the one factor that multiplies them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lion_dist import values
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.grad_norm import GradNorm


@dataclass
class CheckResult:
    """What all ranks know about the gradients of the step that is about to be taken; on the device."""

    sum_of_squares: Tensor  # [] fp64, of the summed gradients as backward left them (scaled, not averaged)
    outcome: Tensor  # [2] bool: the step is taken, the step is skipped because a gradient is not finite
    skip: Tensor  # [] fp32, 1 when it is
    used: Tensor  # [params of all buckets] fp32, 1 where the parameter had a gradient
    grad_version: int  # of the gradients that were checked; a later backward outdates the result
    clip_coefficient: Tensor | None = None  # [] fp32


class GradientCheck:
    """Checks the gradients of a step (norm, finite, used) and keeps their factor: averaging, unscaling, clipping.

    Args:
        divisor: of the summed gradients, unless a step has its own.
    """

    def __init__(self, grad_norm: GradNorm, divisor: int):
        device = grad_norm.device
        self.result: CheckResult | None = None
        self.inverse_loss_scale: Tensor | None = None  # of a GradScaler that has unscaled already
        self.scaler_scale: Tensor | None = None  # its scale
        self.divisor: float | Tensor | None = None  # of this step; None: the default
        self.max_norm: float | Tensor | None = None  # that this step is clipped to
        self._grad_norm, self._device, self._default_divisor = grad_norm, device, divisor
        # Made once: small operations on the device cost 10 us of the host each, and a step ends with a row of them.
        self._default_unscaling = torch.full((), divisor, dtype=torch.float64, device=device).reciprocal()
        self._taken_or_skipped = torch.tensor([True, False]).to(device)

    def forget_step(self) -> None:
        self.result = self.divisor = self.inverse_loss_scale = self.scaler_scale = self.max_norm = None

    def drop_outdated(self, grad_version: int) -> None:
        """Forget the result when a later backward pass has added to the gradients."""
        if self.result is None or self.result.grad_version == grad_version:
            return
        if self.result.clip_coefficient is not None:
            raise RuntimeError(
                "a backward pass ran after clip_grad_norm_(), which did not see its gradients. Clip after the last "
                "backward of the step; grad_norm() may be read at any time."
            )
        self.result = None

    def run(
        self, buckets: Sequence[Bucket], grad_version: int, also: Tensor, take_sum: Callable[[Tensor], None]
    ) -> None:
        """Ask all ranks, once, about the reduced gradients of ``buckets``.

        Args:
            also: [n] fp64, travels in the same message.
            take_sum: is called with the sum of ``also`` over ranks; where it raises, there is no result.
        """
        total, used, sums = self._grad_norm(buckets, also)
        take_sum(sums)
        outcome = (total < math.inf) == self._taken_or_skipped  # NaN is not below
        self.result = CheckResult(total, outcome, outcome[1].float(), used, grad_version)

    def skip_unusable(self, unusable: Tensor | None) -> CheckResult:
        """Return the result. It skips the step also where the divisor is a tensor that cannot be used, and where
        ``unusable`` ([] fp32 on the device) is not 0: a learning rate that cannot be used."""
        skip = self.result.skip if unusable is None else torch.maximum(self.result.skip, unusable)
        if isinstance(self.divisor, Tensor):
            usable = (self.divisor > 0) & (self.divisor < math.inf)
            skip = torch.maximum(skip, usable.logical_not().to(self._device).reshape(()).float())
        if skip is not self.result.skip:
            self.result.skip, self.result.outcome = skip, (skip == 0) == self._taken_or_skipped
        return self.result  # pyrefly: ignore[bad-return] # run() comes first

    def set_divisor(self, count: float | Tensor) -> None:
        """Divide this step's summed gradients by ``count``."""
        if isinstance(count, Tensor):
            values.scalar_tensor("count", count)
        else:
            remedy = "Pass the number of tokens or samples that the gradients are summed over."
            name, expected = "count: the gradient divisor", "finite and above 0"
            count = values.number(name, count, expected, above=0.0, finite=True, remedy=remedy)
        self.refuse_clipped("set_grad_divisor()")
        self.divisor = count

    def refuse_clipped(self, caller: str) -> None:
        """Raise RuntimeError when gradients have been clipped already: ``caller`` would outdate the norm."""
        if self.result is not None and self.result.clip_coefficient is not None:
            raise RuntimeError(f"{caller} comes before clip_grad_norm_(), whose norm would be outdated by it")

    def unscaling(self, loss_scale: Tensor | None) -> Tensor:
        """[] fp64: what turns a sum of scaled gradients into the gradient."""
        factor = self._default_unscaling
        if self.divisor is not None or loss_scale is not None:
            divisor = self._default_divisor if self.divisor is None else self.divisor
            if isinstance(divisor, Tensor):
                divisor = divisor.to(self._device, torch.float64)
            else:
                divisor = torch.full((), divisor, dtype=torch.float64, device=self._device)  # a copy would wait
            factor = (divisor if loss_scale is None else divisor * loss_scale.double()).reciprocal()
        return factor if self.inverse_loss_scale is None else factor * self.inverse_loss_scale.double()

    def grad_scale(self, loss_scale: Tensor | None) -> Tensor:
        """[] fp32: the one factor that the update multiplies gradients by."""
        scale = self.unscaling(loss_scale).float()
        clips = self.result is not None and self.result.clip_coefficient is not None
        return scale * self.result.clip_coefficient if clips else scale

    def norm(self, loss_scale: Tensor | None) -> Tensor:
        """[] fp32: the global norm, averaged and unscaled, before clipping."""
        return (self.result.sum_of_squares.sqrt() * self.unscaling(loss_scale)).float()

    def clip(self, max_norm: float, loss_scale: Tensor | None) -> Tensor:
        """Let ``grad_scale`` bring the norm down to ``max_norm``; returns :meth:`norm`."""
        norm = self.norm(loss_scale)
        self.result.clip_coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self.max_norm = max_norm
        return norm

    def clip_by(self, coefficient: Tensor | None) -> None:
        """Let ``grad_scale`` be multiplied by ``coefficient`` ([] fp32), unless clipping makes it smaller yet."""
        clipped = self.result.clip_coefficient
        if coefficient is not None:
            self.result.clip_coefficient = coefficient if clipped is None else torch.minimum(clipped, coefficient)
