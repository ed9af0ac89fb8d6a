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
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lion_dist.coded_sync.shard_codec import CodedSlice, ShardCodec
from lion_dist.config import PrecisionPolicy
from lion_dist.kernels.reference import StepScalars
from lion_dist.param_sync import GatherParams
from lion_dist.shard_state import ShardBatch, ShardState
from lion_dist.sharding import collectives
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.collectives import COMPLETED, Work
from lion_dist.sharding.layout import round_up
from lion_dist.update_terms import UpdateTerms

TOO_MANY = 2**31 - 1


class SendCodes(GatherParams):
    """Each bucket's update is encoded when its shard is updated; codes are sent when all ranks know their lengths.

    Args:
        precision: of the optimizer.
        backend: of the update, and of the codes.
        cautious_wd: of the update's rule.
    """

    def __init__(self, precision: PrecisionPolicy, backend: str, *, cautious_wd: bool = False):
        self._precision, self._backend, self._cautious_wd = precision, backend, cautious_wd
        self.codecs: dict[Bucket, ShardCodec] = {}
        self._escapes: dict[Bucket, Tensor] = {}  # [] int32, of this step's buckets
        self._replays: list[_Replay] = []  # of the last step

    def add(self, shards: Sequence[ShardState], index_starts: Mapping[Parameter, int]) -> None:
        for shard in shards:
            starts = [index_starts[param] for param in shard.bucket.params]
            self.codecs[shard.bucket] = codec_of(shard, self._precision, starts, self._backend, self._cautious_wd)

    def update(self, batch: ShardBatch, active: Tensor | None, terms: UpdateTerms) -> None:
        if batch.groups.shard_group is None:  # of this rank alone: nothing moves
            super().update(batch, active, terms)
            return
        plain_state = not terms.rule.is_cautious and terms.rule.ema_decay is None  # what that launch can do
        in_one_launch = terms.backend == "triton" and plain_state
        counts, lrs = [len(shard.bucket.slices) for shard in batch.shards], terms.lrs.get(batch)
        moves = ((active != 0) & (terms.skip == 0)).split(counts)
        lrs_of_shards = [None] * len(counts) if lrs is None else lrs.split(counts)
        for shard, moved, lrs_of_shard in zip(batch.shards, moves, lrs_of_shards, strict=True):
            codec = self.codecs[shard.bucket]
            rates = rates_of(terms.of(batch), moved, lrs_of_shard)
            codec.begin(*rates, shard.steps, None if in_one_launch else shard.bucket.param_shard)
            if in_one_launch:
                _update_and_encode(shard, codec, moved, terms, batch)
        if not in_one_launch:
            super().update(batch, active, terms)

    def after_update(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            if bucket.groups.shard_group is None:
                bucket.start_param_sync()  # of this rank alone: nothing moves
            else:
                self._escapes[bucket] = self.codecs[bucket].encode(bucket.param_shard)

    def after_updates(self, changed: Collection[Bucket]) -> None:
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

    def _exchange(self, bucket: Bucket, codec: ShardCodec, message: Tensor) -> Work:
        messages = message.new_empty(bucket.groups.shard_world_size * len(message))
        finish_gather = bucket.groups.all_gather(messages, message)
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

    def __init__(self, finish_gather: Work, bucket: Bucket, codec: ShardCodec, messages: Tensor):
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
        self._messages, self._finish_gather = (
            self._messages.new_empty(0),
            COMPLETED,
        )  # their memory goes now, not with the next step


def codec_of(
    shard: ShardState, precision: PrecisionPolicy, starts: Sequence[int], backend: str, cautious_wd: bool
) -> ShardCodec:
    """The codec of one bucket's shard. ``starts``: global element indices of the parameters' first elements."""
    bucket = shard.bucket
    layout = bucket.layout
    slices = []
    for rank in range(layout.shard_world_size):
        first, _ = layout.shard_range(rank)
        rows = []
        for row, s in enumerate(layout.slices(rank)):
            index_start = starts[s.param] + s.param_start
            rows.append(CodedSlice(row, s.bucket_start - first, s.bucket_stop - first, index_start))
        slices.append(rows)
    return ShardCodec(
        bucket.param_shard.dtype,
        shard.main_param is not None,
        layout.shard_numel,
        slices,
        bucket.groups.shard_rank,
        bucket.device,
        precision.seed,
        backend,
        cautious_wd,
    )


def rates_of(scalars: StepScalars, moves: Tensor, cautious_lrs: Tensor | None) -> tuple[Tensor, Tensor]:
    """lr and decay of each slice, [slices] fp32; 0 and 1 where nothing moves. ``moves``: [slices] bool."""
    rates = torch.empty(2, len(moves), dtype=torch.float32, device=moves.device)
    for rate, value in zip(rates, (scalars.lr, scalars.decay), strict=True):
        rate.fill_(value)
    lr, decay = rates
    if cautious_lrs is not None:
        lr = cautious_lrs[:, 0]
    return torch.where(moves, lr, 0.0), torch.where(moves, decay, 1.0)


def _update_and_encode(
    shard: ShardState, codec: ShardCodec, moves: Tensor, terms: UpdateTerms, batch: ShardBatch
) -> None:
    """The update of this shard and its codes in one launch. ``moves``: [slices] bool."""
    codec.update_and_encode(
        shard.bucket.param_shard,
        shard.main_param,
        shard.exp_avg,
        shard.bucket.finish_grad_sync(),
        terms.of(batch),
        grad_scale=terms.grad_scale,
        moves=moves,
        steps=shard.steps,
        stochastic_momentum=shard.stochastic_momentum,
    )
    if shard.steps is not None:
        shard.steps += moves


def _keep(*_tensors: Tensor) -> None:
    """The ``Work`` of what is queued, for as long as it is not forgotten."""
