"""Which transport moves the bytes of a group of ranks, chosen at construction."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lion_dist.sharding.collective_transport import CollectiveTransport
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.process_groups import ShardGroups
from lion_dist.sharding.transport import Transport

# (groups, device, stream, peer_memory, use_triton) -> the transport, or None where it cannot or need not be had. All
# ranks of the groups call it together and get the same answer.
Connector = Callable[[ShardGroups, torch.device, CommStream, bool | None, bool | None], Transport | None]


def over_peer_memory(
    groups: ShardGroups, device: torch.device, stream: CommStream, peer_memory: bool | None, use_triton: bool | None
) -> Transport | None:
    if peer_memory is False or not (peer_memory or device.type == "cuda"):
        return None
    from lion_dist.peer_memory.connect import connect
    from lion_dist.peer_memory.transport import PeerTransport

    memory = connect(groups.shard_group, device, peer_memory, use_triton)
    return None if memory is None else PeerTransport(memory, groups, stream, use_triton)  # pyrefly: ignore[bad-return]


CONNECTORS: list[Connector] = [over_peer_memory]  # asked in this order; where none answers, collectives carry all


def choose_transport(
    groups: ShardGroups,
    device: torch.device,
    stream: CommStream,
    *,
    peer_memory: bool | None,
    use_triton: bool | None,
    bounded: bool,
) -> Transport:
    """Args: ``peer_memory``, ``bounded``: ``ShardingConfig.peer_memory`` and ``wait_in_backward``."""
    for connector in CONNECTORS:
        transport = connector(groups, device, stream, peer_memory, use_triton)
        if transport is not None:
            return transport
    return CollectiveTransport(groups, device, stream, bounded=bounded)
