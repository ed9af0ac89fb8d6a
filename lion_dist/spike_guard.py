"""``skip_spikes``: a step whose gradient norm (or loss) is far above those of the steps before is not taken.

An observer of a step with one word in it: :meth:`SpikeWatch.verdict` says whether to skip. Everything is on the device:
the window of the last values, the comparison and the counters; nothing waits. All ranks give the same values, so they
come to the same verdict and hold the same window.

A value is a spike when it is above ``mean + sigmas * std`` of the window, once half of that is filled. It enters the
window as that limit: one spike does not blind the guard to the next, and values that stay high raise the limit at each
step until they pass, so that training never stands still for good. A value that is not finite does not enter (its step
is skipped anyway).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lion_dist import values
from lion_dist.sharding import collectives
from lion_dist.sharding.process_groups import ShardGroups

NORM, LOSS = range(2)  # rows of the window
LEAST_STD = 1e-6  # of the mean: equal values differ by the rounding of their mean


@dataclass(frozen=True)
class SpikeGuard:
    """What counts as a spike.

    Args:
        window: how many of the last steps a step is compared with; it judges from half as many on.
        sigmas: how many standard deviations above their mean is too far.
    """

    window: int = 128
    sigmas: float = 6.0

    def __post_init__(self):
        window = values.whole_number("window", self.window, "at least 2 steps", least=2, below=2**20, remedy="Use 128.")
        remedy = "Use 6.0; from 3 on, steps of ordinary training are skipped too."
        sigmas = values.number("sigmas", self.sigmas, "finite and above 0", above=0.0, finite=True, remedy=remedy)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "sigmas", sigmas)


def check_guard(guard: object) -> SpikeGuard | None:
    """TypeError unless ``guard`` is a SpikeGuard or None."""
    remedy = "Pass lion_dist.SpikeGuard(window=128, sigmas=6.0), for example."
    return values.instance("skip_spikes", guard, SpikeGuard, remedy, optional=True)


class SpikeWatch:
    """The window of one optimizer, and the verdict on its next step.

    Attributes:
        state: [2 * window + 5] fp64 on the device, all there is to save: the last norms, the last losses, how many of
            each have entered, the steps that were judged, the spikes among them, and the number of the last one.

    Args:
        backend: as ``kernels.update.choose_backend`` says. A window depends in last bits on the kind of device.
    """

    def __init__(self, guard: SpikeGuard, device: torch.device, backend: str):
        self.guard, self.backend = guard, backend
        self.state = torch.zeros(2 * guard.window + 5, dtype=torch.float64, device=device)
        self._window = self.state[: 2 * guard.window].view(2, guard.window)
        self._entered, self._numbers = self.state[-5:-3], self.state[-3:]
        self._places = torch.arange(guard.window, dtype=torch.float64, device=device)
        self._given: list[Tensor | None] = [None, None]  # by the user, for the next step

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
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor of one element, got {values.shown(value)}. Pass the tensor.")
            values.scalar_tensor(name, value)
            self._given[row] = value.detach()

    def take_given(self) -> tuple[Tensor | None, Tensor | None]:
        """(norm, loss) that :meth:`observe` has been given, once."""
        norm, loss = self._given
        self._given = [None, None]
        return norm, loss

    def verdict(self, norm: Tensor | None, loss: Tensor | None, skip: Tensor | None) -> Tensor:
        """[] fp32, not 0 where the step is to be skipped: ``skip`` ([] fp32 or None), or a spike. Asked once a step.

        ``norm``, ``loss``: [] on the device, the same on all ranks; None: not judged by it.
        """
        norm, loss, skip = (x if x is None else x.to(self.state.device).reshape(()) for x in (norm, loss, skip))
        if self.backend == "triton":
            from lion_dist import spike_guard_triton

            sizes = {"SIGMAS": self.guard.sigmas, "LEAST_STD": LEAST_STD, "WINDOW": self.guard.window}
            return spike_guard_triton.verdict(self.state, norm, loss, skip, **sizes)
        is_spike = torch.zeros((), dtype=torch.bool, device=self.state.device)
        for row, value in ((NORM, norm), (LOSS, loss)):
            if value is not None:
                is_spike = is_spike | self._enter(row, value.double())
        judged, spikes, last = self._numbers.unbind()
        judged += 1
        spikes += is_spike
        last.copy_(torch.where(is_spike, judged, last))
        if skip is None:
            return is_spike.float()
        return (is_spike | (skip != 0)).float()

    def _enter(self, row: int, value: Tensor) -> Tensor:
        """Whether ``value`` is a spike, [] bool; it is in the window from now on."""
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
        return is_spike

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


def mean_over_ranks(value: Tensor, groups: ShardGroups) -> Tensor:
    """[] fp64: of each rank's ``value``; all ranks call it together."""
    message = value.to(torch.float64).reshape(1).clone()
    for axis in groups.axes:
        collectives.all_reduce(message, axis)
    return message[0] / groups.num_ranks


def not_guarded() -> RuntimeError:
    """What observe() of an optimizer without a guard raises."""
    return RuntimeError("observe() is for skip_spikes: construct the optimizer with skip_spikes=SpikeGuard(...).")
