"""Trains the model of train.py under one of six engines, and reports each run in the same way, to compare them.

    python launch/compare_engines.py --engine plain
    torchrun --nproc-per-node 2 launch/compare_engines.py --engine sharded
    torchrun --nproc-per-node 2 launch/compare_engines.py --engine fsdp2 --data my_texts/ --out runs/mine --resume
    torchrun --nproc-per-node 2 launch/compare_engines.py --engine deepspeed --zero-stage 3 --precision bf16

At the same seed every engine starts from the same weights and sees the same batches. It reports more than train.py:
metrics as CSV and for TensorBoard, the share of the GPUs' arithmetic, the optimizer's own metrics, a table of memory,
a loss curve, and what has become of the other ranks when one fails. `lion-dist plot runs/a runs/b` draws several runs.
"""

import argparse
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from comparison.arguments import DTYPES, check_arguments, parse_arguments
from comparison.durable import replace_text
from comparison.engines import ENGINES, PlainEngine
from comparison.evaluation import fingerprint, held_out_parts, held_out_windows
from comparison.failures import doing, fail, leave_at_once, refuse
from comparison.journal import Journal
from comparison.preemption import NOTHING, SignalRequests
from comparison.ranks import (
    check_same_start,
    differing_parameters,
    gather_objects,
    say,
    start_process_group,
    stop_process_group,
)
from comparison.report import memory_table, save_loss_curve, unsharded_memory
from comparison.resuming import Checkpoints
from comparison.throughput import Throughput, throughput_of
from lion_dist import PrecisionPolicy
from train import Transformer, global_batch, lr_factor, read_corpus

HELD_OUT_WINDOWS = 128
HELD_OUT_ROWS = 16  # in one forward


@dataclass(frozen=True)
class Run:
    """What a run is made of."""

    args: argparse.Namespace
    policy: PrecisionPolicy
    engine: PlainEngine
    scheduler: LambdaLR
    text: tuple[torch.Tensor, torch.Tensor]  # to train on, and held out
    device: torch.device
    checkpoints: Checkpoints
    throughput: Throughput


def train_step(args: argparse.Namespace, engine: PlainEngine, windows: torch.Tensor) -> torch.Tensor:
    """One step on this rank's windows, uint8 [rows, seq_len + 1]. Returns fp32 [2] without waiting for the
    device: this rank's mean loss, and the norm of the whole gradient before clipping."""
    engine.zero_grad()  # not after step(): memory is measured with the gradients
    losses = []
    micro_batches = windows.chunk(args.micro_batches)
    for i, micro_batch in enumerate(micro_batches):
        with nullcontext() if i == len(micro_batches) - 1 else engine.accumulate():
            with doing("forward"):  # waits for the parameters of the last step
                loss = engine.forward(micro_batch)
            with doing("backward"):
                engine.backward(loss / len(micro_batches))
        losses.append(loss.detach())
    with doing("the optimizer's step"):
        grad_norm = engine.step(args.clip)
    return torch.stack([torch.stack(losses).mean(), grad_norm.float()])


