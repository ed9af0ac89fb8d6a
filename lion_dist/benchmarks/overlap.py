"""How much of the communication hides behind the computation, and what is exposed: from a profiler's trace.

    torchrun --nproc-per-node 4 -m lion_dist.benchmarks.overlap --micro-batch 1 4 --csv overlap.csv
    python -m lion_dist.benchmarks.overlap --trace trace.json      # a trace that torch.profiler has written before

The step is the time line of the GPU, from the first kernel of the profiled steps to the last. At each moment it
computes (a kernel of forward or backward runs), or is exposed. An exposed moment has one cause, the first that runs of
``update`` (the Lion kernels), ``grad_sync`` (reduce-scatter and the packing before it), ``param_sync`` (all-gather, and
replayed codes), ``norm`` (the check of the gradients and its all-reduce); or none, and the device waits for the
``host``. Copies between peers' memory count as communication, and so do the barriers around them, in which a GPU waits
for the others.

What a kernel belongs to is the phase in whose label the host launched it (``traces.py``). For that the profiler records
the host too, which takes time of the host: it is part of ``host``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from lion_dist.benchmarks.engines import sharded_lion
from lion_dist.benchmarks.llama import SIZES, make_llama
from lion_dist.benchmarks.report import Rows
from lion_dist.benchmarks.traces import CAUSES, COMPUTE, Kernel, Trace, TraceError, read_trace

Intervals = list[tuple[float, float]]


def union(kernels: Iterable[Kernel]) -> Intervals:
    """The moments at which any of ``kernels`` runs, as disjoint intervals in order."""
    merged: Intervals = []
    for kernel in sorted(kernels, key=lambda k: k.start):
        if merged and kernel.start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], kernel.stop)
        else:
            merged.append((kernel.start, kernel.stop))
    return merged


def length(intervals: Intervals) -> float:
    return sum(stop - start for start, stop in intervals)


def without(intervals: Intervals, others: Intervals) -> Intervals:
    """What of ``intervals`` lies in none of ``others``; both disjoint and in order."""
    left: Intervals = []
    for start, stop in intervals:
        for other_start, other_stop in others:
            if other_stop <= start:
                continue
            if other_start >= stop:
                break
            if other_start > start:
                left.append((start, other_start))
            start = max(start, other_stop)
        if start < stop:
            left.append((start, stop))
    return left


def exposed_ms(kernels: Sequence[Kernel], steps: int) -> dict[str, float]:
    """Milliseconds a step: the whole ``step``, ``compute``, what is exposed by cause, ``host``, and communication's
    total and hidden share. Compute and the exposed parts add up to the step."""
    begin, end = min(k.start for k in kernels), max(k.stop for k in kernels)
    computing = union(k for k in kernels if k.cause == COMPUTE)
    communicating = union(k for k in kernels if k.communicates)
    result, covered = {"step": end - begin, COMPUTE: length(computing)}, computing
    for cause in CAUSES:
        alone = without(union(k for k in kernels if k.cause == cause), covered)
        result[cause] = length(alone)
        covered = union(Kernel(COMPUTE, *interval) for interval in [*covered, *alone])
    result["host"] = result["step"] - length(covered)
    result["communication"] = length(communicating)
    milliseconds = {name: value / 1e3 / steps for name, value in result.items()}
    hidden = length(communicating) - length(without(communicating, computing))
    return milliseconds | {"hidden_share": hidden / length(communicating) if communicating else 1.0}


def trace_of(step: Callable[[], None], steps: int, path: Path) -> None:
    with torch.profiler.profile() as profile:  # the host too: without it no label is recorded
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))


def measure(args, micro_batch: int, device: torch.device) -> tuple[dict[str, float], Trace]:
    model = make_llama(args.size, device, torch.bfloat16, args.compile)
    tokens = torch.randint(SIZES[args.size]["vocab"], (micro_batch, args.seq_len + 1), device=device)
    train = sharded_lion(model, zero_stage=2)
    for _ in range(args.warm_up):
        train([tokens])
    torch.cuda.synchronize()
    dist.barrier()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        if args.keep_trace and dist.get_rank() == 0:
            path = args.keep_trace
        trace_of(lambda: train([tokens]), args.steps, path)
        trace = read_trace(path)
        return exposed_ms(trace.kernels, args.steps), trace


def show(label: str, row: dict[str, float], trace: Trace) -> None:
    exposed = "  ".join(f"{cause} {row[cause]:.2f}" for cause in (*CAUSES, "host"))
    print(
        f"{label}: step {row['step']:.2f} ms = compute {row[COMPUTE]:.2f} + exposed: {exposed}; communication "
        f"{row['communication']:.2f} ms, {row['hidden_share']:.1%} of it hidden",
        flush=True,
    )
    for line in trace.doubts():
        print(f"{label}: {line}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trace", type=Path, help="read this trace instead of training")
    add("--steps", type=int, default=5, help="profiled; of --trace: how many it holds")
    add("--warm-up", type=int, default=5)
    add("--size", choices=list(SIZES), default="1.35B")
    add("--micro-batch", type=int, nargs="+", default=[1, 4], help="sequences a rank")
    add("--seq-len", type=int, default=2048)
    add("--compile", action="store_true", help="torch.compile each block")
    add("--keep-trace", type=Path, help="write the first rank's trace here (of the last micro-batch)")
    add("--csv", type=Path)
    args = parser.parse_args()
    if args.trace is None and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible, and only a GPU's trace shows what overlaps: pass --trace FILE")
    return args


def main() -> None:
    args = parse_arguments()
    if args.trace is not None:
        try:
            trace = read_trace(args.trace)
        except TraceError as error:
            raise SystemExit(f"error: {error}") from None
        show(str(args.trace), exposed_ms(trace.kernels, args.steps), trace)
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rows = Rows(args.csv, device)
    for micro_batch in args.micro_batch:
        row, trace = measure(args, micro_batch, device)
        if dist.get_rank() == 0:
            show(f"micro-batch {micro_batch}, {dist.get_world_size()} ranks", row, trace)
            rounded = {name: round(value, 4) for name, value in row.items()}
            shared = {"micro_batch": micro_batch, "ranks": dist.get_world_size()}
            rows.add(shared | rounded)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
