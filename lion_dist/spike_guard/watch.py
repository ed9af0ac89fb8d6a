"""An observer of a step with one word in it: :meth:`SpikeWatch.verdict` says whether to skip. Everything is on the
device: the window of the last values, the comparison and the counters; nothing waits. All ranks give the same values,
so they come to the same verdict and hold the same window.

A value is a spike when it is above ``mean + sigmas * std`` of the window, once half of that is filled. It enters the
window as that limit: one spike does not blind the guard to the next, and values that stay high raise the limit at each
step until they pass, so that training never stands still for good. A value that is not finite does not enter (its step
is skipped anyway).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lion_dist import values
from lion_dist.sharding import collectives
from lion_dist.sharding.process_groups import ShardGroups
from lion_dist.step_rule import SpikeGuard

NORM, LOSS = range(2)  # rows of the window
LEAST_STD = 1e-6  # of the mean: equal values differ by the rounding of their mean


class SpikeWatch:
    """The window of one optimizer, and the verdict on its next step.

    Attributes:
        state: [2 * window + 5] fp64 on the device, all there is to save: the last norms, the last losses, how many of
            each have entered, the steps that were judged, the spikes among them, and the number of the last one.
        clip_coefficient: [] fp32, what the last step's gradients are multiplied by, with ``SpikeGuard(clip=True)``: it
            brings the norm of a spike down to the limit, and is 1 in other steps. None without.

    Args:
        backend: as ``kernels.backends.choose_backend`` says. A window depends in last bits on the kind of device.
    """

    def __init__(self, guard: SpikeGuard, device: torch.device, backend: str):
        self.guard, self.backend = guard, backend
        self.state = torch.zeros(2 * guard.window + 5, dtype=torch.float64, device=device)
        self._window = self.state[: 2 * guard.window].view(2, guard.window)
        self._entered, self._numbers = self.state[-5:-3], self.state[-3:]
        self._places = torch.arange(guard.window, dtype=torch.float64, device=device)
        self._given: list[Tensor | None] = [None, None]  # by the user, for the next step
        self.clip_coefficient: Tensor | None = None

    def __getstate__(self) -> tuple:
        return self.guard, self.backend, self.state

    def __setstate__(self, kept: tuple) -> None:
        guard, backend, state = kept
        self.__init__(guard, state.device, backend)
        self.load(state)

    def observe(self, loss: Tensor | None, grad_norm: Tensor | None = None) -> None:
        """Values of the step that is about to be taken, on the device."""
        for row, name, value in ((NORM, "grad_norm", grad_norm), (LOSS, "loss", loss)):
            if value is None:
                continue
            if row == NORM and self.guard.clip:
                raise ValueError(
                    "observe(grad_norm=...) does not go with SpikeGuard(clip=True), which multiplies the gradients "
                    "that step() finds. Leave out the clipping and grad_norm, or use clip=False."
                )
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor of one element, got {values.shown(value)}. Pass the tensor.")
            values.scalar_tensor(name, value)
            self._given[row] = value.detach()

    def take_given(self) -> tuple[Tensor | None, Tensor | None]:
        """(norm, loss) that :meth:`observe` has been given, once."""
        norm, loss = self._given
        self._given = [None, None]
        return norm, loss

    def take_mean_loss(self, groups: ShardGroups) -> Tensor | None:
        """[] fp64: the mean of the losses that all ranks have been given, which call this together. None: no loss."""
        _, loss = self.take_given()
        if loss is None:
            return None
        message = loss.to(self.state.device, torch.float64).reshape(1).clone()
        for axis in groups.axes:
            collectives.all_reduce(message, axis)
        return message[0] / groups.num_ranks

    def verdict(self, norm: Tensor | None, loss: Tensor | None, skip: Tensor | None) -> Tensor:
        """[] fp32, not 0 where the step is to be skipped: ``skip`` ([] fp32 or None), or a spike. Asked once a step.

        ``norm``, ``loss``: [] on the device, the same on all ranks; None: not judged by it.
        """
        norm, loss, skip = (x if x is None else x.to(self.state.device).reshape(()) for x in (norm, loss, skip))
        if self.backend == "triton":
            from lion_dist.spike_guard import watch_triton

            sizes = {"SIGMAS": self.guard.sigmas, "LEAST_STD": LEAST_STD, "WINDOW": self.guard.window}
            result, self.clip_coefficient = watch_triton.verdict(
                self.state, norm, loss, skip, clip=self.guard.clip, **sizes
            )
            return result
        is_spike = must_skip = torch.zeros((), dtype=torch.bool, device=self.state.device)
        self.clip_coefficient = torch.ones((), device=self.state.device) if self.guard.clip else None
        for row, value in ((NORM, norm), (LOSS, loss)):
            if value is None:
                continue
            here, limit = self._enter(row, value.double())
            is_spike = is_spike | here
            if row == NORM and self.guard.clip:
                self.clip_coefficient = torch.where(here, limit / value.double(), 1.0).float()
            else:
                must_skip = must_skip | here
        judged, spikes, last = self._numbers.unbind()
        judged += 1
        spikes += is_spike
        last.copy_(torch.where(is_spike, judged, last))
        if skip is None:
            return must_skip.float()
        return (must_skip | (skip != 0)).float()

    def _enter(self, row: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """Whether ``value`` is a spike, [] bool, and the limit; it is in the window from now on."""
        window, entered = self._window[row], self._entered[row]
        count = entered.clamp(max=self.guard.window)
        known = self._places < count
        mean = torch.where(known, window, 0.0).sum() / count.clamp(min=1.0)
        variance = torch.where(known, window - mean, 0.0).square().sum() / (count - 1.0).clamp(min=1.0)
        limit = mean + self.guard.sigmas * torch.maximum(variance.sqrt(), LEAST_STD * mean.abs())
        is_finite = value.isfinite()
        is_spike = (count >= self.guard.window // 2) & (value > limit) & is_finite
        here = (self._places == entered % self.guard.window) & is_finite
        window.copy_(torch.where(here, torch.where(is_spike, limit, value), window))
        entered += is_finite
        return is_spike, limit

    def report(self) -> dict[str, int]:
        """For ``metrics()``; it waits for the device."""
        _, spikes, last = self._numbers.tolist()
        return {"spikes": int(spikes), "last_spike": int(last)}

    # ---- in checkpoints

    def checked(self, saved: object) -> Tensor | None:
        """``saved`` state that fits here; None where there is none. ValueError where it is another guard's."""
        if saved is None:
            return None
        if not isinstance(saved, Tensor) or saved.shape != self.state.shape or saved.dtype != self.state.dtype:
            found = values.shown(saved) if not isinstance(saved, Tensor) else f"{saved.dtype} {tuple(saved.shape)}"
            raise ValueError(
                f"the saved state of skip_spikes is {found}, but a window of {self.guard.window} steps is "
                f"{self.state.dtype} {tuple(self.state.shape)}. Construct the optimizer with the window that was saved."
            )
        return saved

    def load(self, saved: Tensor | None) -> None:
        """Take over what :meth:`checked` has returned; without any, begin anew."""
        if saved is None:
            self.state.zero_()
        else:
            self.state.copy_(saved)
