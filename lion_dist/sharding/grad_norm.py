"""The verdict on a step's gradients: their global norm, whether they are finite, and which parameters had any.

One message per group of ranks: a vector in fp64 that is summed, ``[sum of squares, uses of parameter 0, ...]``. fp64
makes the norm independent of how the parameters are partitioned (in fp32, 56 of 200 partitions changed it), and no
sum of squares of fp32 numbers overflows it: it is finite exactly when every gradient is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lion_dist.sharding import collectives
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.process_groups import ShardGroups

SumOfSquares = Callable[[Sequence[Tensor]], Tensor]  # [] fp64, of all elements, whatever their dtype


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """[] fp64, accumulated in fp64 in one pass. (On a GPU ``kernels/squares_triton.py`` is faster.)"""
    return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)).square().sum()


class GradNorm:
    """Computes the verdict of a step; all ranks call it together, with all grad shards reduced.

    Everything it returns stays on the device. ``total`` is [] fp64: the sum of squares of the summed, still scaled
    gradients over all parameters. ``used`` is [params of all buckets] fp32, 1 where the parameter had a gradient on
    some rank.
    """

    def __init__(self, main_groups: ShardGroups, device: torch.device, sum_of_squares: SumOfSquares):
        self.main_groups, self.device, self.sum_of_squares = main_groups, device, sum_of_squares
        self._uses: dict[tuple[bool, ...], Tensor] = {}  # the last pattern of uses of each group, on the device

    def __call__(self, buckets: Sequence[Bucket]) -> tuple[Tensor, Tensor]:
        by_groups: dict[ShardGroups, list[Bucket]] = {}
        for bucket in buckets:
            by_groups.setdefault(bucket.groups, []).append(bucket)
        if not buckets:  # every parameter is frozen
            return torch.zeros((), dtype=torch.float64, device=self.device), torch.zeros(0, device=self.device)
        totals, used = zip(*(self._judge(groups, members) for groups, members in by_groups.items()), strict=True)
        if list(by_groups) == [self.main_groups]:
            return totals[0], used[0]
        # Groups of their own (experts): every rank of a group brings an equal share of that group's sum.
        total = torch.stack([t / groups.num_ranks for t, groups in zip(totals, by_groups, strict=True)]).sum()
        for axis in self.main_groups.axes:
            collectives.all_reduce(total, axis)
        members = list(itertools.chain.from_iterable(by_groups.values()))
        used_of = dict(zip(members, torch.cat(used).split([len(b.params) for b in members]), strict=True))
        return total, torch.cat([used_of[bucket] for bucket in buckets])

    def _judge(self, groups: ShardGroups, buckets: list[Bucket]) -> tuple[Tensor, Tensor]:
        """The total of these buckets, and which of their parameters were used."""
        message = torch.cat([self._squares_of(buckets).reshape(1), self._uses_on_device(buckets)])
        for axis in groups.axes:
            collectives.all_reduce(message, axis)
        return message[0] / groups.replicate_world_size, (message[1:] > 0).float()

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
