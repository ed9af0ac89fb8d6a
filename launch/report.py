"""What a training run shows: progress, metrics.jsonl, the loss curve and the final table."""

import json
import sys
import time
from pathlib import Path

import torch

from lion_dist import PrecisionPolicy

PLAIN_LINES = 10  # progress lines of a whole run when nobody watches a terminal
MEMORY_KINDS = ("params", "main_params", "exp_avg", "grads")


class Metrics:
    """metrics.jsonl: one line per step. A resumed run drops the lines after its checkpoint and goes on."""

    def __init__(self, path: Path, completed_steps: int):
        rows = read_metrics(path) if completed_steps else []
        self._file = path.open("w")
        self.write([row for row in rows if row["step"] <= completed_steps])

    def write(self, rows: list[dict]) -> None:
        self._file.writelines(json.dumps(row) + "\n" for row in rows)
        self._file.flush()


def read_metrics(path: Path) -> list[dict]:
    """The complete lines; a killed run may have left half a line at the end."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Progress:
    """A bar on a terminal, else a handful of plain lines; both with loss, tokens/s and the time left."""

    def __init__(self, total: int, completed_steps: int):
        self.total, self.first, self.step = total, completed_steps, completed_steps
        self.started = time.perf_counter()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=completed_steps, unit="step", dynamic_ncols=True)

    def update(self, row: dict) -> None:
        before, self.step = self.step, row["step"]
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s")
            self.bar.update(self.step - before)
        elif self.step * PLAIN_LINES // self.total > before * PLAIN_LINES // self.total:
            left = (time.perf_counter() - self.started) / (self.step - self.first) * (self.total - self.step)
            print(
                f"step {self.step}/{self.total}  loss {row['loss']:.4f}  "
                f"{row['tokens_per_s']:,} tokens/s  {left:.0f} s left",
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def unsharded_memory(numel: int, dtype: torch.dtype, policy: PrecisionPolicy, moments: int) -> dict[str, int]:
    """Bytes per kind, computed, with all state on one rank in the dtypes in use; moments: Lion 1, AdamW 2."""
    main_params_itemsize = {"own": 0, "none": 0, "split": 2, "fp32": 4}[policy.main_params_for(dtype)]
    return {
        "params": numel * dtype.itemsize,
        "main_params": numel * main_params_itemsize,
        "exp_avg": numel * policy.momentum_dtype_for(dtype).itemsize * moments,
        "grads": numel * dtype.itemsize,
    }


def memory_table(rows: dict[str, dict[str, int]], numel: int) -> str:
    """One line per row: bytes per parameter by kind and in total, and the total in MiB."""
    kinds = "".join(f"{kind:>12}" for kind in ("params", "main params", "momentum", "grads"))
    lines = [f"{'bytes per parameter':<34}{kinds}{'total':>8}{'MiB':>10}"]
    for label, row in rows.items():
        total = sum(row[kind] for kind in MEMORY_KINDS)
        cells = "".join(f"{row[kind] / numel:>12.2f}" for kind in MEMORY_KINDS)
        lines.append(f"{label:<34}{cells}{total / numel:>8.2f}{total / 2**20:>10.2f}")
    return "\n".join(lines)


def save_loss_curve(metrics_path: Path, held_out: dict[int, float], path: Path) -> None:
    """Draws the training loss of every step and the held-out losses {step: loss} into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics_path)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1, label="training")
    axes.plot(list(held_out), list(held_out.values()), "o", label="held-out text")
    axes.set(xlabel="step", ylabel="loss, nats per byte", title=path.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