def train(run: Run, signals: SignalRequests, begin: int) -> int:
    """Trains from `begin` completed steps to --steps, or until SIGTERM ends it; returns the completed steps."""
    args = run.args
    journal = Journal(args, run.engine, run.throughput, begin)
    step, asked = begin, NOTHING
    while step < args.steps and not asked.stop:
        step += 1
        batch = global_batch(run.text[0], args.batch_size, args.seq_len, args.seed, step)
        windows = batch.chunk(dist.get_world_size())[dist.get_rank()].to(run.device)
        lr = run.scheduler.get_last_lr()[0]
        with doing(f"step {step}"):
            journal.note(step, lr, train_step(args, run.engine, windows))
        run.scheduler.step()
        saves = step == args.steps or (args.checkpoint_every and step % args.checkpoint_every == 0)
        asked = NOTHING
        if saves or step % args.log_every == 0:
            with doing(f"the exchange of losses after step {step}"):
                asked = journal.exchange(signals.take())
        if saves or asked.save or asked.stop:
            with doing(f"the checkpoint of step {step}"):
                run.checkpoints.save(step)
    with doing("the last checkpoint"):
        run.checkpoints.finish()
    journal.close()
    return step


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """Mean loss over evenly spaced held-out windows; the ranks take turns."""
    windows = held_out_windows(run.text[1], HELD_OUT_WINDOWS, run.args.seq_len)
    total = torch.zeros(2, dtype=torch.float64, device=run.device)  # sum of losses, number of windows
    for part, weight in held_out_parts(windows.to(run.device), dist.get_rank(), dist.get_world_size(), HELD_OUT_ROWS):
        total += torch.stack([run.engine.model(part).double() * weight, total.new_tensor(weight)])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def finish(run: Run, held_out: dict[int, float]) -> int:
    """Prints the table, writes summary.json and the loss curve; 1 when the ranks differ, else 0."""
    args, engine = run.args, run.engine
    engine.finish_param_sync()
    with engine.full_parameters():
        differing = differing_parameters(engine.model)
        numel = sum(parameter.numel() for parameter in engine.model.parameters())
    by_rank, skipped = gather_objects(engine.memory_bytes()), engine.skipped_steps()
    memory = {f"rank {rank}, {args.engine}": size for rank, size in enumerate(by_rank)}
    if dist.get_rank() == 0:
        dtype = DTYPES[args.precision]
        memory["unsharded Lion (computed)"] = unsharded_memory(numel, dtype, run.policy, moments=1)
        memory["unsharded AdamW (computed)"] = unsharded_memory(numel, dtype, run.policy, moments=2)
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
        replace_text(args.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        save_loss_curve(args.out / "metrics.jsonl", held_out, args.out / "loss-curve.png")
        print(f"in {args.out}: metrics.jsonl, loss-curve.png, summary.json, step-{last:06d}/")
    return 1 if differing else 0


def set_up(args: argparse.Namespace, text: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> Run:
    torch.manual_seed(args.seed)
    policy = PrecisionPolicy(
        main_params=args.main_params, momentum_dtype=DTYPES.get(args.momentum_dtype), seed=args.seed
    )
    model = Transformer(args.layers, args.dim, args.heads).to(device, DTYPES[args.precision])
    numel = sum(p.numel() for p in model.parameters())  # an engine may leave only a shard of them here
    engine = ENGINES[args.engine](model, args, policy, device)
    scheduler = LambdaLR(engine.optimizer, lambda completed: lr_factor(completed, args.warmup, args.steps))
    say(
        f"{args.engine}: {numel:,} parameters ({args.precision}), "
        f"{dist.get_world_size()} x {device.type}; {text[0].numel() / 1e6:.1f} MB to train "
        f"on, {text[1].numel() / 1e6:.1f} MB held out; process {os.getpid()} takes signals"
    )
    checkpoints = Checkpoints(args, engine, scheduler, fingerprint(text))
    return Run(args, policy, engine, scheduler, text, device, checkpoints, throughput_of(args, numel, device))


def run_to_the_end(args: argparse.Namespace, text: tuple[torch.Tensor, torch.Tensor], device: torch.device) -> int:
    """Everything that needs a process group. Returns the exit code."""
    signals = SignalRequests()  # before set_up prints which process takes them
    with doing("setting up the engine"):
        run = set_up(args, text, device)
    with doing("resuming"):
        begin = run.checkpoints.resume(args.resume)
    with doing("the held-out loss before training"):
        held_out = {begin: held_out_loss(run)}
    signals.begin_training()
    end = train(run, signals, begin)
    if end < args.steps:
        path = run.checkpoints.path(end)
        say(f"SIGTERM: {path} holds {end} of {args.steps} steps; --resume auto goes on from there")
        return signals.exit_code()
    with doing("the held-out loss after training"):
        held_out[end] = held_out_loss(run)
    return finish(run, held_out)


def main() -> int:
    try:
        args = parse_arguments(__doc__.split("\n")[0])
        check_arguments(args)
        text = read_corpus(args.data, args.seq_len)
        device, store = start_process_group(timedelta(seconds=args.timeout))
        check_same_start(args, fingerprint(text))
    except (ValueError, FileNotFoundError, PermissionError) as error:
        refuse(f"compare_engines.py: {error}")
        if dist.is_initialized():
            leave_at_once(2)
        return 2
    except ConnectionError as error:
        print(f"compare_engines.py: {error}", file=sys.stderr)
        return 1
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        exit_code = run_to_the_end(args, text, device)
        stop_process_group()
    except Exception as error:
        fail(error, store, rank, world_size)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
