"""How much of the communication hides behind the computation, and what is exposed: from a profiler's trace.

    torchrun --nproc-per-node 4 -m lion_dist.benchmarks.overlap --micro-batch 1 4 --csv overlap.csv
    python -m lion_dist.benchmarks.overlap --trace trace.json      # a trace that torch.profiler has written before

The step is the time line of the GPU, from the first kernel of the profiled steps to the last. At each moment it
computes (a kernel of forward or backward runs), or is exposed. An exposed moment has one cause, the first that runs of
``update`` (the Lion kernels), ``grad_sync`` (reduce-scatter and the packing before it), ``param_sync`` (all-gather, and
replayed codes), ``norm`` (the check of the gradients and its all-reduce); or none, and the device waits for the
``host``. Copies from peers' memory count as communication, and so do the barriers around them, in which a GPU waits for
the others.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lion_dist.benchmarks.engines import sharded_lion
from lion_dist.benchmarks.llama import SIZES, make_llama
from lion_dist.benchmarks.report import Rows

CAUSES = ("update", "grad_sync", "param_sync", "norm")
COMPUTE = "compute"
# What kernels' names contain, by what they are there for; the first that fits. The rest computes.
SIGNS = {
    "update": ("_flat_kernel", "_list_kernel", "_encode_kernel"),
    "grad_sync": ("ReduceScatter", "SendRecv", "multi_tensor_apply_kernel", "_ordered_sum_kernel"),
    "param_sync": ("AllGather", "_replay_kernel", "_escape_kernel"),
    "norm": ("AllReduce", "lpnorm", "Norm", "_squares_kernel"),
}
COMMUNICATION = ("ReduceScatter", "AllGather", "AllReduce", "SendRecv", "ncclDevKernel", "from peers")
PEER_BARRIER = "barrier_kernel"  # of torch's symmetric memory


@dataclass(frozen=True)
class Kernel:
    name: str
    start: float  # microseconds
    stop: float

    @property
    def cause(self) -> str:
        return next((cause for cause, signs in SIGNS.items() if any(s in self.name for s in signs)), COMPUTE)

    @property
    def communicates(self) -> bool:
        return any(sign in self.name for sign in COMMUNICATION)


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
        covered = union(Kernel("", *interval) for interval in [*covered, *alone])
    result["host"] = result["step"] - length(covered)
    result["communication"] = length(communicating)
    milliseconds = {name: value / 1e3 / steps for name, value in result.items()}
    hidden = length(communicating) - length(without(communicating, computing))
    return milliseconds | {"hidden_share": hidden / length(communicating) if communicating else 1.0}


def read_trace(path: Path) -> list[Kernel]:
    """Kernels, copies and fills of a trace by ``torch.profiler.profile.export_chrome_trace``."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        events = json.load(file)["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = sorted((e for e in events if e.get("cat") in kinds), key=lambda e: e["ts"])
    _name_peer_collectives(events)
    return [Kernel(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events]


def _name_peer_collectives(events: list[dict]) -> None:
    """Copies from peers' memory are named as any copies are. They lie between two barriers on one stream, and gradients
    are added up after them."""
    by_stream: dict[object, list[dict]] = {}
    for event in events:
        by_stream.setdefault(event.get("args", {}).get("stream"), []).append(event)
    for queue in by_stream.values():
        barriers = [i for i, event in enumerate(queue) if PEER_BARRIER in event["name"]]
        for first, last in zip(barriers[::2], barriers[1::2], strict=False):
            adds_up = any("_ordered_sum_kernel" in event["name"] for event in queue[first:last])
            name = f"{'ReduceScatter' if adds_up else 'AllGather'} from peers"
            for event in queue[first : last + 1]:
                if "_ordered_sum_kernel" not in event["name"]:
                    event["name"] = name


def trace_of(step: Callable[[], None], steps: int, path: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CUDA]  # without the CPU's, which would slow the host down
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))


def measure(args, micro_batch: int, device: torch.device) -> dict:
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
        return exposed_ms(read_trace(path), args.steps)


def show(label: str, row: dict[str, float]) -> None:
    exposed = "  ".join(f"{cause} {row[cause]:.2f}" for cause in (*CAUSES, "host"))
    print(
        f"{label}: step {row['step']:.2f} ms = compute {row[COMPUTE]:.2f} + exposed: {exposed}; communication "
        f"{row['communication']:.2f} ms, {row['hidden_share']:.1%} of it hidden",
        flush=True,
    )


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
        show(str(args.trace), exposed_ms(read_trace(args.trace), args.steps))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rows = Rows(args.csv, device)
    for micro_batch in args.micro_batch:
        row = measure(args, micro_batch, device)
        if dist.get_rank() == 0:
            show(f"micro-batch {micro_batch}, {dist.get_world_size()} ranks", row)
            rounded = {name: round(value, 4) for name, value in row.items()}
            shared = {"micro_batch": micro_batch, "ranks": dist.get_world_size()}
            rows.add(shared | rounded)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
