"""What the check of a step's gradients finds: their global norm, whether they are finite, which parameters had any.

One message per group of ranks: a vector in fp64 that is summed, ``[sum of squares, uses of parameter 0, ...]``, and
among all ranks a hash of what they have chosen for this step (``guards/step_agreement.py``). fp64 makes the norm
independent of how the parameters are partitioned (in fp32, 56 of 200 partitions changed it), and no sum of squares of
fp32 numbers overflows it: it is finite exactly when every gradient is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lion_dist.sharding import collectives
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.collective_error import CollectiveError
from lion_dist.sharding.process_groups import RankGroups, ShardGroups

SumOfSquares = Callable[[Sequence[Tensor]], Tensor]  # [] fp64, of all elements, whatever their dtype


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """[] fp64, accumulated in fp64 in one pass. (On a GPU ``triton_backend/squares.py`` is faster.)"""
    return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)).square().sum()


class GradNorm:
    """Sums what a step's check needs to know; all ranks call it together, with all grad shards reduced.

    Everything it returns stays on the device. ``total`` is [] fp64: the sum of squares of the summed, still scaled
    gradients over all parameters. ``used`` is [params of all buckets] fp32, 1 where the parameter had a gradient on
    some rank.
    """

    def __init__(self, main_groups: ShardGroups, device: torch.device, sum_of_squares: SumOfSquares):
        self.main_groups, self.device, self.sum_of_squares = main_groups, device, sum_of_squares
        self.choosing_ranks: RankGroups = main_groups  # they have the same learning rates, divisors, ...
        self._uses: dict[tuple[bool, ...], Tensor] = {}  # the last pattern of uses of each group, on the device

    def __call__(self, buckets: Sequence[Bucket], also: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``total``, ``used``, and ``also`` [n] fp64 summed over all ranks that train the same parameters."""
        by_groups: dict[ShardGroups, list[Bucket]] = {}
        for bucket in buckets:
            by_groups.setdefault(bucket.groups, []).append(bucket)
        if list(by_groups) == [self.main_groups]:
            total, used, also = self._check(self.main_groups, by_groups[self.main_groups], also)
            return total[0], used, also
        # Groups of their own (experts): every rank of a group brings an equal share of that group's sum.
        totals, used_of = [torch.zeros(1, dtype=torch.float64, device=self.device)], {}
        for groups, members in by_groups.items():
            total, used, _ = self._check(groups, members, also[:0])
            totals.append(total / groups.num_ranks)
            used_of |= zip(members, used.split([len(b.params) for b in members]), strict=True)
        message = torch.cat([torch.cat(totals).sum().reshape(1), also])
        self._sum(message, self.main_groups)
        none = torch.zeros(0, device=self.device)  # every parameter is frozen
        return message[0], torch.cat([none, *(used_of[bucket] for bucket in buckets)]), message[1:]

    def _check(self, groups: ShardGroups, buckets: list[Bucket], also: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[1] the total of these buckets, which of their parameters were used, and the sum of ``also``."""
        message = torch.cat([self._squares_of(buckets).reshape(1), also, self._uses_on_device(buckets)])
        self._sum(message, groups)
        first = 1 + len(also)
        return message[:1] / groups.replicate_world_size, (message[first:] > 0).float(), message[1:first]

    @staticmethod
    def _sum(message: Tensor, groups: ShardGroups) -> None:
        try:
            for axis in groups.axes:
                collectives.all_reduce(message, axis)
        except CollectiveError as error:
            groups.progress.explain(error, "judging the gradients (norm, finite, used)")
            raise

    def _squares_of(self, buckets: list[Bucket]) -> Tensor:
        """[] fp64, of the shards on this rank."""
        grads = [bucket.finish_grad_sync() for bucket in buckets]
        if buckets[0].squares is None:  # as of all that share its ranks
            return self.sum_of_squares(grads)
        return torch.cat([bucket.squares for bucket in buckets]).sum()

    def _uses_on_device(self, buckets: list[Bucket]) -> Tensor:
        """[params of all buckets] fp64; copied to the device only when the pattern is new."""
        pattern = tuple(used for bucket in buckets for used in bucket.used)
        if pattern not in self._uses:
            if len(self._uses) > 16:
                self._uses.clear()
            self._uses[pattern] = torch.tensor(pattern, dtype=torch.float64).to(self.device)
        return self._uses[pattern]
