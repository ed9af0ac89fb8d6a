"""Collectives between GPUs of one host that reach each other's memory: copy engines move the bytes, not SMs.

NCCL's kernels take SMs and memory bandwidth from the computation that they overlap with. A copy from a peer's memory
takes neither, one into it little. (Two H100 on NVLink, 26 all-gathers of 104 MB beside matrix products: 4.3 ms, and the
products are as fast as alone; by NCCL 8.3 ms, and the products are 7% slower. It takes less of the host, too.) And
because every addend arrives as it was sent, gradients are summed in fp32 in rank order and rounded once, whatever the
wire's dtype.

Memory comes from ``torch.distributed._symmetric_memory``, whose interface torch calls alpha; all use of it is here.
A gather is closed by barriers on both sides, kernels that wait for the other GPUs: before it every rank's part is
there, after it nobody reads that any more. (A reduction does with one: ``transport.py``.) All is enqueued on the
current stream and the host waits for nothing.

What has the same tensors and addresses as in an earlier step is recorded as a CUDA graph and replayed from then on:
6 us of the host, where a barrier takes 5, a copy 4 and a Triton kernel 37, and twice that within a step. (Gradients
come to the same addresses in most steps: the caching allocator is asked the same questions in the same order.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lion_dist.sharding import collectives
from lion_dist.sharding.transport import FlatBuffer

MOST_RECORDINGS = 1024  # of one buffer

# What a collective does on the device, as a function that queues it and allocates nothing, and the memory of its own
# that this reads. The function is forgotten when it has been recorded, and the gradients with it.
Prepare = Callable[[], tuple[Callable[[], None], Tensor | None]]

allocated_bytes = 0  # by this process; torch.cuda.memory_allocated() does not count them


def _count_allocated(nbytes: int) -> None:
    global allocated_bytes
    allocated_bytes += nbytes


@dataclass(frozen=True)
class Recording:
    """Work on the device as a CUDA graph, and memory of its own that it reads."""

    graph: torch.cuda.CUDAGraph
    memory: Tensor | None


@dataclass(frozen=True)
class PeerBuffer(FlatBuffer):
    """Memory of the same size on each rank of a group, that all of them can read and write.

    Attributes:
        peers: every rank's, by rank. They keep the memory mapped, here and there.
    """

    peers: tuple[Tensor, ...]
    recordings: dict[tuple, Recording | None] = field(default_factory=dict, repr=False)  # PeerMemory's


class PeerMemory:
    """The ranks of one group, who reach each other's memory (``connect.connect()`` asks whether they do)."""

    def __init__(self, group: ProcessGroup, device: torch.device):
        """All ranks of ``group`` together, as every method. RuntimeError where the driver or the container forbids."""
        self.rank, self.world_size, self._group, self.device = group.rank(), group.size(), group, device
        self._recorder = torch.cuda.Stream(device)
        self._meeting_place, self._handle = self._rendezvous(1024, torch.uint8)  # no byte of it is used

    def _rendezvous(self, numel: int, dtype: torch.dtype):
        from torch.distributed import _symmetric_memory as symmetric_memory

        flat = symmetric_memory.empty(numel, dtype=dtype, device=self.device)
        handle = symmetric_memory.rendezvous(flat, self._group)
        if handle is None:
            raise RuntimeError("torch gave no handle of symmetric memory")
        return flat, handle

    def allocate(self, numel: int, dtype: torch.dtype) -> PeerBuffer:
        """Zeros. It waits for the other ranks to allocate theirs."""
        flat, handle = self._rendezvous(numel, dtype)
        peers = tuple(_remote(handle, rank, numel, dtype) for rank in range(self.world_size))
        if peers[self.rank].data_ptr() != flat.data_ptr():
            raise RuntimeError("symmetric memory is mapped elsewhere than where it was allocated")
        _count_allocated(flat.nbytes)
        weakref.finalize(flat.untyped_storage(), _count_allocated, -flat.nbytes)
        flat.zero_()
        self._handle.barrier(channel=1)  # nobody reads it before it is zero; collectives may run on another stream
        return PeerBuffer(flat, peers)

    def run(self, buffer: PeerBuffer, what: tuple, prepare: Prepare) -> None:
        """Queue what ``prepare()`` returns, or replay its recording.

        The recording is known by ``what``: all that it depends on but ``buffer``, addresses among it. The first call
        runs as it is: it may compile and load kernels, which a recording cannot.
        """
        recordings = buffer.recordings
        if not buffer.flat.is_cuda or torch.cuda.is_current_stream_capturing():
            prepare()[0]()
        elif what not in recordings:
            if len(recordings) >= MOST_RECORDINGS:  # of memory that moves
                recordings.clear()
            recordings[what] = None
            prepare()[0]()
        else:
            if recordings[what] is None:
                recordings[what] = self._record(*prepare())
            recordings[what].graph.replay()

    def _record(self, queue: Callable[[], None], memory: Tensor | None) -> Recording:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._recorder):  # not torch.cuda.graph(), which waits for the device
            graph.capture_begin(capture_error_mode="thread_local")  # other threads may do as they like
            try:
                queue()
            finally:
                graph.capture_end()
        return Recording(graph, memory)

    def barrier(self) -> None:
        """What follows on the current stream follows what every rank has queued before its own call."""
        self._handle.barrier(channel=0)

    def all_gather(self, buffer: PeerBuffer) -> None:
        """Every rank's shard of ``buffer`` [world_size * shard_numel] becomes that of all."""
        shard_numel = buffer.flat.numel() // self.world_size
        collectives.count_sent((self.world_size - 1) * shard_numel * buffer.flat.itemsize)

        def queue() -> None:
            self.barrier()
            for owner in self.others():
                first = owner * shard_numel
                buffer.flat.narrow(0, first, shard_numel).copy_(buffer.peers[owner].narrow(0, first, shard_numel))
            self.barrier()

        self.run(buffer, ("all_gather",), lambda: (queue, None))

    def received_numel(self, numel: int) -> int:
        """Room for what the other ranks have of this one's shard of ``numel`` elements."""
        return numel - numel // self.world_size

    def place_at(self, owner: int, received: PeerBuffer, shard_numel: int) -> Tensor:
        """[shard_numel]: where this rank puts its addend to the shard of ``owner``, in that one's ``received``."""
        row = self.rank - (self.rank > owner)
        return received.peers[owner].narrow(0, row * shard_numel, shard_numel)

    def others(self) -> list[int]:
        """The other ranks, in an order in which each has another one first."""
        return [(self.rank + step) % self.world_size for step in range(1, self.world_size)]


def _remote(handle, rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    if hasattr(handle, "get_remote_tensor"):  # knows where in a larger allocation the tensor lies
        return handle.get_remote_tensor(rank, (numel,), dtype)
    return handle.get_buffer(rank, (numel,), dtype)
