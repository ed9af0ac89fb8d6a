"""The optimizer's own part of an FSDP2 step: this Lion and every other that is installed, over a Llama's shards.

    python -m lion_dist.benchmarks.fsdp --csv fsdp.csv                          # one GPU, which holds whole "shards"
    torchrun --nproc-per-node 4 -m lion_dist.benchmarks.fsdp                    # a quarter of every tensor a rank
    python -m lion_dist.benchmarks.fsdp --size tiny --repeats 3                 # where there is no GPU, on the CPU

Each optimizer gets a model of its own, wrapped block by block, and the gradients that one backward has left. Times are
the first rank's; the ratio is to the first row of lion_dist, from the same run. Peers that fail on DTensors are named;
lion-pytorch's Triton kernel is not started over shards, where it ends the process (it walks over whole tensors).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from lion_dist.benchmarks.llama import SIZES, make_llama
from lion_dist.benchmarks.report import Rows, version_of
from lion_dist.benchmarks.timing import free_gpu_memory, time_on_cpu, time_on_gpu
from lion_dist.benchmarks.update import (
    FP32,
    HEADER,
    Provider,
    copy_row,
    lion_pytorch_step,
    own_providers,
    peer_providers,
    row,
    show,
)
from lion_dist.local_shard import local_tensor

SEQ_LEN = 128  # of the one backward
FIRST = "bf16 split"  # the precision of lion_dist that ratios are to


def providers(chosen: str) -> list[Provider]:
    """Those that take separate tensors, lion_dist's first precision first."""
    fp32 = Provider(
        "lion-pytorch plain", "fp32", FP32, 20, lambda params: lion_pytorch_step(params, "plain"), False, "lion-pytorch"
    )
    found = [p for p in [*own_providers(), *peer_providers(), fp32] if not p.flat]
    if dist.get_world_size() > 1:
        found = [p for p in found if p.name != "lion-pytorch triton"]
    found.sort(key=lambda p: (p.distribution, p.precision) != ("lion-dist", FIRST))
    return [p for p in found if chosen in f"{p.name} {p.precision}" or p is found[0]]


def sharded_params(size: str, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    """The shards of a model, with the gradients of one backward."""
    model = make_llama(size, device, dtype, compile_blocks=False)
    for module in (*model.blocks, model):
        fully_shard(module)
    model(torch.randint(SIZES[size]["vocab"], (1, SEQ_LEN + 1), device=device)).backward()
    return list(model.parameters())


def measure(args: argparse.Namespace, provider: Provider, device: torch.device) -> dict | None:
    """A row, or None for a peer that is not installed or cannot update these shards."""
    params = sharded_params(args.size, provider.dtype, device)
    numel = sum(local_tensor(p).numel() for p in params)
    step = None
    try:
        step = provider.build(params)
        if device.type == "cuda":
            timing = time_on_gpu(step, args.repeats)
        else:
            timing = time_on_cpu({"": step}, args.repeats)[""]
    except Exception as error:  # a peer's trouble must not end the run; our own must
        if provider.distribution == "lion-dist":
            raise
        reason = "not installed" if isinstance(error, ImportError) else "failed"
        say(f"{provider.name}: {provider.precision}: {reason} ({error!r:.200})")
        return None
    model, moved = f"{args.size} / {dist.get_world_size()}", numel * provider.bytes_per_param
    result = row(model, provider.name, provider.precision, "", len(params), moved, timing)
    return result | {"version": version_of(provider.distribution)}


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def run(args: argparse.Namespace, device: torch.device) -> None:
    rows, ceiling = Rows(args.csv if dist.get_rank() == 0 else None, device), None
    ranks = {"ranks": dist.get_world_size()}
    say(HEADER)
    if device.type == "cuda":
        ceiling = copy_row("ceiling", 2**33, device, args.repeats)
        rows.add(ceiling | {"ratio": None} | ranks)
        free_gpu_memory()
    own_ms = None
    for provider in providers(args.providers):
        result = measure(args, provider, device)
        if device.type == "cuda":
            free_gpu_memory()
        if result is None:
            continue
        own_ms = own_ms or result["ms_median"]
        if ceiling is not None:
            result["percent_of_copy"] = round(100 * result["gb_per_s"] / ceiling["gb_per_s"], 1)
        rows.add(result | {"ratio": round(result["ms_median"] / own_ms, 3)} | ranks)
        if dist.get_rank() == 0:
            show(result)
    for result in rows.rows[1:]:
        say(f"{result['provider']}, {result['precision']}: {result['ratio']:.2f} times lion_dist's, {FIRST}")


def start_process_group() -> torch.device:
    """torchrun's ranks, or a group of one."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend, device_id = ("nccl", device) if on_gpu else ("gloo", None)
    alone = {} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, device_id=device_id, **alone)
    return device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1.35B")
    parser.add_argument("--providers", default="", help="only those whose name and precision contain this text")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--csv", type=Path, help="write the rows here")
    args = parser.parse_args()
    device = start_process_group()
    run(args, device)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
