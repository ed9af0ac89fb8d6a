"""A training step over FSDP2, this Lion against each other Lion that is installed: the ratio and its interval.

    torchrun --nproc-per-node 2 -m lion_dist.benchmarks.fsdp_step --csv fsdp_step.csv
    torchrun --nproc-per-node 2 -m lion_dist.benchmarks.fsdp_step --size tiny --seq-len 32    # where there is no GPU

Without and with resharding, a peer and this Lion, in the precision nearest to the peer's, take turns as
``lion_dist.benchmarks.paired`` says. Engines, model and micro-batch as ``lion_dist.benchmarks.step``; clipping at 1.0.
Peers that are missing or fail over DTensors are named. The Triton kernels of lion-pytorch and optimi are not started
over shards, where they end the process (an illegal memory access).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lion_dist import Lion, PrecisionPolicy
from lion_dist.benchmarks import paired
from lion_dist.benchmarks.engines import SETTINGS, flash_lion, fsdp2
from lion_dist.benchmarks.fsdp import say, start_process_group
from lion_dist.benchmarks.llama import SIZES, make_llama
from lion_dist.benchmarks.report import Rows, version_of
from lion_dist.benchmarks.timing import free_gpu_memory


@dataclass(frozen=True)
class Peer:
    name: str
    distribution: str
    make: Callable
    main_params: str  # this Lion's, to be as precise


def lion_pytorch_plain(params):
    from lion_pytorch import Lion

    return Lion(params, **SETTINGS)


def lion_pytorch_foreach(params):
    from lion_pytorch.foreach import Lion

    return Lion(params, **SETTINGS)


def optimi_kahan(params):
    from optimi import Lion

    return Lion(params, **SETTINGS, kahan_sum=True, triton=False, foreach=False)


PEERS = [
    Peer("FlashLion", "flashoptim", flash_lion, "split"),
    Peer("lion-pytorch plain", "lion-pytorch", lion_pytorch_plain, "none"),
    Peer("lion-pytorch foreach", "lion-pytorch", lion_pytorch_foreach, "none"),
    Peer("optimi Kahan", "torch-optimi", optimi_kahan, "split"),
]


def warm_step(args, make: Callable, reshard: bool, device: torch.device) -> Callable[[], None]:
    step = fsdp2(make_llama(args.size, device, torch.bfloat16, args.compile), make, reshard)
    batches = [torch.randint(SIZES[args.size]["vocab"], (args.micro_batch, args.seq_len + 1), device=device)]
    for _ in range(args.warm_up):
        step(batches)
    return lambda: step(batches)


def measure(args, peer: Peer, reshard: bool, device: torch.device) -> dict | None:
    """A row, or None for a peer that is not installed or cannot update these shards."""
    try:
        theirs = warm_step(args, peer.make, reshard, device)
    except Exception as error:  # a peer's trouble must not end the run; our own must
        reason = "not installed" if isinstance(error, ImportError) else "failed"
        say(f"{peer.name}: {reason} ({error!r:.200})")
        return None
    policy = PrecisionPolicy(main_params=peer.main_params)
    ours = warm_step(args, lambda params: Lion(params, **SETTINGS, precision=policy), reshard, device)
    found = paired.compare(ours, theirs, args, device)
    return {
        "engine": f"FSDP2 {'' if reshard else 'no '}reshard",
        "peer": peer.name,
        "main_params": peer.main_params,
        "ranks": dist.get_world_size(),
        "micro_batch": args.micro_batch,
        "lion_dist_ms": round(found.ms[0], 3),
        "peer_ms": round(found.ms[1], 3),
        "ratio": round(found.ratio, 4),
        "half_interval_95": round(found.half_interval, 4),
        "blocks": args.blocks,
        "version": version_of(peer.distribution),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="", help="only those whose name contains this text")
    paired.add_arguments(parser)
    args = parser.parse_args()
    device = start_process_group()
    rows = Rows(args.csv if dist.get_rank() == 0 else None, device)
    for reshard in (False, True):
        for peer in PEERS:
            if args.peers not in peer.name:
                continue
            row = measure(args, peer, reshard, device)
            free_gpu_memory()
            if row is None:
                continue
            rows.add(row)
            say(
                f"{row['engine']}: lion_dist ({row['main_params']}) {row['lion_dist_ms']:.2f} ms, {peer.name} "
                f"{row['peer_ms']:.2f} ms, ratio {row['ratio']:.4f} ± {row['half_interval_95']:.4f}"
            )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
