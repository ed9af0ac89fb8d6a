"""A training step under DeepSpeed, this Lion against FusedLion: the ratio, its interval, and the bytes of momentum.

    torchrun --nproc-per-node 4 -m lion_dist.benchmarks.deepspeed_step --csv docs/benchmarks/deepspeed_step.csv

For each ZeRO stage both engines take turns as ``lion_dist.benchmarks.paired`` says. bf16 engine, micro-batch and model
as ``lion_dist.benchmarks.step``; clipping at 1.0.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist.benchmarks import paired
from lion_dist.benchmarks.llama import SIZES, make_llama
from lion_dist.benchmarks.report import Rows, version_of
from lion_dist.benchmarks.timing import free_gpu_memory
from lion_dist.integrations.deepspeed import lion_optimizer

LION_PARAMS = {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.1}


def config_of(stage: int, micro_batch: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Lion", "params": dict(LION_PARAMS)},
        "zero_optimization": {"stage": stage, "overlap_comm": True},
    }


def make_engine(model: nn.Module, stage: int, micro_batch: int, ours: bool):
    import deepspeed

    config = config_of(stage, micro_batch)
    if ours:
        config["optimizer"]["params"]["momentum_dtype"] = "bf16"
    optimizer = lion_optimizer(config) if ours else None  # None: the name means DeepSpeed's FusedLion
    return deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), optimizer=optimizer, config=config
    )[0]


def step_of(engine, tokens: Tensor) -> Callable[[], None]:
    def step() -> None:
        engine.backward(engine(tokens))
        engine.step()

    return step


def momentum_bytes(engine) -> int:
    return sum(state["exp_avg"].nbytes for state in engine.optimizer.optimizer.state.values() if "exp_avg" in state)


def measure(args, stage: int) -> dict:
    device = torch.device("cuda", torch.cuda.current_device())
    model = make_llama(args.size, device, torch.bfloat16, args.compile)
    tokens = torch.randint(SIZES[args.size]["vocab"], (args.micro_batch, args.seq_len + 1), device=device)
    engines = [make_engine(copy.deepcopy(model), stage, args.micro_batch, ours) for ours in (True, False)]
    del model
    steps = [step_of(engine, tokens) for engine in engines]
    for step in steps:
        for _ in range(args.warm_up):
            step()
    found = paired.compare(steps[0], steps[1], args, device)
    own, theirs = (momentum_bytes(engine) for engine in engines)
    del engines, steps
    free_gpu_memory()
    return {
        "zero_stage": stage,
        "ranks": dist.get_world_size(),
        "micro_batch": args.micro_batch,
        "lion_dist_ms": round(found.ms[0], 3),
        "fused_lion_ms": round(found.ms[1], 3),
        "ratio": round(found.ratio, 4),
        "half_interval_95": round(found.half_interval, 4),
        "blocks": args.blocks,
        "lion_dist_momentum_bytes": own,
        "fused_lion_momentum_bytes": theirs,
        "deepspeed": version_of("deepspeed"),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    paired.add_arguments(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible, and FusedLion has no CPU op")
    return args


def main() -> None:
    args = parse_args()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    rows = Rows(args.csv if dist.get_rank() == 0 else None, torch.device("cuda"))
    for stage in args.stages:
        row = measure(args, stage)
        if dist.get_rank() == 0:
            print(
                f"ZeRO-{stage}: lion_dist {row['lion_dist_ms']:.2f} ms, FusedLion {row['fused_lion_ms']:.2f} ms, ratio "
                f"{row['ratio']:.4f} ± {row['half_interval_95']:.4f}; momentum {row['lion_dist_momentum_bytes']:,} "
                f"against {row['fused_lion_momentum_bytes']:,} bytes a rank",
                flush=True,
            )
        rows.add(row)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
