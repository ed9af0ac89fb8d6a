"""Peer memory of processes that have no GPUs: files that all ranks of a group map."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from lion_dist import choose_transport
from lion_dist.peer_memory.memory import PeerBuffer, PeerMemory
from lion_dist.peer_memory.transport import PeerTransport
from lion_dist.sharding import collectives


class SharedFiles(PeerMemory):
    """``PeerMemory`` but for where the memory comes from, and with gloo's barrier."""

    def __init__(self, group, folder: Path):
        self.rank, self.world_size, self._group, self.device = group.rank(), group.size(), group, torch.device("cpu")
        self._folder, self._count = folder, 0
        self._handle = SimpleNamespace(barrier=lambda channel: dist.barrier(group))

    def allocate(self, numel: int, dtype: torch.dtype) -> PeerBuffer:
        self._count += 1
        paths = [self._folder / f"{self._count}-{rank}" for rank in range(self.world_size)]
        map_file = lambda path: torch.from_file(str(path), shared=True, size=numel, dtype=dtype)  # noqa: E731
        flat = map_file(paths[self.rank]).zero_()
        dist.barrier(self._group)  # all files are there
        peers = tuple(flat if rank == self.rank else map_file(path) for rank, path in enumerate(paths))
        dist.barrier(self._group)  # and may go
        return PeerBuffer(flat, peers)


@contextlib.contextmanager
def shared_files() -> Iterator[None]:
    """``ShardedLion``s made within have peer memory."""
    folders = []

    def over_files(groups, _device, stream, _peer_memory, use_triton):
        group = groups.shard_group
        if group is None:
            return None
        folder = tempfile.mkdtemp(dir="/dev/shm") if group.rank() == 0 else None
        folders.append(collectives.gather_objects(folder, group)[0])
        return PeerTransport(SharedFiles(group, Path(folders[-1])), groups, stream, use_triton)

    choose_transport.CONNECTORS.insert(0, over_files)
    try:
        yield
    finally:
        choose_transport.CONNECTORS.remove(over_files)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # what is mapped stays until it is not


def over_shared_files(function: Callable, *args):
    """``function(*args)`` with peer memory; the files go when it is done."""
    with shared_files():
        return function(*args)
