"""A whole training step: forward, backward, communication and update, engine by engine, in one run.

    torchrun --nproc-per-node 2 -m lion_dist.benchmarks.step --micro-batch 1 4 --csv step.csv --png step.png
    torchrun --nproc-per-node 2 -m lion_dist.benchmarks.step --size tiny --seq-len 32 --steps 5      # on CPUs
    python -m lion_dist.benchmarks.step --pretend-ranks 4      # one GPU: all that an engine costs but communication

``host``: the time until the calls of a step return when the device was idle before; ``exposed``: how much longer a step
takes, back to back, than the device does when the host is ahead of it. Both depend on the host, whose speed is printed.

Times are of the slowest rank, medians over the steps; the ratio is to forward and backward alone on one rank's batch,
without communication or step, measured in the same run. Peers that are not installed, or fail, are named and left out.
With pretended ranks (torch's fake process group) collectives take no time and move nothing: the floor of an engine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lion_dist.benchmarks.engines import BASELINE, IN_A_GRAPH, Step, engines, graphs
from lion_dist.benchmarks.llama import SIZES, make_llama
from lion_dist.benchmarks.ranks import join
from lion_dist.benchmarks.report import Rows
from lion_dist.benchmarks.timing import free_gpu_memory, seconds_of_additions
from lion_dist.peer_memory import memory as peer_memory
from lion_dist.reporting import figure_into


def time_steps(step: Step, batches: list[Tensor], steps: int, warm_up: int, device: torch.device) -> dict:
    """Milliseconds of each step on the slowest rank, and the peak memory of the fullest."""
    on_gpu = device.type == "cuda"
    for _ in range(warm_up):
        step(batches)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    host, on_device = (_host_ms(step, batches), _device_ms(step, batches)) if on_gpu else (0.0, 0.0)
    marks = []
    for _ in range(steps + 1):
        if on_gpu:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
        if len(marks) <= steps:
            step(batches)
    if on_gpu:
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    else:
        times = [1e3 * (b - a) for a, b in zip(marks, marks[1:], strict=False)]
    peak = _allocated(torch.cuda.max_memory_allocated()) if on_gpu else 0
    slowest = torch.tensor([*times, peak, host, on_device], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    *times, peak, host, on_device = slowest.tolist()
    cuts, median = statistics.quantiles(times, n=10), statistics.median(times)
    result = {"ms_median": median, "ms_p10": cuts[0], "ms_p90": cuts[8], "peak_gb": peak / 1e9}
    return result | ({"host_ms": host, "exposed_ms": median - on_device} if on_gpu else {})


def _host_ms(step: Step, batches: list[Tensor], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(batches)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _device_ms(step: Step, batches: list[Tensor], repeats: int = 5) -> float:
    """Of steps that wait on the device behind a pause in which the host queues them."""
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000_000)  # cycles, 0.2 s
        start.record()
        step(batches)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _allocated(by_allocator: int) -> int:
    return by_allocator + peer_memory.allocated_bytes


def measure(args, name: str, build: Callable, micro_batch: int, device: torch.device) -> dict | None:
    leaked = 0  # by earlier engines of DeepSpeed. Not so DDP's: what it leaves behind is freed by the peak of the next.
    if device.type == "cuda" and is_deepspeed(name):
        leaked = _allocated(torch.cuda.memory_allocated())
    model = make_llama(args.size, device, torch.bfloat16, args.compile)
    tokens = torch.randint(SIZES[args.size]["vocab"], (micro_batch, args.seq_len + 1), device=device)
    try:
        step = build(model)
        result = time_steps(step, [tokens] * args.micro_batches, args.steps, args.warm_up, device)
    except Exception as error:  # a peer's trouble, alike on all ranks, must not end the run; our own must
        if is_own(name):
            raise
        say(f"{name}: {'not installed' if isinstance(error, ImportError) else 'failed'} ({error!r:.200})")
        return None
    result["peak_gb"] -= leaked / 1e9
    del model, step
    if device.type == "cuda":
        free_gpu_memory()
    ranks = f"{args.pretend_ranks} pretended" if args.pretend_ranks else dist.get_world_size()
    return {"engine": name, "ranks": ranks, "micro_batch": micro_batch} | {
        key: round(value, 3) for key, value in result.items()
    }


def is_own(name: str) -> bool:
    """Whether it is ours to mend: not so a peer, nor symmetric memory under FSDP2, which some machines refuse."""
    return name in (BASELINE, IN_A_GRAPH) or ("lion_dist" in name and "symmetric" not in name)


def is_deepspeed(name: str) -> bool:
    return name.startswith("DeepSpeed")


def turns(args) -> list[tuple[int, str, Callable]]:
    """(micro-batch, engine, how to build it); DeepSpeed's last: they leak, up to 25 GB."""
    found = (graphs() if args.graph else engines(args.micro_batches)).items()
    wanted = [BASELINE, IN_A_GRAPH, *args.engines]
    chosen = [(name, build) for name, build in found if any(text in name for text in wanted)]
    return sorted(
        [(size, *engine) for size in args.micro_batch for engine in chosen], key=lambda turn: is_deepspeed(turn[1])
    )


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def draw(rows: list[dict], path: Path) -> None:
    sizes = sorted({row["micro_batch"] for row in rows})
    with figure_into(path, 1, len(sizes), size=(7 * len(sizes), 5), sharey=True) as (_, axes):
        for axis, size in zip(axes[0], sizes, strict=True):
            bars = [row for row in rows if row["micro_batch"] == size]
            colors = ["tab:blue" if "lion_dist" in row["engine"] else "grey" for row in bars]
            drawn = axis.barh([row["engine"] for row in bars], [row["ms_median"] for row in bars], color=colors)
            axis.bar_label(drawn, [f"{row['ms_median']:.1f} ms, x{row['ratio']:.2f}" for row in bars], fontsize=7)
            axis.set(title=f"micro-batch {size}, {bars[0]['ranks']} ranks", xlabel="ms a step", xmargin=0.25)
        axes[0][0].invert_yaxis()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="1.35B")
    add("--micro-batch", type=int, nargs="+", default=[1, 4], help="sequences a rank and backward pass")
    add("--micro-batches", type=int, default=1, help="backward passes a step")
    add("--seq-len", type=int, default=2048)
    add("--steps", type=int, default=20)
    add("--warm-up", type=int, default=5)
    add("--compile", action="store_true", help="torch.compile each block")
    add("--graph", action="store_true", help="whole steps as CUDA graphs; ratios are to forward and backward in one")
    add("--pretend-ranks", type=int, help="be rank 0 of so many, of which the others do not exist")
    add("--engines", nargs="+", default=[""], help="only the baseline and engines whose name has one of these in it")
    add("--csv", type=Path)
    add("--png", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = join(args.pretend_ranks)
    rows = Rows(args.csv if dist.get_rank() == 0 else None, device)
    host = round(seconds_of_additions(), 2)
    say(f"host: ten million additions in Python take {host} s")
    baseline: dict[int, float] = {}  # ms, by micro-batch
    for micro_batch, name, build in turns(args):
        if args.pretend_ranks and name.startswith(("DDP", "DeepSpeed")):
            say(f"{name}: does not run on pretended ranks")
            continue
        row = measure(args, name, build, micro_batch, device)
        if row is None:
            continue
        if name in (BASELINE, IN_A_GRAPH):
            baseline[micro_batch] = row["ms_median"]
        ratio = round(row["ms_median"] / baseline[micro_batch], 3)
        row = rows.add(row | {"host_speed_s": host, "compiled": args.compile, "ratio": ratio})
        say(
            f"micro-batch {micro_batch}  {row['ms_median']:9.2f} ms  x{row['ratio']:<6.3f} "
            f"[{row['ms_p10']:.2f}, {row['ms_p90']:.2f}]  host {row.get('host_ms', 0):6.2f}  exposed "
            f"{row.get('exposed_ms', 0):6.2f}  {row['peak_gb']:6.2f} GB  {name}"
        )
    if args.png and dist.get_rank() == 0:
        draw(rows.rows, args.png)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
