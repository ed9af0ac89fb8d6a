"""What a step of ``ShardedLion`` costs the host: the time until its calls return, above that of the model alone.

    python -m lion_dist.benchmarks.host                                  # a GPU, or a CPU; seconds
    torchrun --nproc-per-node 2 -m lion_dist.benchmarks.host             # with real ranks, and peer memory
    python -m lion_dist.benchmarks.host --buckets 14 27

147 parameters of a few hundred elements, so that what is left is the library's own Python, its launches and torch's
calls: on four pretended ranks (torch's fake process group), or on those of torchrun. On a GPU each step begins when the
device is idle and the host is not waited for; on a CPU the update's arithmetic is part of it. A step of the model alone
and one with the optimizer take turns, for hosts change their speed within seconds; rank 0 prints its own times.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.benchmarks.ranks import join
from lion_dist.benchmarks.report import Rows, version_of
from lion_dist.benchmarks.timing import seconds_of_additions

TENSORS = 147  # of the 1.35 B Llama-shaped model
BUCKET_NUMEL = 6720  # can be cut into so many equal tensors as a bucket has here
PARTS = ("forward", "backward", "clip", "step", "zero_grad")
WARM_UP = 10
PRETENDED_RANKS = 4  # where torchrun has started none


class Layer(nn.Module):
    """One parameter and next to no arithmetic."""

    def __init__(self, numel: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.sum()


def make_model(buckets: int, device: torch.device) -> nn.Sequential:
    """TENSORS layers whose weights fill ``buckets`` buckets of at most BUCKET_NUMEL elements."""
    of_bucket = [len(range(i, TENSORS, buckets)) for i in range(buckets)]
    return nn.Sequential(*[Layer(BUCKET_NUMEL // n, device) for n in of_bucket for _ in range(n)])


def make_optimizer(model: nn.Module) -> ShardedLion:
    return ShardedLion(
        model.parameters(),
        module=model,
        sharding=ShardingConfig(bucket_numel=BUCKET_NUMEL),
        precision=PrecisionPolicy(main_params="split", momentum_dtype=torch.bfloat16),
    )


def step_parts(model: nn.Module, optimizer: ShardedLion | None, x: Tensor) -> Iterator[None]:
    """One step, which pauses after each of PARTS."""
    loss = model(x)
    yield
    loss.backward()
    yield
    if optimizer is not None:
        optimizer.clip_grad_norm_(1.0)
    yield
    if optimizer is not None:
        optimizer.step()
    yield
    (model if optimizer is None else optimizer).zero_grad()
    yield


def host_ms(model: nn.Module, optimizer: ShardedLion | None, x: Tensor) -> list[float]:
    """Of each of PARTS in one step, which all ranks begin together."""
    dist.barrier()
    if x.is_cuda:
        torch.cuda.synchronize()
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in step_parts(model, optimizer, x)]
    return [1e3 * (stop - start) for start, stop in zip(times, times[1:], strict=False)]


def measure(buckets: int, device: torch.device, steps: int) -> dict:
    """Medians above those of the model alone; the two take turns."""
    x = torch.ones((), dtype=torch.bfloat16, device=device)
    alone, model = make_model(buckets, device), make_model(buckets, device)
    optimizer = make_optimizer(model)
    turns = [(host_ms(alone, None, x), host_ms(model, optimizer, x)) for _ in range(WARM_UP + steps)]
    times = torch.tensor(turns[WARM_UP:])  # [steps, 2, parts]
    of_parts = times.median(dim=0).values.diff(dim=0)[0]
    of_alone, of_both = times.sum(dim=-1).median(dim=0).values.tolist()
    row = {"tensors": TENSORS, "buckets": len(optimizer.buckets), "host_ms": round(of_both - of_alone, 3)}
    row |= {f"{part}_ms": round(added, 3) for part, added in zip(PARTS, of_parts.tolist(), strict=True)}
    optimizer.close()
    return row | {"alone_ms": round(of_alone, 3), "steps": steps, "version": version_of("lion-dist")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buckets", type=int, nargs="+", default=[14, 27], metavar="N")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    device = join(None if "RANK" in os.environ else PRETENDED_RANKS)
    first = dist.get_rank() == 0
    rows = Rows(args.csv if first else None, device)
    for buckets in args.buckets:
        row = rows.add(measure(buckets, device, args.steps) | {"host_speed_s": round(seconds_of_additions(), 2)})
        if first:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
