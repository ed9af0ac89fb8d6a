"""The transport of NCCL and gloo: gradients are packed into one buffer, and reduced by a collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_dist.sharding import collectives
from lion_dist.sharding.buffers import GradBuffer, GradBufferPool, gaps_of, views_of
from lion_dist.sharding.collectives import COMPLETED, Work
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.layout import BucketLayout
from lion_dist.sharding.memory_format import MemoryFormat
from lion_dist.sharding.process_groups import ShardGroups
from lion_dist.sharding.transport import FlatBuffer


class CollectiveTransport:
    """Buckets of one dtype on the wire share a few buffers.

    On a CUDA stream one buffer is enough, for its uses queue up in order, packing included; what waits there is the
    gradients of ``CommStream.HELD`` buckets. So three buckets are in memory on either device.

    Args:
        stream: where communication is enqueued.
        bounded: False: on a CPU each bucket has a buffer of its own, so that backward never waits for one.
    """

    name = "collectives"

    def __init__(self, groups: ShardGroups, device: torch.device, stream: CommStream, *, bounded: bool = True):
        self.groups, self.device, self.stream = groups, device, stream
        self._depth = 1 if device.type == "cuda" else GradBufferPool.DEPTH if bounded else None
        self._pools: dict[torch.dtype, GradBufferPool] = {}

    @property
    def grad_buffer_nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools.values())

    def allocate(self, numel: int, dtype: torch.dtype) -> FlatBuffer:
        return FlatBuffer(torch.zeros(numel, dtype=dtype, device=self.device))

    def reduce_scatter(
        self, layout: BucketLayout, formats: Sequence[MemoryFormat], dtype: torch.dtype, *, ordered: bool
    ) -> PackedReduceScatter:
        if dtype not in self._pools:
            self._pools[dtype] = GradBufferPool(lambda numel: self.allocate(numel, dtype), self._depth)
        pool = self._pools[dtype]
        pool.fit(layout.numel)
        return PackedReduceScatter(layout, formats, pool, self.groups, self.stream, ordered=ordered)

    def reserve(self) -> None:
        """Nothing: each rank allocates when it needs to."""

    def all_gather(self, buffer: FlatBuffer, shard: Tensor) -> Work:
        return collectives.all_gather(buffer.flat, shard, self.groups.shard_group)


class PackedReduceScatter:
    """The reductions of one bucket: its gradients are copied into a buffer, in one launch, and leave from there."""

    squares = None

    def __init__(
        self,
        layout: BucketLayout,
        formats: Sequence[MemoryFormat],
        pool: GradBufferPool,
        groups: ShardGroups,
        stream: CommStream,
        *,
        ordered: bool,
    ):
        self._layout, self._formats, self.pool = layout, formats, pool
        self._groups, self._stream, self._ordered = groups, stream, ordered

    def start(self, grads: Sequence[Tensor | None], output: Tensor, *, adds_up: bool, complete: Work) -> Work:
        buffer = self.pool.take()
        self._pack(buffer, grads)
        self._stream.keep_alive_until_done(grads)
        buffer.release = complete
        flat = buffer.flat[: self._layout.numel]
        reduced = output
        if adds_up:
            reduced = output.new_empty(output.shape, dtype=torch.float32 if self._ordered else flat.dtype)
        work = collectives.reduce_scatter(reduced, flat, self._groups.shard_group, ordered=self._ordered)

        def finish() -> None:
            work()
            buffer.release = COMPLETED  # whoever takes it next must not wait for a later reduction of this bucket
            sum_replicas(reduced, self._groups, ordered=self._ordered)
            if adds_up:
                output.add_(reduced)

        return finish

    def note_written(self, output: Tensor) -> None:
        """Nothing is kept of ``output``."""

    def _pack(self, buffer: GradBuffer, grads: Sequence[Tensor | None]) -> None:
        places, gaps = self._views_of(buffer)
        present = [i for i, grad in enumerate(grads) if grad is not None]
        empty = gaps
        if len(present) < len(grads):
            empty = gaps + [places[i] for i, grad in enumerate(grads) if grad is None and places[i].numel()]
            places, grads = [places[i] for i in present], [grads[i] for i in present]
        if empty:
            torch._foreach_zero_(empty)
        if present:
            with torch.no_grad():
                torch._foreach_copy_(places, grads)

    def _views_of(self, buffer: GradBuffer) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters' places in ``buffer`` and the gaps between them; made once."""
        if self not in buffer.views:
            flat = buffer.flat[: self._layout.numel]
            buffer.views[self] = views_of(flat, self._layout, self._formats), gaps_of(flat, self._layout)
        return buffer.views[self]


def sum_replicas(reduced: Tensor, groups: ShardGroups, *, ordered: bool) -> None:
    """Sum ``reduced`` over the ranks that hold the same shard, in place."""
    if ordered:
        collectives.ordered_all_reduce(reduced, groups.replicate_group)
    else:
        collectives.all_reduce(reduced, groups.replicate_group)
