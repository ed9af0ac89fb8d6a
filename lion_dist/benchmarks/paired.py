"""Two engines live in one process and take turns: what the benchmarks of pairs share.

They take turns in blocks of steps that start with one and with the other alternately, so that drift of the machine
meets both alike. The interval is of the mean ratio over pairs of blocks (Student's t, 95%).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lion_dist.benchmarks.llama import SIZES

T_95 = {5: 2.571, 7: 2.365, 9: 2.262, 11: 2.201, 15: 2.131, 19: 2.093}  # two-sided, by degrees of freedom


@dataclass(frozen=True)
class Comparison:
    """Of one engine to another, from the ms a step of their blocks."""

    ms: tuple[float, float]  # medians
    ratio: float
    half_interval: float

    @classmethod
    def of(cls, own: list[float], others: list[float]) -> Comparison:
        ratios = [a / b for a, b in zip(own, others, strict=True)]
        half = T_95[len(ratios) - 1] * statistics.stdev(ratios) / math.sqrt(len(ratios))
        return cls((statistics.median(own), statistics.median(others)), statistics.mean(ratios), half)


def compare(own: Callable[[], None], other: Callable[[], None], args, device: torch.device) -> Comparison:
    """Time ``args.blocks`` blocks of each, of ``args.steps`` steps; both are warm."""
    steps, times = (own, other), ([], [])
    for block in range(args.blocks):
        for i in (0, 1) if block % 2 == 0 else (1, 0):
            times[i].append(time_block(steps[i], args.steps, device))
    return Comparison.of(*times)


def time_block(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """ms a step, of the slowest rank."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    dist.barrier()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    slowest = torch.tensor(1e3 * (time.perf_counter() - start) / steps, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the batch, the turns, and where rows go."""
    add = parser.add_argument
    add("--size", default="1.35B", choices=list(SIZES))
    add("--seq-len", type=int, default=2048)
    add("--micro-batch", type=int, default=4)
    add("--blocks", type=int, default=10, choices=[dof + 1 for dof in T_95])
    add("--steps", type=int, default=5, help="in a block")
    add("--warm-up", type=int, default=5)
    add("--compile", action="store_true", help="torch.compile each block of the model")
    add("--csv", type=Path, help="write the rows here")
