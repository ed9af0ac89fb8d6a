"""The norm of the gradients where ranks hold other parts of the model: what is counted here, and the sum over all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_dist.composed.axes import ModelAxes
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.grad_norm import GradNorm, SumOfSquares
from lion_dist.sharding.process_groups import ShardGroups


class NormOfParts(GradNorm):
    """Each rank adds what it counts, and ``axes`` add up over the parts of the model."""

    def __init__(self, groups: ShardGroups, device: torch.device, sum_of_squares: SumOfSquares, axes: ModelAxes):
        super().__init__(groups, device, sum_of_squares)
        self.choosing_ranks, self._axes = axes.alike(groups), axes

    def __call__(self, buckets: Sequence[Bucket], also: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._axes.join(*super().__call__(buckets, also))

    def _squares_of(self, buckets: list[Bucket]) -> Tensor:
        by_count: dict[bool, list[Bucket]] = {}
        for bucket in buckets:
            by_count.setdefault(self._axes.is_counted(bucket.params[0]), []).append(bucket)
        # Times 0 a sum that is not finite is NaN: the step is skipped for it all the same.
        parts = [GradNorm._squares_of(self, some) * (1.0 if counts else 0.0) for counts, some in by_count.items()]
        return torch.stack(parts).sum()
