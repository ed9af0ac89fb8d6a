"""A study: the same runs in several arms, paired by seed, and what they differ by.

Every arm of a seed starts from the same weights and sees the same batches, so that differences are paired. The model
may be compiled; the update is not, because Inductor elides bf16 round trips and would fake what is studied.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from comparison.evaluation import held_out_windows
from lion_dist import Lion, PrecisionPolicy
from lion_dist.reporting import figure_into
from train import Transformer, global_batch, lr_factor, read_corpus

EVERY = 20  # steps between losses that are kept
# Two-sided 95% quantiles of Student's t, by degrees of freedom.
T_95 = dict(enumerate((12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201), start=1))


@dataclass(frozen=True)
class Arm:
    """``settings``: of ``Lion``, beside lr and weight decay. ``poison_every``: every so many steps the batch is of
    random bytes; 0: never."""

    settings: dict = field(default_factory=dict)
    precision: PrecisionPolicy = PrecisionPolicy()
    poison_every: int = 0


def parse_arguments(description: str, out: str, more: Callable[[Callable], None] | None = None) -> argparse.Namespace:
    """``more``: adds what the study has beside, by the parser's ``add_argument``."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--out", type=Path, default=Path(out))
    add("--report", action="store_true", help="read the results in --out instead of training")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--data", help="as launch/train.py's")
    add("--layers", type=int, default=8)
    add("--dim", type=int, default=512)
    add("--heads", type=int, default=8)
    add("--seq-len", type=int, default=512)
    add("--batch-size", type=int, default=32, help="windows a step")
    add("--steps", type=int, default=2000)
    add("--lr", type=float, default=3e-4)
    add("--weight-decay", type=float, default=0.3)
    add("--warmup", type=int, default=100)
    add("--held-out", type=int, default=1024, help="windows that the final loss is measured on")
    add("--no-compile", action="store_true")
    if more is not None:
        more(add)
    return parser.parse_args()


