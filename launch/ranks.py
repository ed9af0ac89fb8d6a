"""What the training program asks of torch.distributed: a process group, means over ranks, one comparison."""

import gc
import hashlib
import os

import torch
import torch.distributed as dist
from torch import nn


def start_process_group() -> torch.device:
    """NCCL on this rank's GPU, or gloo on CPUs. Without torchrun it is a group of one: the same code runs."""
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
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, device_id=device_id)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id)
    return device


def stop_process_group() -> None:
    """Call it when no engine is referenced any more.

    A DistributedDataParallel that outlives the group becomes its last owner, and frees it while holding the
    interpreter lock, which gloo's thread may be waiting for: now and then a rank hangs at exit (torch 2.13).
    """
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


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
        name: hashlib.sha256(parameter.detach().cpu().flatten().view(torch.uint8).numpy()).hexdigest()
        for name, parameter in model.named_parameters()
    }
    by_rank = gather_objects(digests)
    differing = {}
    for name in digests:
        ranks = [rank for rank, other in enumerate(by_rank) if other[name] != by_rank[0][name]]
        if ranks:
            differing[name] = ranks
    return differing
