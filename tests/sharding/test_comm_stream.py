"""What communication reads is kept: by the transports on a stream that keeps, and by a GPU's stream on doubles."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist.peer_memory.transport import PeerTransport
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.collective_transport import CollectiveTransport
from lion_dist.sharding.comm_stream import CommStream, CudaCommStream
from lion_dist.sharding.process_groups import ShardGroups, resolve_groups
from tests.shared_files import SharedFiles

CPU = torch.device("cpu")


class KeepingStream(CommStream):
    """A CPU's, which keeps what a GPU's does, and for good."""

    def __init__(self):
        self.kept: list[Tensor] = []

    def keep_alive_until_done(self, tensors) -> None:
        self.kept += tensors


def by_collectives(groups: ShardGroups, stream: CommStream, _folder: Path) -> CollectiveTransport:
    return CollectiveTransport(groups, CPU, stream)


def by_peers(groups: ShardGroups, stream: CommStream, folder: Path) -> PeerTransport:
    replica = folder / str(groups.replicate_rank)
    replica.mkdir(exist_ok=True)
    return PeerTransport(SharedFiles(groups.shard_group, replica), groups, stream, use_triton=False)


def reduce_twice(transport_of: Callable, replicas: int, folder: Path) -> None:
    """Autograd's gradients belong to nobody but the bucket, which forgets them."""
    shape = (replicas, dist.get_world_size() // replicas)
    groups = resolve_groups(dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))
    stream, params = KeepingStream(), [nn.Parameter(torch.zeros(130)), nn.Parameter(torch.zeros(5))]
    transport = transport_of(groups, stream, folder)
    bucket = Bucket(params, ["a", "b"], groups, transport, reduce_dtype=torch.float32, ordered_sum=True, stream=stream)
    transport.reserve()
    for _ in range(2):  # the second adds up
        for param in params:
            param.grad = torch.ones_like(param)
        grads = [weakref.ref(param.grad) for param in params]
        bucket.start_grad_sync()
        assert all(param.grad is None for param in params)
        assert [grad() is not None for grad in grads] == [True, True]
        bucket.finish_grad_sync()
    assert len(stream.kept) == 4


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("transport_of", [by_collectives, by_peers])
def test_gradients_are_kept_for_the_communication_that_reads_them(gloo, tmp_path, transport_of, replicas):
    gloo.run(2 * replicas, reduce_twice, transport_of, replicas, tmp_path)


class Stream:
    """A double of torch.cuda.Stream: what it waits for, in order."""

    def __init__(self, device=None):
        self.device, self.waited_for, self.cuda_stream = device, [], id(self)

    def wait_event(self, event) -> None:
        self.waited_for.append(event)


class Event:
    def record(self, stream) -> None:
        self.stream = stream


@pytest.fixture
def program(monkeypatch) -> Stream:
    """The current stream of a GPU that is not there."""
    current = [Stream()]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    handle = "_cuda_getCurrentRawStream"  # torch without CUDA has none
    monkeypatch.setattr(torch._C, handle, lambda _index: current[-1].cuda_stream, raising=False)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.append(stream))
    return current[0]


def keep(stream: CudaCommStream) -> weakref.ref[Tensor]:
    tensor = torch.zeros(1)
    with stream.fork():
        stream.keep_alive_until_done([tensor, None])
    return weakref.ref(tensor)


def test_a_gpus_stream_keeps_what_the_last_buckets_read_and_the_program_waits_for_the_one_before(program):
    stream = CudaCommStream(torch.device("cuda", 0))
    kept = [keep(stream) for _ in range(stream.HELD)]
    assert all(tensor() is not None for tensor in kept) and not program.waited_for
    kept.append(keep(stream))
    assert [tensor() is not None for tensor in kept] == [False] + [True] * stream.HELD
    (event,) = program.waited_for
    assert event.stream is stream.stream
    stream.release()
    assert all(tensor() is None for tensor in kept)


def test_a_gpus_stream_that_nobody_waits_for_keeps_all_until_it_is_told(program):
    stream = CudaCommStream(torch.device("cuda", 0), bounded=False)
    kept = [keep(stream) for _ in range(3 * stream.HELD)]
    assert all(tensor() is not None for tensor in kept) and not program.waited_for
    stream.release()
    assert all(tensor() is None for tensor in kept)
