"""Peer memory of processes that have no GPUs: files that all ranks of a group map.

All else is the product's: the transport, as many receive buffers, the barriers. One rank can be made late: it sleeps
behind every barrier, before it reads what the barrier has promised, so that a barrier or a buffer too few shows.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from lion_dist import choose_transport
from lion_dist.peer_memory.memory import PeerBuffer, PeerMemory
from lion_dist.peer_memory.transport import PeerTransport
from lion_dist.sharding import collectives

LATE_BY = 0.03  # seconds


class SharedFiles(PeerMemory):
    """``PeerMemory`` but for where the memory comes from, and with gloo's barrier. ``late``: the rank that is late."""

    def __init__(self, group, folder: Path, late: int | None = None):
        self.rank, self.world_size, self._group, self.device = group.rank(), group.size(), group, torch.device("cpu")
        self._folder, self._count, self._late = folder, 0, late
        self._handle = SimpleNamespace(barrier=self._meet)

    def _meet(self, channel: int) -> None:
        dist.barrier(self._group)
        if self.rank == self._late:
            time.sleep(LATE_BY)

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
def shared_files(late: int | None = None) -> Iterator[None]:
    """``ShardedLion``s made within have peer memory, over which rank ``late`` is late."""
    folders = []

    def over_files(groups, _device, stream, _peer_memory, use_triton):
        group = groups.shard_group
        if group is None:
            return None
        folder = tempfile.mkdtemp(dir="/dev/shm") if group.rank() == 0 else None
        folders.append(collectives.gather_objects(folder, group)[0])
        return PeerTransport(SharedFiles(group, Path(folders[-1]), late), groups, stream, use_triton)

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


def over_shared_files_with_one_late(late: int, function: Callable, *args):
    """The same, where rank ``late`` is late."""
    with shared_files(late):
        return function(*args)
