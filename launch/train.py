"""Trains a byte-level transformer language model with Lion: on one process, under DDP, with ShardedLion or DeepSpeed.

    python launch/train.py --engine plain
    torchrun --nproc-per-node 2 launch/train.py --engine sharded
    torchrun --nproc-per-node 2 launch/train.py --engine sharded --data my_texts/ --out runs/mine --resume
    torchrun --nproc-per-node 2 launch/train.py --engine deepspeed --zero-stage 3 --precision bf16

GPUs and NCCL where there are GPUs, else CPUs and gloo. To train your own model, copy this folder and replace
model.py and corpus.py.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from corpus import Corpus, global_batch, held_out_windows, rank_part, read_corpus
from engines import ENGINES, PlainEngine
from lion_dist import PrecisionPolicy, ShardingConfig
from model import Transformer
from ranks import (
    differing_parameters,
    gather_objects,
    mean_over_ranks,
    start_process_group,
    stop_process_group,
)
from report import Metrics, Progress, memory_table, save_loss_curve, unsharded_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
HELD_OUT_WINDOWS = 128
# What a resumed run must share with the first one to land on the same losses.
TRAJECTORY = "steps batch_size micro_batches seq_len lr weight_decay warmup clip seed".split()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--engine", choices=list(ENGINES), default="sharded", help="how the ranks share the work")
    add("--data", help="a text file or a folder of them; None: the Python standard library's source")
    add("--out", type=Path, help="folder of metrics, loss curve and checkpoints; None: runs/ENGINE")
    add("--layers", type=int, default=4, help="transformer blocks")
    add("--dim", type=int, default=128, help="width of the model")
    add("--heads", type=int, default=4, help="attention heads")
    add("--seq-len", type=int, default=256, help="bytes per window")
    add("--steps", type=int, default=800, help="optimizer steps, and the length of the schedule")
    add("--batch-size", type=int, help="windows per step, over all ranks; None: 8, or more until it divides")
    add("--micro-batches", type=int, default=1, help="parts of a rank's batch, whose gradients add up")
    add("--lr", type=float, default=1e-3, help="learning rate at the end of the warmup")
    add("--weight-decay", type=float, default=0.1, help="of the matrices; multiplied by the learning rate")
    add("--warmup", type=int, default=20, help="steps of linear warmup; a cosine to a tenth of --lr follows")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    add("--precision", choices=list(DTYPES), default="fp32", help="dtype of the parameters")
    add("--main-params", choices=["auto", "fp32", "split", "none"], default="auto", help="of bf16")
    add("--momentum-dtype", choices=list(DTYPES), help="None: as the parameters")
    add("--zero-stage", type=int, default=2, help="1 or 2 of --engine sharded, 0 to 3 of --engine deepspeed")
    add("--deepspeed-config", help="of --engine deepspeed; None: launch/deepspeed/zeroN.json")
    add("--seed", type=int, default=0, help="of the initial weights and the batches")
    add("--checkpoint-every", type=int, default=0, help="steps; 0: only at the end")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--log-every", type=int, default=5, help="steps between reads of the loss, which wait for the device")
    args = parser.parse_args()
    args.out = args.out or Path("runs") / args.engine
    if args.batch_size is None:
        parts = WORLD_SIZE * max(1, args.micro_batches)
        args.batch_size = math.ceil(8 / parts) * parts
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError with the fact, the value and the remedy; the optimizer checks its own arguments."""
    if args.engine == "plain" and WORLD_SIZE > 1:
        raise ValueError(
            f"--engine plain trains in one process, but there are WORLD_SIZE={WORLD_SIZE}. "
            "Use --engine ddp or --engine sharded, or --nproc-per-node 1."
        )
    for name in ("layers", "dim", "heads", "seq_len", "steps", "batch_size", "micro_batches", "log_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    if args.dim % (2 * args.heads):
        raise ValueError(f"--dim must be a multiple of 2 * --heads, got {args.dim} and {args.heads} heads.")
    if args.batch_size % (WORLD_SIZE * args.micro_batches):
        raise ValueError(
            f"--batch-size {args.batch_size} does not divide among {WORLD_SIZE} ranks x {args.micro_batches} "
            f"micro-batches. Use a multiple of {WORLD_SIZE * args.micro_batches}."
        )
    if args.resume and not (args.out / "latest").exists():
        raise ValueError(f"--resume found no checkpoint in {args.out}. Pass the --out of an earlier run.")
    if args.engine != "deepspeed":
        ShardingConfig(zero_stage=args.zero_stage)
    elif args.zero_stage not in range(4):
        raise ValueError(f"--zero-stage must be 0, 1, 2 or 3 with --engine deepspeed, got {args.zero_stage}.")


def warmup_then_cosine(args: argparse.Namespace) -> Callable[[int], float]:
    """The factor on lr after so many completed steps: up to 1 in --warmup steps, then down to 0.1."""

    def factor(completed_steps: int) -> float:
        if completed_steps < args.warmup:
            return (completed_steps + 1) / args.warmup
        progress = (completed_steps - args.warmup) / max(1, args.steps - args.warmup)
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))

    return factor


