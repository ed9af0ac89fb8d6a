"""What a step of ``ShardedLion`` multiplies with and trains: ``step_agreement.py`` compares it over ranks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from lion_dist.guards.agreement import Entry
from lion_dist.sharded_params import ShardedParams

if TYPE_CHECKING:
    from lion_dist.sharded_lion import ShardedLion
    from lion_dist.step_gradients import StepGradients

_requires_grad = operator.attrgetter("requires_grad")


@dataclass(frozen=True, repr=False)
class OnDevice:
    """A number that the host does not know."""

    tensor: Tensor

    def __repr__(self) -> str:
        return "on the device"


def known(value: float | Tensor | None) -> float | OnDevice | None:
    """``value`` as the host may look at it without waiting."""
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" else OnDevice(value)
    return None if value is None else float(value)


class Factors(NamedTuple):
    """Everything that an update is multiplied by. ``repr()`` of it is what ranks compare."""

    groups: tuple[tuple, ...]  # lr, weight decay, betas and max_lr of each param group
    divisor: float | OnDevice | None = None
    loss_scale: float | OnDevice | None = None
    inverse_loss_scale: float | OnDevice | None = None
    max_norm: float | OnDevice | None = None

    @classmethod
    def of(cls, param_groups: Iterable[dict], *others: float | Tensor | None) -> Factors:
        """``others``: from ``divisor`` on."""
        groups = (
            (known(g["lr"]), known(g["weight_decay"]), *map(float, g["betas"]), known(g.get("max_lr")))
            for g in param_groups
        )
        return cls(tuple(groups), *map(known, others))

    def entries(self, when: str = "") -> list[Entry]:
        """``when``: comes behind each name."""
        entries = []
        for i, group in enumerate(self.groups):
            for name, value in zip(("lr", "weight_decay", "beta1", "beta2", "max_lr"), group, strict=True):
                entries.append((f"{name} of param group {i}{when}", value))
        named = {
            "the gradient divisor (set_grad_divisor)": self.divisor,
            "the loss scale": self.loss_scale,
            "the inverse loss scale": self.inverse_loss_scale,
            "max_norm of clip_grad_norm_": self.max_norm,
        }
        entries += [(f"{name}{when}", value) for name, value in named.items()]
        return [(name, float(value.tensor) if isinstance(value, OnDevice) else value) for name, value in entries]

    def tensors(self) -> list[Tensor]:
        values = [value for group in self.groups for value in group] + list(self[1:])
        return [value.tensor for value in values if isinstance(value, OnDevice)]


class StepChoices(NamedTuple):
    """What has to be the same on all ranks. ``repr()`` says all of it but what lies on the device, and is quick.

    What is set after the step's message (clipping), and what is changed between it and the update, is in the next
    step's ``before``. There only what the host knows is compared: what was on the device may have changed since.
    """

    now: Factors
    before: Factors | None  # that the last step has used
    unfrozen: Sequence[str]  # parameters that are to get buckets in this step
    frozen: Sequence[str]  # parameters in buckets that take no gradients

    def entries(self) -> list[Entry]:
        """Return all values by name, also those on the device; for an error."""
        before = [] if self.before is None else self.before.entries(when=" in the step before")
        lists = [
            ("the list of parameters that take gradients from now on (requires_grad)", list(self.unfrozen)),
            ("the list of parameters that take no gradients any more (requires_grad)", list(self.frozen)),
        ]
        return [*lists, *self.now.entries(), *before]

    def tensors(self) -> list[Tensor]:
        """[] or [1], on the device: what ``repr()`` does not say."""
        return self.now.tensors()


class RankChoices:
    """This rank's choices, for the step that ``gradients`` are of."""

    def __init__(self, optimizer: ShardedLion, params: ShardedParams, gradients: StepGradients):
        self._optimizer, self._params, self._gradients = optimizer, params, gradients
        self._before: Factors | None = None  # that the last step has used

    def now(self) -> StepChoices:
        label = self._params.label
        unfrozen = [label(param) for param, _ in self._params.unfrozen()]
        buckets = self._gradients.buckets
        partly = [bucket for bucket in buckets if not all(map(_requires_grad, bucket.params))]  # 25 ns a parameter
        frozen = [label(p) for bucket in partly for p in bucket.params if not p.requires_grad]
        return StepChoices(self._factors(), self._before, unfrozen, frozen)

    def end_step(self) -> None:
        self._before = self._factors()

    def _factors(self) -> Factors:
        check = self._gradients.gradient_check
        loss_scale = self._gradients.loss_scale() if check.scaler_scale is None else check.scaler_scale
        others = check.divisor, loss_scale, check.inverse_loss_scale, check.max_norm
        return Factors.of(self._optimizer.param_groups, *others)