def batch(args, arm: Arm, text: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    windows = global_batch(text, args.batch_size, args.seq_len, seed, step)
    if arm.poison_every and step % arm.poison_every == arm.poison_every - 1:
        generator = torch.Generator().manual_seed(seed * args.steps + step)
        return torch.randint(256, windows.shape, generator=generator, dtype=windows.dtype)
    return windows


def begin_optimizers(args, text, device) -> Callable[[int, Arm], dict]:
    """What runs an arm of a study of ``Lion``: one model for all, compiled once."""
    model = Transformer(args.layers, args.dim, args.heads).to(device, torch.bfloat16)
    forward = model if args.no_compile else torch.compile(model)
    return lambda seed, arm: run(args, model, forward, text, seed, arm, device)


def run(args, model, forward, text, seed: int, arm: Arm, device) -> dict:
    torch.manual_seed(seed)
    model.load_state_dict(Transformer(args.layers, args.dim, args.heads).to(torch.bfloat16).state_dict())
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others}]
    optimizer = Lion(groups, lr=args.lr, precision=arm.precision, **arm.settings)
    losses, started = [], time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_factor(step, args.warmup, args.steps)
        loss = forward(batch(args, arm, text[0], seed, step).to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if optimizer.skip_spikes is not None:
            optimizer.observe(grad_norm=norm)
        optimizer.step()
        if step % EVERY == 0:
            losses.append(loss.detach())
    result = result_of(args, forward, text, losses, device, started)
    if optimizer.skip_spikes is not None:
        result["spikes"] = int(optimizer.spike_window[-2])
    return result


@torch.no_grad()
def result_of(args, forward: Callable, text, losses: list[torch.Tensor], device, started: float) -> dict:
    """Of one run: its held-out loss, by ``forward`` of a part of the windows, and what it took."""
    windows = held_out_windows(text[1], args.held_out, args.seq_len).to(device)
    final = torch.stack([forward(part) for part in windows.split(args.batch_size)]).double().mean().item()
    losses = torch.stack(losses).tolist()
    return {"held_out": final, "losses": losses, "seconds": round(time.perf_counter() - started, 1)}


def train(args, arms: Mapping[str, object], begin: Callable = begin_optimizers) -> None:
    """Run what is not in --out yet: a study that was cut off goes on where it stopped.

    Args:
        begin: called once with (args, text, device), it returns what runs (seed, arm) and tells the result.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = read_corpus(args.data, args.seq_len)
    numel = sum(p.numel() for p in Transformer(args.layers, args.dim, args.heads).parameters())
    print(f"{numel / 1e6:.1f} M parameters, {text[0].numel() / 1e6:.1f} MB of text, seeds {args.seeds}")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "report", "seeds", "arms")}
    path = args.out / f"seeds-{'-'.join(map(str, args.seeds))}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    run_arm = begin(args, text, device)
    with path.open("a") as file:
        for seed in args.seeds:
            for name, arm in arms.items():
                if any((row["seed"], row["arm"]) == (seed, name) for row in done):
                    continue
                result = run_arm(seed, arm)
                row = {"arm": name, "seed": seed, "numel": numel, "torch": torch.__version__, "machine": machine}
                file.write(json.dumps(row | settings | result) + "\n")
                file.flush()
                print(f"seed {seed}  {result['held_out']:.4f}  {result['seconds']:5.1f} s  {name}", flush=True)


def summarize(rows: list[dict], baselines: Mapping[str, str | None]) -> list[dict]:
    """Per arm: the mean held-out loss, and the mean paired difference to its baseline with its 95% interval.

    Args:
        baselines: {arm: the arm that it is compared with, or None}.
    """
    by_arm = {arm: {r["seed"]: r["held_out"] for r in rows if r["arm"] == arm} for arm in baselines}
    table = []
    for arm, baseline in baselines.items():
        results = by_arm[arm]
        if not results:
            continue
        row = {"arm": arm, "runs": len(results), "held_out": statistics.mean(results.values()), "against": baseline}
        others = {} if baseline is None else by_arm[baseline]
        differences = [loss - others[seed] for seed, loss in results.items() if seed in others]
        if differences:
            row["difference"] = statistics.mean(differences)
        if len(differences) > 1:
            spread = statistics.stdev(differences) / math.sqrt(len(differences))
            row["half_interval"] = T_95[len(differences) - 1] * spread
        table.append(row)
    return table


def report(args, baselines: Mapping[str, str | None], picture: str) -> None:
    rows = [json.loads(line) for path in sorted(args.out.glob("*.jsonl")) for line in path.read_text().splitlines()]
    if not rows:
        raise SystemExit(f"{args.out} holds no results yet: run without --report first.")
    table = summarize(rows, baselines)
    first = rows[0]
    print(
        f"{first['numel'] / 1e6:.1f} M parameters in bf16, {first['steps']} steps of "
        f"{first['batch_size'] * first['seq_len']:,} bytes, {first['machine']}, torch {first['torch']}; "
        f"{len({row['seed'] for row in rows})} seeds\n"
    )
    print("| | runs | held-out loss, nats per byte | paired difference, 95% interval | against |")
    print("|---|---|---|---|---|")
    for row in table:
        change = "" if "difference" not in row else f"{row['difference']:+.4f}"
        change += "" if "half_interval" not in row else f" ± {row['half_interval']:.4f}"
        print(f"| {row['arm']} | {row['runs']} | {row['held_out']:.4f} | {change} | {row['against'] or ''} |")
    draw(table, rows, args.out / picture)


def draw(table: list[dict], rows: list[dict], path: Path) -> None:
    early = min(5, len(rows[0]["losses"]) - 1)  # the first drop would hide the rest
    out = figure_into(path, 1, 2, size=(12, 4), width_ratios=(1, 1.2))
    with out as (_, ((left, right),)):
        for row in table:
            curves = [r["losses"] for r in rows if r["arm"] == row["arm"]]
            if not all(curves):
                continue  # a run of which only the held-out loss was kept
            mean = torch.tensor(curves).mean(dim=0)
            left.plot(torch.arange(len(mean)) * EVERY, mean, linewidth=0.8, label=row["arm"])
            left.set(xlabel="step", ylabel="training loss, nats per byte", ylim=(None, mean[early].item()))
        left.legend(fontsize=6)
        arms = [row for row in table if "half_interval" in row]
        right.axvline(0.0, color="grey", linewidth=0.8)
        right.errorbar(
            [row["difference"] for row in arms], range(len(arms)), xerr=[row["half_interval"] for row in arms], fmt="o"
        )
        right.set_yticks(range(len(arms)), [f"{row['arm']}\nagainst {row['against']}" for row in arms], fontsize=8)
        right.set(xlabel="held-out loss minus the other arm's, 95% interval", ylim=(max(len(arms), 1) - 0.5, -0.5))


def main(name: str, doc: str, arms: Mapping[str, Arm], baselines: Mapping[str, str | None]) -> None:
    """The program of the study ``name``; ``doc``: its docstring, which begins with what is asked."""
    args = parse_arguments(doc.split("\n")[0], f"runs/{name}")
    if args.report:
        report(args, baselines, f"{name}-study.png")
    else:
        train(args, arms)
