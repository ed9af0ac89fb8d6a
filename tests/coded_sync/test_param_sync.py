"""What ranks agree on before codes leave, with a codec that only takes notes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lion_dist import PrecisionPolicy
from lion_dist.coded_sync.send_codes import SendCodes
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.collective_transport import CollectiveTransport
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.process_groups import resolve_groups

CPU = torch.device("cpu")


class NotedCodec:
    """Every message holds the sender's rank + 1; a replay adds them up in the bucket's parameters."""

    capacity, escape_step = 64, 16

    def __init__(self, escapes: int, notes: list):
        self.escapes, self.notes = escapes, notes

    def encode(self, param_shard: Tensor) -> Tensor:
        self.notes.append("encode")
        return torch.tensor(self.escapes, dtype=torch.int32)

    def message(self, escapes: int) -> Tensor:
        self.notes.append(f"message of {escapes}")
        return torch.full((escapes + 1,), dist.get_rank() + 1, dtype=torch.uint8)

    def replay(self, flat_params: Tensor, messages: Tensor) -> None:
        self.notes.append(f"replay of {messages[:, 0].tolist()}")

    def abandon(self) -> None:
        self.notes.append("abandon")


def sync_two_buckets(escapes_by_rank: list[tuple[int, int]], written_on: int | None) -> list:
    groups = resolve_groups(None)
    notes: list = []
    sync = SendCodes(PrecisionPolicy(), "reference")
    buckets = []
    for escapes in escapes_by_rank[dist.get_rank()]:
        param = Parameter(torch.full((300,), float(dist.get_rank())))
        stream = CommStream()
        transport, wire = CollectiveTransport(groups, CPU, stream), torch.float32
        buckets.append(Bucket([param], ["p"], groups, transport, reduce_dtype=wire, ordered_sum=True, stream=stream))
        sync.codecs[buckets[-1]] = NotedCodec(escapes, notes)
    for bucket in buckets:
        sync.after_update([bucket])
    sync.after_updates({buckets[0]} if written_on == dist.get_rank() else set())
    for bucket in buckets:
        bucket.finish_param_sync()
    return [*notes, *(sorted(set(bucket.flat_params[:300].tolist())) for bucket in buckets)]


def test_messages_are_as_long_as_the_rank_with_most_escapes_needs(gloo):
    expected = ["encode", "encode", "message of 32", "message of 0", "replay of [1, 2]", "replay of [1, 2]"]
    for rank, notes in enumerate(gloo.run(2, sync_two_buckets, [(3, 0), (20, 0)], None)):
        assert notes == [*expected, [float(rank)], [float(rank)]]


@pytest.mark.parametrize("escapes, written_on", [([(0, 5), (65, 5)], None), ([(0, 5), (0, 5)], 0)])
def test_a_bucket_that_one_rank_cannot_code_is_gathered_on_all(gloo, escapes, written_on):
    """Too many escapes, or parameters that somebody else has written; the other bucket is coded all the same."""
    for rank, notes in enumerate(gloo.run(2, sync_two_buckets, escapes, written_on)):
        gathered, coded = [0.0, 1.0], [float(rank)]
        assert notes == ["encode", "encode", "abandon", "message of 16", "replay of [1, 2]", gathered, coded]
