"""What the updates of one step are made with, the same for all shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lion_dist.hyperparameters import HyperparameterWatch, effective_weight_decay, warn_if_decay_vanishes
from lion_dist.kernels.reference import StepScalars
from lion_dist.shard_state import ShardBatch
from lion_dist.step_rule import StepRule


class GroupScalars:
    """Makes scalars of the param groups' settings, which are checked at every step.

    Args:
        decoupled_from: what ``decoupled_weight_decay`` divides the weight decay by.
        corrected: of ``corrected_weight_decay``.
    """

    def __init__(self, decoupled_from: float | None, corrected: bool):
        self.decoupled_from, self._corrected = decoupled_from, corrected
        self._settings = HyperparameterWatch(decoupled_from, corrected)

    def of(self, groups: Sequence[dict]) -> dict[int, StepScalars]:
        """Return scalars by id of the param group.

        Raises:
            ValueError: a group holds what cannot be used.
        """
        self._settings.check(groups)
        return {id(group): self._of_group(group) for group in groups}

    def _of_group(self, group: dict) -> StepScalars:
        weight_decay = effective_weight_decay(group, self.decoupled_from, self._corrected)
        warn_if_decay_vanishes(group["lr"], weight_decay)
        return StepScalars.from_group(group["lr"], group["betas"], weight_decay)


@dataclass(frozen=True)
class UpdateTerms:
    """What all updates of a step are made with; tensors are on the device.

    Attributes:
        scalars: by id of the param group.
        grad_scale: [] fp32, the one factor of all gradients.
        skip: [] fp32, not 0 where the step is skipped; None: it is not.
        seed: of the random bits.
        backend: of the update (``kernels.backends.choose_backend``).
        rule: which variant of Lion the step is.
        lrs: [slices, 2] fp32 of each batch, of a cautious step; else empty.
    """

    scalars: Mapping[int, StepScalars]
    grad_scale: Tensor
    skip: Tensor | None
    rule: StepRule
    seed: int
    backend: str
    lrs: dict[ShardBatch, Tensor] = field(default_factory=dict)

    def of(self, batch: ShardBatch) -> StepScalars:
        return self.scalars[id(batch.group)]

    def arguments(self, batch: ShardBatch, active: Tensor | None) -> dict:
        """Return a kernel's arguments for ``batch``. ``active``: [slices] fp32, 0 where a slice stays."""
        return {
            "grad_scale": self.grad_scale,
            "active": active,
            "seed": self.seed,
            "cautious_lrs": self.lrs.get(batch),
            "cautious_wd": self.rule.cautious_wd,
            "backend": self.backend,
        }
