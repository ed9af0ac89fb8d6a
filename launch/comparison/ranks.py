"""What the training program asks of torch.distributed: a process group, means over ranks, one comparison."""

import gc
import hashlib
import os
from argparse import Namespace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


def start_process_group(timeout: timedelta) -> tuple[torch.device, dist.Store]:
    """NCCL on this rank's GPU, or gloo on CPUs. Without torchrun it is a group of one: the same code runs.

    Returns the device and the store in which the ranks have met. `timeout` is how long a rank waits for another.

    Raises:
        ValueError: this rank was started in a way that cannot work.
        ConnectionError: the other ranks did not come within the time-out.
    """
    _refuse_stale_store()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU of its own: there are {torch.cuda.device_count()}. "
                "Lower --nproc-per-node, or set CUDA_VISIBLE_DEVICES= to train on CPUs."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    store, rank, world_size = dist.HashStore(), 0, 1
    try:
        if "MASTER_ADDR" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
        )
    except RuntimeError as error:
        place = os.environ.get("MASTER_ADDR", "this process")
        raise ConnectionError(
            f"rank {os.environ.get('RANK', 0)} found no connection to the other ranks at {place} (--timeout "
            f"{timeout.total_seconds():g}): {error}"
        ) from error
    return device, dist.PrefixStore("compare_engines.py", store)


def _refuse_stale_store() -> None:
    """torchrun keeps one store for all attempts (torch 2.13), in which a restarted rank finds the addresses of ranks
    that are dead, and waits for them or fails."""
    restarts, shared = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if int(restarts) > 0 and shared == "True":
        raise ValueError(
            f"torchrun --max-restarts {restarts} would let restarted ranks find the addresses of dead ones in its "
            "store. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun starts."
        )


def replicas_mesh(replicas: int, device: torch.device, timeout: timedelta) -> DeviceMesh | None:
    """A (replicate, shard) mesh of `replicas` x the ranks of one, neighbours in one replica; None for one replica."""
    if replicas == 1:
        return None
    ranks = torch.arange(dist.get_world_size()).view(replicas, -1)
    # init_device_mesh would make groups with torch's own time-out, 30 minutes on gloo.
    shard, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    replicate, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout)
    return DeviceMesh.from_group([replicate, shard], device.type, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def check_same_start(args: Namespace, text: str) -> None:
    """Raises ValueError on every rank, naming a rank that was started otherwise than the first one."""
    mine = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name != "data"}
    first, *others = gather_objects(mine | {"fingerprint of the text": text, "torch": torch.__version__})
    for rank, other in enumerate(others, start=1):
        for name in first:
            if other[name] != first[name]:
                raise ValueError(
                    f"rank {rank} differs from rank 0: {name!r} = {other[name]} there, {name!r} = {first[name]} on "
                    "rank 0. Start every rank with the same flags, text and torch."
                )


def stop_process_group() -> None:
    """Call it when no engine is referenced any more.

    A DistributedDataParallel that outlives the group becomes its last owner, and frees it while holding the
    interpreter lock, which gloo's thread may be waiting for: now and then a rank hangs at exit (torch 2.13).
    """
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def say(text: str) -> None:
    """Prints on the first rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of [n] values over the ranks in fp64, summed in rank order: the same bits for any n."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts).double().mean(dim=0)


def gather_objects(value: object) -> list:
    """Every rank's `value`, in rank order, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def differing_parameters(model: nn.Module) -> dict[str, list[int]]:
    """Parameters whose bytes are not the same everywhere: {name: ranks that differ from rank 0}."""
    digests = {
        # A copy: FSDP could not free memory that numpy has looked at.
        name: hashlib.sha256(parameter.detach().to("cpu", copy=True).flatten().view(torch.uint8).numpy()).hexdigest()
        for name, parameter in model.named_parameters()
    }
    by_rank = gather_objects(digests)
    differing = {}
    for name in digests:
        ranks = [rank for rank, other in enumerate(by_rank) if other[name] != by_rank[0][name]]
        if ranks:
            differing[name] = ranks
    return differing
