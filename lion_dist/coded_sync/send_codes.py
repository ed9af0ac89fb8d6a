"""``SendCodes``: the param sync that sends how parameters moved, and lets every rank replay that on its own copy.

What a code is, the codec knows (``codes.py``, ``shard_codec.py``).

Codes have a side channel for what they cannot say. Its length is agreed by one small message after the last update, the
step's only wait for the device; a bucket with too many escapes, or with parameters that somebody else has written, is
gathered in that step. To agree on that later, at the bucket's first use, would save the wait. But ranks need not use
buckets together (one rank evaluates alone, a branch of the model runs on some ranks), and a gather that starts on some
of them only would hang.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lion_dist.sharding import collectives
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.collectives import COMPLETED, Work
from lion_dist.sharding.layout import round_up

TOO_MANY = 2**31 - 1


class Codec(Protocol):
    """The codes of one bucket; it remembers the shard before the update (``shard_codec.ShardCodec``)."""

    capacity: int  # escapes that a message may have
    escape_step: int  # they come in multiples of so many

    def encode(self, param_shard: Tensor) -> Tensor:
        """[] int32 on the device: escapes of this step's update."""

    def message(self, escapes: int) -> Tensor:
        """[bytes] uint8, as long on every rank."""

    def replay(self, flat_params: Tensor, messages: Tensor) -> None:
        """Bring the other ranks' shards up to date by their ``messages`` [ranks, bytes]."""

    def abandon(self) -> None:
        """The bucket is gathered in this step."""


class SendCodes:
    """Each bucket's update is encoded when its shard is updated; codes are sent when all ranks know their lengths."""

    def __init__(self):
        self.codecs: dict[Bucket, Codec] = {}
        self._escapes: dict[Bucket, Tensor] = {}  # [] int32, of this step's buckets
        self._replays: list[_Replay] = []  # of the last step

    def after_update(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            if bucket.groups.shard_group is None:
                bucket.start_param_sync()  # of this rank alone: nothing moves
            else:
                self._escapes[bucket] = self.codecs[bucket].encode(bucket.param_shard)

    def after_updates(self, changed: Collection[Bucket]) -> None:
        """``changed``: buckets with parameters that somebody else has written on this rank."""
        escapes, self._escapes = self._escapes, {}
        self._replays.clear()
        for groups in dict.fromkeys(bucket.groups for bucket in escapes):
            buckets = [bucket for bucket in escapes if bucket.groups == groups]
            counts = torch.stack([escapes[bucket] for bucket in buckets])
            for i, bucket in enumerate(buckets):
                if bucket in changed:
                    counts[i].fill_(TOO_MANY)
            collectives.all_reduce_max(counts, groups.shard_group)
            for bucket, count in zip(buckets, counts.tolist(), strict=True):
                self._start(bucket, count)

    def _start(self, bucket: Bucket, escapes: int) -> None:
        codec = self.codecs[bucket]
        escapes = round_up(escapes, codec.escape_step)
        if escapes > codec.capacity:
            codec.abandon()
            bucket.start_param_sync()
        else:
            bucket.start_param_sync(functools.partial(self._exchange, bucket, codec, codec.message(escapes)))

    def _exchange(self, bucket: Bucket, codec: Codec, message: Tensor) -> Work:
        messages = message.new_empty(bucket.groups.shard_world_size * len(message))
        finish_gather = collectives.all_gather(messages, message, bucket.groups.shard_group)
        replay = _Replay(finish_gather, bucket, codec, messages)
        if message.is_cuda:  # the replay joins the queue now; until it has run, its messages must stay in memory
            replay()
            return functools.partial(_keep, message, messages)
        self._replays.append(replay)
        return replay

    @property
    def is_interrupted(self) -> bool:
        """Whether an exception has ended a replay: those parameters are neither old nor new."""
        return any(replay.is_interrupted for replay in self._replays)

    def give_up(self) -> None:
        """An exception has ended an update: what the codes under way are relative to is not what ranks hold."""
        self._escapes.clear()
        for codec in self.codecs.values():
            codec.abandon()
        for replay in self._replays:
            replay.is_wanted = replay.is_interrupted = False


class _Replay:
    """The ``Work`` of codes that are under way: waits for them and replays them, once."""

    def __init__(self, finish_gather: Work, bucket: Bucket, codec: Codec, messages: Tensor):
        self._finish_gather, self._bucket, self._codec, self._messages = finish_gather, bucket, codec, messages
        self.is_wanted, self.is_interrupted = True, False

    def __call__(self) -> None:
        self._finish_gather()
        if not self.is_wanted:
            return
        if self.is_interrupted:
            raise RuntimeError(
                f"bucket of {self._bucket.names[0]!r}: an exception has ended the replay of coded parameters. Call "
                "zero_grad() on every rank, which makes them whole."
            )
        self.is_interrupted = True
        self._codec.replay(self._bucket.flat_params, self._messages.view(self._bucket.groups.shard_world_size, -1))
        self.is_wanted = self.is_interrupted = False
        self._messages, self._finish_gather = None, COMPLETED  # their memory goes now, not with the next step


def _keep(*_tensors: Tensor) -> None:
    """The ``Work`` of what is queued, for as long as it is not forgotten."""
