"""The transport of two levels: another one inside the node, and collectives across nodes for what that has made.

The order of the sum: each node sums its ranks' gradients, as the transport inside it does (in fp32 in rank order where
sums are ordered); the node's sum is rounded to ``reduce_dtype``; and the nodes' sums are added in the order of nodes.

So a node sends, for each parameter and step, one gradient in ``reduce_dtype`` and one parameter, times (nodes - 1) /
nodes, however many ranks it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lion_dist.sharding import collectives
from lion_dist.sharding.collectives import COMPLETED, Work
from lion_dist.sharding.layout import BucketLayout
from lion_dist.sharding.memory_format import MemoryFormat
from lion_dist.sharding.transport import FlatBuffer, ReduceScatter, Transport
from lion_dist.two_levels.levels import LevelGroups


@dataclass(frozen=True)
class NodeLayout(BucketLayout):
    """A bucket as the ranks of one node share it: in ``shard_world_size`` pieces of ``nodes`` shards."""

    nodes: int = 1

    @cached_property
    def numel(self) -> int:
        return BucketLayout(self.param_numels, self.shard_world_size * self.nodes, self.alignment).numel


class TwoLevelTransport:
    """Args: ``inside``: of the ranks of this node."""

    def __init__(self, inside: Transport, levels: LevelGroups):
        self._inside, self._levels = inside, levels
        self.name = f"two levels, {inside.name} inside the node"

    @property
    def grad_buffer_nbytes(self) -> int:
        return self._inside.grad_buffer_nbytes

    def allocate(self, numel: int, dtype: torch.dtype) -> FlatBuffer:
        return self._inside.allocate(numel, dtype)

    def reduce_scatter(
        self, layout: BucketLayout, formats: Sequence[MemoryFormat], dtype: torch.dtype, *, ordered: bool
    ) -> TwoLevelReduceScatter:
        levels = self._levels
        of_node = NodeLayout(layout.param_numels, levels.inside.size(), layout.alignment, levels.across.size())
        inside = self._inside.reduce_scatter(of_node, formats, dtype, ordered=ordered)
        return TwoLevelReduceScatter(inside, of_node.shard_numel, levels, dtype, ordered=ordered)

    def reserve(self) -> None:
        self._inside.reserve()

    def all_gather(self, buffer: FlatBuffer, shard: Tensor) -> Work:
        return self._levels.gather_over(buffer.flat, shard, lambda piece: self._inside.all_gather(buffer, piece))


class TwoLevelReduceScatter:
    """The reductions of one bucket: inside the node to a piece on each rank, across nodes to a shard of it."""

    squares = None

    def __init__(
        self, inside: ReduceScatter, piece_numel: int, levels: LevelGroups, dtype: torch.dtype, *, ordered: bool
    ):
        self._inside, self._piece_numel, self._levels = inside, piece_numel, levels
        self._dtype, self._ordered = dtype, ordered

    def start(self, grads: Sequence[Tensor | None], output: Tensor, *, adds_up: bool, complete: Work) -> Work:
        summed = torch.float32 if self._ordered else self._dtype
        piece = torch.zeros(self._piece_numel, dtype=summed, device=output.device)
        work = self._inside.start(grads, piece, adds_up=False, complete=complete)

        def finish() -> None:
            work()
            reduced = torch.empty_like(output, dtype=summed) if adds_up else output
            sent = piece.to(self._dtype)
            collectives.reduce_scatter(reduced, sent, self._levels.across, ordered=self._ordered)()
            if adds_up:
                output.add_(reduced)

        if not output.is_cuda:
            return finish
        finish()  # it joins the queue
        return COMPLETED

    def note_written(self, output: Tensor) -> None:
        """Nothing is kept of ``output``."""