def train_step(args: argparse.Namespace, engine: PlainEngine, windows: torch.Tensor) -> torch.Tensor:
    """One step on this rank's windows, uint8 [rows, seq_len + 1]. Returns fp32 [2] without waiting for the
    device: this rank's mean loss, and the norm of the whole gradient before clipping."""
    engine.zero_grad()  # not after step(): memory is measured with the gradients
    losses = []
    micro_batches = windows.chunk(args.micro_batches)
    for i, micro_batch in enumerate(micro_batches):
        with nullcontext() if i == len(micro_batches) - 1 else engine.accumulate():
            loss = engine.forward(micro_batch)
            engine.backward(loss / len(micro_batches))
        losses.append(loss.detach())
    grad_norm = engine.step(args.clip)
    return torch.stack([torch.stack(losses).mean(), grad_norm.float()])


def train(args, engine: PlainEngine, scheduler: LambdaLR, corpus: Corpus, device, completed_steps: int):
    is_first = dist.get_rank() == 0
    metrics = Metrics(args.out / "metrics.jsonl", completed_steps) if is_first else None
    progress = Progress(args.steps, completed_steps) if is_first else None
    unread, since = [], time.perf_counter()  # (step, lr, [loss, grad norm]) of the steps not yet written
    for step in range(completed_steps + 1, args.steps + 1):
        batch = global_batch(corpus.train, args.batch_size, args.seq_len, args.seed, step)
        windows = rank_part(batch, dist.get_rank(), WORLD_SIZE).to(device)
        unread.append((step, scheduler.get_last_lr()[0], train_step(args, engine, windows)))
        scheduler.step()
        saves = step == args.steps or (args.checkpoint_every and step % args.checkpoint_every == 0)
        if saves or step % args.log_every == 0:
            means = mean_over_ranks(torch.stack([values for *_, values in unread])).tolist()
            rate = len(unread) * args.batch_size * args.seq_len / (time.perf_counter() - since)
            if is_first:
                rows = [
                    {"step": at, "loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_s": round(rate)}
                    for (at, lr, _), (loss, norm) in zip(unread, means, strict=True)
                ]
                metrics.write(rows)
                progress.update(rows[-1])
            if saves:
                save_checkpoint(args, engine, scheduler, corpus, step)
            unread, since = [], time.perf_counter()
    if is_first:
        progress.close()


@torch.no_grad()
def held_out_loss(args, engine: PlainEngine, corpus: Corpus, device: torch.device) -> float:
    """Mean loss over evenly spaced held-out windows; the ranks take turns."""
    windows = held_out_windows(corpus.held_out, HELD_OUT_WINDOWS, args.seq_len)
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, number of windows
    for part in windows[dist.get_rank() :: WORLD_SIZE].to(device).split(16):
        total += torch.stack([engine.model(part).double() * len(part), total.new_tensor(len(part))])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def settings_of(args: argparse.Namespace, corpus: Corpus) -> dict:
    settings = {name: getattr(args, name) for name in TRAJECTORY}
    return settings | {"text": corpus.fingerprint, "ranks": WORLD_SIZE}


def save_checkpoint(args, engine: PlainEngine, scheduler: LambdaLR, corpus: Corpus, step: int) -> None:
    """Every rank calls. `latest` names a complete checkpoint: a half-written one is never resumed."""
    name = f"step-{step:06d}"
    extra = {"step": step, "scheduler": scheduler.state_dict(), "settings": settings_of(args, corpus)}
    engine.save(args.out / name, extra)
    dist.barrier()
    if dist.get_rank() == 0:
        (args.out / "latest.tmp").write_text(name)
        (args.out / "latest.tmp").replace(args.out / "latest")


