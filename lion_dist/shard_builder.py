"""Build buckets, and this rank's state of each, from parameters: what is decided once, when parameters are added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import Parameter

from lion_dist.choose_transport import choose_transport
from lion_dist.config import PrecisionPolicy, ShardingConfig
from lion_dist.local_shard import local_tensor
from lion_dist.param_sync import GatherParams
from lion_dist.shard_state import ShardState
from lion_dist.sharded_params import ShardedParams
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.layout import choose_bucket_numel, pack_into_buckets
from lion_dist.sharding.phases import PhaseLabels
from lion_dist.sharding.process_groups import ShardGroups, backend_for
from lion_dist.sharding.transport import Transport


class ShardBuilder:
    """Lays parameters out in buckets, broadcasts them, and makes their shards.

    Args:
        stream, clock: of all buckets.
        backend: of the update.
    """

    def __init__(
        self,
        params: ShardedParams,
        precision: PrecisionPolicy,
        sharding: ShardingConfig,
        stream: CommStream,
        clock: PhaseLabels,
        backend: str,
        ema_decay: float | None = None,
    ):
        self._params, self._precision, self._sharding, self.ema_decay = params, precision, sharding, ema_decay
        self.stream, self.backend, self._clock = stream, backend, clock
        self._transports: dict[ShardGroups, Transport] = {}

    def build(self, params: Sequence[tuple[Parameter, dict]], param_sync: GatherParams) -> list[ShardState]:
        """Shards of new buckets of ``params`` and their param groups, in order. Frozen ones wait until they are not."""
        for param, group in params:
            if not param.requires_grad:
                self._params.frozen[param] = group
                self._params.groups_for(group).broadcast(local_tensor(param).data)
        trainable = [(p, g) for p, g in params if p.requires_grad]
        keys = [(id(g), p.dtype, self._params.groups_for(g)) for p, g in trainable]
        numels = [local_tensor(p).numel() for p, _ in trainable]
        if self._params.parts is not None:  # alike along tensor-parallel ranks, whose parts may be uneven
            keys = [(*key, *self._params.parts.bucket_key(p)) for key, (p, _) in zip(keys, trainable, strict=True)]
            numels = [self._params.parts.largest_numel(p) for p, _ in trainable]
        ranks = self._params.groups.shard_world_size
        bucket_numel = self._sharding.bucket_numel or choose_bucket_numel(sum(numels), ranks)
        shards = []
        for members in pack_into_buckets(numels, keys, bucket_numel):
            shards.append(self._make_shard([trainable[i][0] for i in members], trainable[members[0]][1]))
        for transport in self._transports.values():
            transport.reserve()
        param_sync.add(shards, self._params.index_starts)
        return shards

    def _make_shard(self, params: list[Parameter], group: dict) -> ShardState:
        groups, dtype = self._params.groups_for(group), params[0].dtype
        ordered = self._sharding.ordered_sum
        if ordered is None:
            ordered = any(backend_for(axis, params[0].device) == "gloo" for axis in groups.axes)
        bucket = Bucket(
            params,
            [self._params.names[p] for p in params],
            groups,
            self._transport_of(groups, params[0].device),
            reduce_dtype=self._sharding.reduce_dtype or dtype,
            ordered_sum=ordered,
            stream=self.stream,
            clock=self._clock,
            row_major=self._precision.is_stochastic(dtype),
        )
        groups.broadcast(bucket.flat_params)
        parts = self._params.parts
        places = None if parts is None else [parts.place(p) for p in params]
        cut_group = None if parts is None else parts.cut_group(params[0])
        starts = [self._params.index_starts[p] for p in params]
        return ShardState(bucket, group, self._precision, starts, places, cut_group, self.ema_decay)

    def _transport_of(self, groups: ShardGroups, device: torch.device) -> Transport:
        if groups not in self._transports:
            self._transports[groups] = choose_transport(
                groups,
                device,
                self.stream,
                peer_memory=self._sharding.peer_memory,
                use_triton=self.backend == "triton",
                bounded=self._sharding.wait_in_backward,
            )
        return self._transports[groups]

    @property
    def pooled_nbytes(self) -> int:
        """Count the bytes of the gradient buffers that buckets share."""
        return sum(transport.grad_buffer_nbytes for transport in self._transports.values())

    def description(self, shards: Sequence[ShardState]) -> str:
        """What was chosen, in a line for the log."""
        groups, params, sharding = self._params.groups, self._params.names, self._sharding
        device = next(iter(params)).device
        numels = [shard.bucket.layout.numel for shard in shards]
        axes = [backend_for(axis, device) for axis in groups.axes]
        names = {transport.name for transport in self._transports.values()}
        transport = max(names - {"collectives"}, default=(axes or ["none"])[0])
        parts = [
            f"{sum(p.numel() for p in params):,} parameters in {len(params)} tensors",
            f"{groups.shard_world_size} ranks x {groups.replicate_world_size} replicas",
            f"device: {device.type}",
            f"ZeRO stage {sharding.zero_stage}",
            f"{len(numels)} buckets of up to {max(numels, default=0):,} elements",
            f"transport: {transport}",
            f"param sync: {sharding.param_sync}",
            f"update: {self.backend}",
            f"main params: {self._precision.main_params}",
            f"momentum: {self._precision.momentum_dtype or 'in the dtype of the parameters'}",
        ]
        if self.ema_decay is not None:
            parts.append(f"average of the weights: {self._precision.ema_dtype}, decay {self.ema_decay}")
        return "ShardedLion: " + "; ".join(parts)
