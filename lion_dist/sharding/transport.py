"""What moves bytes between ranks: the one thing that a bucket asks, whatever carries them.

There are ``CollectiveTransport`` (NCCL, gloo) and ``PeerTransport`` (copies between the GPUs of one host);
``choose_transport.py`` chooses. A transport moves bytes and knows no states, a bucket knows states and no transports.

Every operation enqueues on the current stream and returns a ``Work``, which completes it. All ranks of the groups call
the operations in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lion_dist.sharding.collectives import Work
from lion_dist.sharding.layout import BucketLayout
from lion_dist.sharding.memory_format import MemoryFormat


@dataclass(frozen=True)
class FlatBuffer:
    """Memory that a transport has allocated.

    Attributes:
        flat: [numel], this rank's.
    """

    flat: Tensor


class ReduceScatter(Protocol):
    """The reductions of one bucket's gradients to this rank's shard of their sum, replicas included.

    Attributes:
        squares: [n] fp64, sums of squares of parts of what ``output`` holds in the end, where they cost nothing; else
            None.
    """

    squares: Tensor | None

    def start(self, grads: Sequence[Tensor | None], output: Tensor, *, adds_up: bool, complete: Work) -> Work:
        """Reduce ``grads`` into ``output``.

        Args:
            grads: of the bucket's parameters; None stands for zeros. They are read until the ``Work`` is complete, and
                the transport keeps them alive for as long.
            output: [shard_numel].
            adds_up: the sum is added to what fp32 ``output`` holds.
            complete: the caller's completion of this reduction. The transport calls it when it needs the memory.
        """

    def note_written(self, output: Tensor) -> None:
        """The program has changed ``output`` after its reduction."""


class Transport(Protocol):
    """The ranks of one ``ShardGroups``.

    Attributes:
        name: for the log.
        grad_buffer_nbytes: bytes of the memory in which gradients are sent or received, shared by all buckets.
    """

    name: str

    @property
    def grad_buffer_nbytes(self) -> int: ...

    def allocate(self, numel: int, dtype: torch.dtype) -> FlatBuffer:
        """Zeros that :meth:`all_gather` can fill."""

    def reduce_scatter(
        self, layout: BucketLayout, formats: Sequence[MemoryFormat], dtype: torch.dtype, *, ordered: bool
    ) -> ReduceScatter:
        """The reductions of a new bucket. ``dtype``: of what is sent. ``ordered``: see ``collectives.reduce_scatter``;
        the output is fp32 then, else of ``dtype``."""

    def reserve(self) -> None:
        """Allocate what all ranks must allocate together; called when buckets have been added."""

    def all_gather(self, buffer: FlatBuffer, shard: Tensor) -> Work:
        """Fill ``buffer`` with every rank's ``shard``, which is a view of it."""
