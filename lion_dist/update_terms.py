"""What the updates of one step are made with, the same for all shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lion_dist.hyperparameters import HyperparameterWatch, effective_weight_decay, warn_if_decay_vanishes
from lion_dist.kernels.reference import StepScalars, cautious_lr
from lion_dist.shard_state import ShardBatch, ShardState
from lion_dist.sharding import collectives
from lion_dist.sharding.process_groups import ShardGroups


class GroupScalars:
    """Makes scalars of the param groups' settings, which are checked at every step.

    Args:
        decoupled_from: what ``decoupled_weight_decay`` divides the weight decay by.
    """

    def __init__(self, decoupled_from: float | None):
        self.decoupled_from = decoupled_from
        self._settings = HyperparameterWatch(decoupled_from)

    def of(self, groups: Sequence[dict]) -> dict[int, StepScalars]:
        """By id of the param group.

        Raises:
            ValueError: a group holds what cannot be used.
        """
        self._settings.check(groups)
        return {id(group): self._of_group(group) for group in groups}

    def _of_group(self, group: dict) -> StepScalars:
        weight_decay = effective_weight_decay(group, self.decoupled_from)
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
        backend: of the update (``kernels.update.choose_backend``).
        cautious_lrs: [slices] fp32 of each shard, of cautious Lion; else empty.
    """

    scalars: Mapping[int, StepScalars]
    grad_scale: Tensor
    skip: Tensor | None
    seed: int
    backend: str
    cautious_lrs: dict[ShardState, Tensor] = field(default_factory=dict)

    def of(self, batch: ShardBatch) -> StepScalars:
        return self.scalars[id(batch.group)]

    def arguments(self, batch: ShardBatch, active: Tensor | None) -> dict:
        """For a kernel that reads ``batch``. ``active``: [slices] fp32, 0 where a slice stays as it is; None: none."""
        lrs = [self.cautious_lrs[shard] for shard in batch.owning] if self.cautious_lrs else None
        return {
            "grad_scale": self.grad_scale,
            "active": active,
            "seed": self.seed,
            "cautious_lrs": None if lrs is None else torch.cat(lrs),
            "backend": self.backend,
        }


def cautious_lrs(
    shards: Sequence[ShardState], scalars: Mapping[int, StepScalars], grad_scale: Tensor
) -> dict[ShardState, Tensor]:
    """[slices] fp32 for each shard, from counts over whole parameters: one small all-reduce a group of ranks."""
    by_groups: dict[ShardGroups, list[ShardState]] = {}
    for shard in shards:
        by_groups.setdefault(shard.bucket.groups, []).append(shard)
    lrs = {}
    for groups, members in by_groups.items():
        message = torch.cat([shard.count_aligned(scalars[id(shard.group)], grad_scale) for shard in members])
        collectives.all_reduce(message, groups.shard_group)
        counts = message.split([len(shard.bucket.params) for shard in members])
        for shard, count in zip(members, counts, strict=True):
            lr = cautious_lr(scalars[id(shard.group)].lr, count, shard.param_numels)
            lrs[shard] = lr.index_select(0, shard.slice_params)
    return lrs
