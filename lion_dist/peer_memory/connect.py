"""Whether the GPUs of a group reach each other's memory, which all ranks find out together."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from lion_dist.peer_memory.memory import PeerMemory
from lion_dist.sharding import collectives
from lion_dist.sharding.process_groups import backend_for

logger = logging.getLogger(__name__)


def connect(
    group: ProcessGroup | None, device: torch.device, wanted: bool | None, use_triton: bool | None = None
) -> PeerMemory | None:
    """PeerMemory of ``group``, or None where NCCL or gloo is to carry its bytes. All ranks get the same answer.

    Args:
        use_triton: False: gradients are summed without Triton, which need not be installed then.
        wanted: False: no. None: where all ranks are GPUs of this host that reach each other; where they should and do
            not, the first rank logs why. True: or else an error.

    Raises:
        RuntimeError: ``wanted`` and not to be had; on every rank, with the first reason that any of them has.
    """
    if wanted is False or group is None:
        return None
    reason = _why_elsewhere(group, device)
    if reason is None:
        memory, reason = _meet(group, device, use_triton)
        if memory is not None:
            return memory
        if not wanted and group.rank() == 0:
            logger.warning("Collectives run by NCCL, which slows the computation beside them: %s.", reason)
    if wanted:
        raise RuntimeError(f"peer_memory=True cannot be had: {reason}. Leave peer_memory=None to have NCCL used then.")
    return None


def _why_elsewhere(group: ProcessGroup, device: torch.device) -> str | None:
    """Why nobody would expect peer memory here, so that its absence needs no word."""
    backend = backend_for(group, device)
    if device.type != "cuda" or backend != "nccl":
        return f"the group is {backend}'s on {device.type}, not one host's GPUs"
    hosts = set(collectives.gather_objects(_host(), group))
    return None if len(hosts) == 1 else f"the ranks are on {len(hosts)} hosts"


def _meet(group: ProcessGroup, device: torch.device, use_triton: bool | None) -> tuple[PeerMemory | None, str | None]:
    """The memory, or the first reason against it that any rank has."""
    uuids = collectives.gather_objects(str(torch.cuda.get_device_properties(device).uuid), group)
    reason, memory = _first_reason(_why_unreachable(device, uuids, use_triton), group), None
    if reason is None:
        try:
            memory = PeerMemory(group, device)
        except (RuntimeError, ImportError) as error:
            reason = f"rank {group.rank()}: {error!s:.300}"
        reason = _first_reason(reason, group)
    return (memory if reason is None else None), reason


def _first_reason(own: str | None, group: ProcessGroup) -> str | None:
    return next((reason for reason in collectives.gather_objects(own, group) if reason is not None), None)


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (boot.read_text() if boot.exists() else "")


def _why_unreachable(device: torch.device, uuids: list[str], use_triton: bool | None) -> str | None:
    """Why this rank's GPU cannot read the memory of those with ``uuids``."""
    try:
        if use_triton is not False:
            import triton  # noqa: F401
    except ImportError:
        return "triton is not installed, which sums gradients that peers have sent; use_triton=False sums without it"
    if len(set(uuids)) < len(uuids):
        return "several ranks share a GPU"
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    for uuid in uuids:
        if uuid not in visible:
            return f"GPU {uuid} of another rank is hidden from {device} (CUDA_VISIBLE_DEVICES)"
        index = visible[uuid]
        if index != device.index and not torch.cuda.can_device_access_peer(device.index, index):
            return f"{device} cannot access the memory of cuda:{index} (nvidia-smi topo -p2p r)"
    return None
