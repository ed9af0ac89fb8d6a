"""The optimizer step of ZeRO-Offload: this Lion beside DeepSpeedCPULion, taking turns in one process.

    python -m lion_dist.benchmarks.deepspeed_offload --threads 2 --csv docs/benchmarks/deepspeed_offload.csv

One flat fp32 partition each, as ZeRO hands them over. The first run compiles DeepSpeed's extension (a minute).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from lion_dist.benchmarks.report import Rows, version_of
from lion_dist.benchmarks.timing import time_on_cpu
from lion_dist.integrations.deepspeed import DeepSpeedLion, check_version

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
BYTES_MOVED = {"fp32": 20, "bf16": 16}  # an element: parameter and momentum read and written, gradient read


def contenders(numel: int) -> dict[tuple[str, str], torch.optim.Optimizer]:
    """{(name, momentum dtype): optimizer} over partitions of their own."""
    from deepspeed.ops.lion import DeepSpeedCPULion

    def partition() -> list[torch.nn.Parameter]:
        flat = torch.nn.Parameter(torch.randn(numel))
        flat.grad = torch.randn(numel)
        return [flat]

    return {
        ("DeepSpeedCPULion", "fp32"): DeepSpeedCPULion(partition(), **SETTINGS),
        ("lion_dist", "fp32"): DeepSpeedLion(partition(), **SETTINGS, momentum_dtype="fp32"),
        ("lion_dist", "bf16"): DeepSpeedLion(partition(), **SETTINGS, momentum_dtype="bf16"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--numel", type=int, default=2**25, help="elements of the partition")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    check_version()
    rows = Rows(args.csv, torch.device("cpu"))
    for threads in args.threads:
        torch.set_num_threads(threads)
        optimizers = contenders(args.numel)
        timings = time_on_cpu({key: optimizer.step for key, optimizer in optimizers.items()}, args.repeats)
        for (name, momentum), optimizer in optimizers.items():
            timing = timings[name, momentum]
            [state] = optimizer.state.values()
            row = {
                "optimizer": name,
                "momentum": momentum,
                "numel": args.numel,
                "median_ms": round(timing.median, 3),
                "p10_ms": round(timing.p10, 3),
                "p90_ms": round(timing.p90, 3),
                "gb_per_s": round(BYTES_MOVED[momentum] * args.numel / timing.median / 1e6, 2),
                "state_bytes_per_element": sum(t.nbytes for t in state.values() if torch.is_tensor(t)) / args.numel,
                "deepspeed": version_of("deepspeed"),
            }
            rows.add(row)
            print(
                f"{threads} threads  {name} ({momentum}): {timing.median:.1f} ms, {row['gb_per_s']} GB/s, "
                f"{row['state_bytes_per_element']:.0f} B of state an element"
            )


if __name__ == "__main__":
    main()
