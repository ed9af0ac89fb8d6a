"""What a step does beyond plain Lion, in one object: ``kernels/reference.py`` has the equations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lion_dist import values


@dataclass(frozen=True)
class StepRule:
    """The variant of Lion that an optimizer takes. The default is plain Lion.

    Attributes:
        cautious_factor: what a step is multiplied by where update and gradient differ in sign; None: not cautious.
        cautious_wd: decay only where step and parameter have the same sign.
        corrected_weight_decay: decay in proportion to lr^2 / max_lr.
        maximize: follow the gradient upwards.
        ema_decay: of the average of the weights; None: none is kept.
    """

    cautious_factor: float | None = None
    cautious_wd: bool = False
    corrected_weight_decay: bool = False
    maximize: bool = False
    ema_decay: float | None = None

    @classmethod
    def of(
        cls,
        cautious: object,
        cautious_factor: object,
        cautious_wd: object,
        corrected: object,
        maximize: object,
        ema_decay: object,
    ) -> StepRule:
        """From what a user has passed, checked. A ``cautious_factor`` alone asks for a cautious step, as lion-pytorch's
        does."""
        is_cautious, factor = values.flag("cautious", cautious), None
        if cautious_factor is not None:
            factor = values.as_number(cautious_factor)
            if factor is None or not 0 <= factor <= 1:
                raise ValueError(
                    f"cautious_factor must be in [0, 1], got {values.shown(cautious_factor)}. 0 is Cautious Lion as "
                    "published, 1 the plain step."
                )
        elif is_cautious:
            factor = 0.0
        return cls(
            None if factor == 1.0 else factor,
            values.flag("cautious_wd", cautious_wd),
            values.flag("corrected_weight_decay", corrected),
            values.flag("maximize", maximize),
            _checked_decay(ema_decay),
        )

    @property
    def is_cautious(self) -> bool:
        return self.cautious_factor is not None

    def signed(self, grad_scale: Tensor | None, device: torch.device) -> Tensor | None:
        """The factor of gradients, negative where the step is to go up."""
        if not self.maximize:
            return grad_scale
        return torch.full((), -1.0, device=device) if grad_scale is None else -grad_scale


def _checked_decay(ema_decay: object) -> float | None:
    if ema_decay is None:
        return None
    found = values.as_number(ema_decay)
    if found is None or not 0 <= found < 1:
        raise ValueError(
            f"ema_decay must be in [0, 1), got {values.shown(ema_decay)}. Pass 0.999 for an average over about 1,000 "
            "steps, or None for no average."
        )
    return found


def check_torch_options(foreach: object, fused: object, capturable: object, differentiable: object) -> None:
    """Raise ValueError for what torch.optim's options of these names ask for and Lion cannot do.

    ``foreach``, ``fused`` and ``capturable`` say how a step is computed: Lion updates all tensors of a group in one
    launch, by one kernel, without waiting for the device, so that each of them is what it does anyway.
    """
    found = [values.flag(name, value, optional=True) for name, value in (("foreach", foreach), ("fused", fused))]
    values.flag("capturable", capturable)
    if all(found):
        raise ValueError("foreach=True and fused=True cannot both be: torch.optim refuses it too. Leave both out.")
    if values.flag("differentiable", differentiable):
        raise ValueError(
            "differentiable=True: gradients do not flow through a step of Lion, which takes a sign. Leave it out."
        )


def note_max_lr(group: dict) -> None:
    """Let a param group that decays in proportion to lr^2 / max_lr know its largest learning rate: what it has, a
    scheduler's ("max_lr" is OneCycleLR's key as well), or the learning rate that it begins with."""
    if group.get("max_lr") is None:
        group["max_lr"] = float(group["lr"])
    check_max_lr(group)


def check_max_lr(group: dict) -> None:
    """Raise ValueError unless the group's ``max_lr`` can be divided by."""
    name, expected = "max_lr of a param group with corrected_weight_decay=True", "finite and above 0"
    remedy = "Begin with an lr above 0, or put the schedule's largest into the group: {'params': ..., 'max_lr': 3e-4}."
    values.number(name, group.get("max_lr"), expected, above=0.0, finite=True, remedy=remedy)


@dataclass(frozen=True)
class SpikeGuard:
    """What counts as a spike among gradient norms (and losses), and what becomes of the step.

    Args:
        window: how many of the last steps a step is compared with; it judges from half as many on.
        sigmas: how many standard deviations above their mean is too far.
        clip: a step whose norm is a spike is taken, with gradients that are scaled down to the limit. (A loss that is
            one still skips the step.)
    """

    window: int = 128
    sigmas: float = 6.0
    clip: bool = False

    def __post_init__(self):
        window = values.whole_number("window", self.window, "at least 2 steps", least=2, below=2**20, remedy="Use 128.")
        remedy = "Use 6.0; from 3 on, steps of ordinary training are skipped too."
        sigmas = values.number("sigmas", self.sigmas, "finite and above 0", above=0.0, finite=True, remedy=remedy)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "clip", values.flag("clip", self.clip))


def check_guard(guard: object) -> SpikeGuard | None:
    """TypeError unless ``guard`` is a SpikeGuard or None."""
    remedy = "Pass lion_dist.SpikeGuard(window=128, sigmas=6.0), for example."
    return values.instance("skip_spikes", guard, SpikeGuard, remedy, optional=True)


def not_guarded() -> RuntimeError:
    """What observe() of an optimizer without a guard raises."""
    return RuntimeError("observe() is for skip_spikes: construct the optimizer with skip_spikes=SpikeGuard(...).")
