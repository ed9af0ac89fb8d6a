"""What a step of ``ShardedLion`` multiplies with and trains: ``sharding/step_agreement.py`` compares it over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lion_dist.sharding.agreement import Entry


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
    """``sharding.step_agreement.Choices`` of a step.

    What is set after the step's message (clipping), and what is changed between it and the update, is in the next
    step's ``before``. There only what the host knows is compared: what was on the device may have changed since.
    """

    now: Factors
    before: Factors | None  # that the last step has used
    unfrozen: Sequence[str]  # parameters that are to get buckets in this step
    frozen: Sequence[str]  # parameters in buckets that take no gradients

    def entries(self) -> list[Entry]:
        before = [] if self.before is None else self.before.entries(when=" in the step before")
        lists = [
            ("the list of parameters that take gradients from now on (requires_grad)", list(self.unfrozen)),
            ("the list of parameters that take no gradients any more (requires_grad)", list(self.frozen)),
        ]
        return [*lists, *self.now.entries(), *before]

    def tensors(self) -> list[Tensor]:
        return self.now.tensors()