def load_checkpoint(args, engine: PlainEngine, scheduler: LambdaLR, corpus: Corpus) -> int:
    """Returns the number of completed steps."""
    path = args.out / (args.out / "latest").read_text()
    extra = engine.load(path)
    scheduler.load_state_dict(extra["scheduler"])
    now = settings_of(args, corpus)
    changed = [f"{name} {old} -> {now[name]}" for name, old in extra["settings"].items() if now[name] != old]
    if changed:
        say("other settings than the first run's, so its losses will not repeat: " + ", ".join(changed))
    say(f"resumed from {path}, {extra['step']} of {args.steps} steps done")
    return extra["step"]


def finish(args, engine: PlainEngine, policy: PrecisionPolicy, held_out: dict[int, float]) -> int:
    """Prints the table, writes summary.json and the loss curve; 1 when the ranks differ, else 0."""
    engine.finish_param_sync()
    with engine.full_parameters():
        differing = differing_parameters(engine.model)
        numel = sum(parameter.numel() for parameter in engine.model.parameters())
    by_rank, skipped = gather_objects(engine.memory_bytes()), engine.skipped_steps()
    memory = {f"rank {rank}, {args.engine}": size for rank, size in enumerate(by_rank)}
    if dist.get_rank() == 0:
        dtype = DTYPES[args.precision]
        memory["unsharded Lion (computed)"] = unsharded_memory(numel, dtype, policy, moments=1)
        memory["unsharded AdamW (computed)"] = unsharded_memory(numel, dtype, policy, moments=2)
        print("\n" + memory_table(memory, numel) + "\n")
        first, last = min(held_out), max(held_out)
        before, after = f"{held_out[first]:.4f} after step {first}", f"{held_out[last]:.4f} after step {last}"
        print(f"held-out loss, nats per byte: {before}, {after}")
        if skipped:
            print(f"{skipped} steps were skipped on all ranks: a gradient was not finite")
        print("full parameters bit-identical on all ranks: " + ("no" if differing else "yes"))
        for name, ranks in differing.items():
            print(f"  {name}: ranks {ranks} differ from rank 0")
        summary = {"held_out": held_out, "memory_bytes": memory, "numel": numel, "differing": differing}
        summary["skipped_steps"] = skipped
        (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        save_loss_curve(args.out / "metrics.jsonl", held_out, args.out / "loss-curve.png")
        checkpoint = (args.out / "latest").read_text()
        print(f"in {args.out}: metrics.jsonl, loss-curve.png, summary.json, {checkpoint}/")
    return 1 if differing else 0


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def run(args: argparse.Namespace, corpus: Corpus, device: torch.device) -> int:
    """Everything that needs a process group. Returns the exit code."""
    torch.manual_seed(args.seed)
    policy = PrecisionPolicy(
        main_params=args.main_params, momentum_dtype=DTYPES.get(args.momentum_dtype), seed=args.seed
    )
    model = Transformer(args.layers, args.dim, args.heads).to(device, DTYPES[args.precision])
    numel = sum(p.numel() for p in model.parameters())  # an engine may leave only a shard of them here
    engine = ENGINES[args.engine](model, args, policy, device)
    scheduler = LambdaLR(engine.optimizer, warmup_then_cosine(args))
    say(
        f"{args.engine}: {numel:,} parameters ({args.precision}), "
        f"{WORLD_SIZE} x {device.type}; {corpus.files} files, {corpus.train.numel() / 1e6:.1f} MB to train "
        f"on, {corpus.held_out.numel() / 1e6:.1f} MB held out"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    completed_steps = 0
    if args.resume:
        completed_steps = load_checkpoint(args, engine, scheduler, corpus)
    else:
        (args.out / "latest").unlink(missing_ok=True)  # an earlier run's: not to be resumed as this one's
    held_out = {completed_steps: held_out_loss(args, engine, corpus, device)}
    train(args, engine, scheduler, corpus, device, completed_steps)
    held_out[args.steps] = held_out_loss(args, engine, corpus, device)
    return finish(args, engine, policy, held_out)


def main() -> int:
    args = parse_arguments()
    try:
        check_arguments(args)
        corpus = read_corpus(args.data, args.seq_len)
        device = start_process_group()
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    exit_code = run(args, corpus, device)
    stop_process_group()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
