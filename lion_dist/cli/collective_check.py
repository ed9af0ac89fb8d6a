"""What ``lion-dist doctor`` asks of several ranks: reduce-scatter, all-gather, and an all-reduce with its bandwidth."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lion_dist.cli.findings import BROKEN, OK, Finding
from lion_dist.sharding import collectives
from lion_dist.sharding.process_groups import backend_for

TIMEOUT_S = 60
CPU_RANKS = 2
NUMEL = {"cuda": 1 << 26, "cpu": 1 << 20}  # fp32 elements of the all-reduce that is timed
REPEATS = 5
REMEDY = {
    "nccl": "NCCL_DEBUG=INFO says where it stops; NCCL_SOCKET_IFNAME names the network interface, NCCL_P2P_DISABLE=1 "
    "goes without links between GPUs",
    "gloo": "GLOO_SOCKET_IFNAME names the network interface; the host's own name must resolve (/etc/hosts)",
}


def under_torchrun() -> list[Finding]:
    """On the ranks that there are. The process group stays, for the ranks' findings to be gathered."""
    device = _device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S), device_id=_gpu(device))
        fact = measure(device)
    except RuntimeError as error:
        return [_failure(backend, dist.get_rank() if dist.is_initialized() else None, error)]
    return [Finding("collectives", OK, fact)]


def on_own_ranks() -> list[Finding]:
    """On ranks that are started here: one a GPU, or two on the CPU."""
    ranks = torch.cuda.device_count() or CPU_RANKS
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory(prefix="lion-dist-doctor-") as folder:
        context = mp.spawn(_own_rank, args=(ranks, backend, folder), nprocs=ranks, join=False)
        deadline = time.monotonic() + 2 * TIMEOUT_S
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{ranks} ranks did not finish in {2 * TIMEOUT_S} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException, TimeoutError) as error:
            for process in context.processes:
                process.kill()
            return [_failure(backend, getattr(error, "error_index", None), error)]
        return [Finding("collectives", OK, (Path(folder) / "fact").read_text())]


def _own_rank(rank: int, ranks: int, backend: str, folder: str) -> None:
    device = _device(rank)
    store = dist.FileStore(f"{folder}/store", ranks)
    where = {"store": store, "rank": rank, "world_size": ranks, "device_id": _gpu(device)}
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S), **where)
    fact = measure(device)
    if rank == 0:
        (Path(folder) / "fact").write_text(fact)
    dist.barrier()
    dist.destroy_process_group()


def _gpu(device: torch.device) -> torch.device | None:
    return device if device.type == "cuda" else None


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _failure(backend: str, rank: int | None, error: Exception) -> Finding:
    last_line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    where = "" if rank is None else f" on rank {rank}"
    return Finding("collectives", BROKEN, f"{backend} failed{where}: {last_line}", REMEDY[backend])


def measure(device: torch.device) -> str:
    """Collectives of this process group on ``device``: checks what comes out, and times an all-reduce.

    Raises:
        RuntimeError: a collective failed, or its result is wrong.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    _check_results(device, rank, ranks)
    tensor = torch.ones(NUMEL[device.type], device=device)
    times = []
    for _ in range(REPEATS + 1):  # the first makes the connections
        _wait_for(device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        _wait_for(device)
        times.append(time.perf_counter() - start)
    bandwidth = 2 * (ranks - 1) / ranks * tensor.nbytes / min(times[1:])
    speed = f"all-reduce of {tensor.nbytes >> 20} MiB at {bandwidth / 1e9:.1f} GB/s" if ranks > 1 else "one rank"
    return f"{backend_for(dist.group.WORLD, device)}, {ranks} ranks: sums are right, {speed}"


def _check_results(device: torch.device, rank: int, ranks: int) -> None:
    """Small integers, whose sums are exact in bf16."""
    group = dist.group.WORLD if ranks > 1 else None
    numel = 64
    for dtype in (torch.float32, torch.bfloat16):
        addend = torch.full((ranks * numel,), rank % 4, dtype=dtype, device=device)
        total = torch.empty(numel, dtype=dtype, device=device)
        collectives.reduce_scatter(total, addend, group, ordered=False)()
        expected = sum(r % 4 for r in range(ranks))
        if expected <= 256 and not bool((total == expected).all()):
            raise RuntimeError(f"a reduce-scatter of {dtype} gave {total[0].item()} on rank {rank}, not {expected}")
        flat = torch.full((ranks * numel,), -1, dtype=dtype, device=device)
        mine = flat[rank * numel : (rank + 1) * numel].fill_(rank % 4)
        collectives.all_gather(flat, mine, group)()
        gathered = flat.view(ranks, numel)
        if any(not bool((gathered[r] == r % 4).all()) for r in range(ranks)):
            raise RuntimeError(f"an all-gather of {dtype} mixed up the ranks' parts on rank {rank}")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
