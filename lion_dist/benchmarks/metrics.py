"""What watching costs: steps of ``Lion`` with ``metrics_every`` 0, 1 and 50, and one check of replicas.

    python -m lion_dist.benchmarks.metrics                   # one GPU, the shapes of a 1.35 B Llama, under a minute
    python -m lion_dist.benchmarks.metrics --device cpu      # a tiny model

Each number is the time of a step, averaged over 50 in a row so that measured and other steps count as often as they
come. The last columns hold what watching adds against whole training steps of that model on four H200: 150 ms at
micro-batch 4 and 38 ms at micro-batch 1 (there a rank updates, and measures, a quarter of the elements only).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lion_dist import Lion
from lion_dist.benchmarks.report import Rows, version_of
from lion_dist.benchmarks.timing import Timing, free_gpu_memory, time_on_cpu, time_on_gpu
from lion_dist.benchmarks.update import BETAS, LR, PRECISIONS, WEIGHT_DECAY, llama_shapes, make_params
from lion_dist.replica_check import CHUNK, Holding, Piece, make_weights

STEPS = 50  # in a row; a multiple of every interval
INTERVALS = (0, 1, 50)
TRAINING_STEPS_MS = (150, 38)
SHAPES = {"llama 1.35B": llama_shapes, "tiny": lambda: 20 * [(64, 64), (64,)]}


def make_steps(shapes, precision: str, every: int, device: torch.device) -> Callable[[], None]:
    """STEPS steps, to be timed as one."""
    dtype, policy = PRECISIONS[precision]
    params = make_params(shapes, dtype, device)
    options = dict(lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, precision=policy)
    step = Lion(params, metrics_every=every, **options).step

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


def make_check(shapes, precision: str, device: torch.device) -> Callable[[], object]:
    """The checksums of all parameters on one rank; what is sent then is a few bytes a bucket."""
    flat = torch.cat([p.detach().flatten() for p in make_params(shapes, PRECISIONS[precision][0], device)])
    holding = Holding("all", flat, [Piece("all", 0, flat.numel(), 0)])
    return lambda: holding.checksums(make_weights(min(CHUNK, flat.numel()), device))


def row(model: str, precision: str, what: str, timing: Timing, steps: int, without: float) -> dict:
    """``timing`` is of so many ``steps``; ``without``: ms of one step without watching."""
    median = timing.median / steps
    added = median - without
    result = {
        "model": model,
        "precision": precision,
        "what": what,
        "ms_median": round(median, 4),
        "ms_p10": round(timing.p10 / steps, 4),
        "ms_p90": round(timing.p90 / steps, 4),
        "repeats": timing.repeats,
        "host_ms": None if timing.host is None else round(timing.host / steps, 4),
        "added_ms": round(added, 4),
    }
    for whole in TRAINING_STEPS_MS:
        comparable = model == "llama 1.35B"
        result[f"percent_of_{whole}_ms"] = round(100 * added / whole, 3) if comparable else None
    return result | {"version": version_of("lion-dist")}


def show(result: dict) -> None:
    print("  ".join(f"{key} {value}" for key, value in result.items() if value is not None), flush=True)


def measure(model: str, precision: str, device: torch.device, repeats: int) -> Iterator[dict]:
    shapes = SHAPES[model]()
    makers = {f"metrics_every={e}": lambda e=e: make_steps(shapes, precision, e, device) for e in INTERVALS}
    if device.type == "cpu":
        timings = time_on_cpu({what: make() for what, make in makers.items()}, repeats)
    else:
        timings = {}
        for what, make in makers.items():
            timings[what] = time_on_gpu(make(), repeats, budget_s=2.0)
            free_gpu_memory()
    without = timings["metrics_every=0"].median / STEPS
    for what, timing in timings.items():
        yield row(model, precision, what, timing, STEPS, without)
    check = make_check(shapes, precision, device)
    timing = time_on_cpu({"": check}, repeats)[""] if device.type == "cpu" else time_on_gpu(check, repeats)
    yield row(model, precision, "one check of replicas", timing, 1, 0.0)
    free_gpu_memory()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", choices=list(SHAPES), help="default: llama 1.35B, on the CPU tiny")
    precisions = ["fp32", "bf16 split", "bf16 none"]
    parser.add_argument("--precisions", nargs="+", default=precisions, choices=list(PRECISIONS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--csv", type=Path, help="write the rows here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible: pass --device cpu for a tiny model on the CPU")
    if args.model is None:
        args.model = "tiny" if args.device == "cpu" else "llama 1.35B"
    return args


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    rows = Rows(args.csv, device)
    for precision in args.precisions:
        for result in measure(args.model, precision, device, args.repeats):
            show(rows.add(result))


if __name__ == "__main__":
    main()
