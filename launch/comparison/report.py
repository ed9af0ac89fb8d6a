"""What a training run leaves and shows: metrics in three forms, progress, the loss curve and the final table."""

import csv
import importlib.util
import json
import sys
import time
from pathlib import Path

import torch

from comparison.durable import replace_text
from lion_dist import PrecisionPolicy

# What a run leaves beside its checkpoints.
RESULTS = ("metrics.jsonl", "metrics.csv", "tensorboard", "summary.json", "loss-curve.png")
PLAIN_LINES = 10  # progress lines of a whole run when nobody watches a terminal
MEMORY_KINDS = ("params", "main_params", "exp_avg", "grads")


class Metrics:
    """metrics.jsonl and metrics.csv, and TensorBoard's events where it is installed: one row per step.

    Rows may have different keys: a new one becomes a new column of the csv. A resumed run drops the rows after its
    checkpoint from all three and goes on. metrics.jsonl is written first, and the csv made from it.
    """

    def __init__(self, path: Path, completed_steps: int):
        rows = read_metrics(path) if completed_steps else []
        rows = [row for row in rows if row["step"] <= completed_steps]
        self._path, self._csv_path = path, path.with_suffix(".csv")
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")
        self._columns = columns_of(rows)
        self._make_csv(rows)
        self._tensorboard = _tensorboard_writer(path.parent / "tensorboard", completed_steps)
        also = "TensorBoard's events" if self._tensorboard else "no TensorBoard (pip install tensorboard)"
        print(f"metrics in {path.parent}: {path.name}, {self._csv_path.name}, {also}", flush=True)

    def write(self, rows: list[dict]) -> None:
        self._file.writelines(json.dumps(row) + "\n" for row in rows)
        self._file.flush()
        columns = columns_of(rows)
        if columns.keys() <= self._columns.keys():
            self._append_to_csv(rows)
        else:
            self._columns |= columns
            self._csv_file.close()
            self._make_csv(read_metrics(self._path))
        if self._tensorboard is not None:
            for row in rows:
                for name, value in flat_row(row).items():
                    if name != "step" and isinstance(value, int | float):
                        self._tensorboard.add_scalar(name, value, row["step"])
            self._tensorboard.flush()  # a killed run keeps what it has logged

    def _make_csv(self, rows: list[dict]) -> None:
        replace_text(self._csv_path, "")
        self._csv_file = self._csv_path.open("a", newline="")
        if self._columns:
            csv.DictWriter(self._csv_file, self._columns).writeheader()
        self._append_to_csv(rows)

    def _append_to_csv(self, rows: list[dict]) -> None:
        writer = csv.DictWriter(self._csv_file, self._columns, restval="")
        writer.writerows(flat_row(row) for row in rows)
        self._csv_file.flush()


def _tensorboard_writer(folder: Path, completed_steps: int):
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    # The steps of an earlier run from here on are hidden by the viewer.
    return SummaryWriter(str(folder), purge_step=completed_steps + 1)


def read_metrics(path: Path) -> list[dict]:
    """The complete lines; a killed run may have left half a line at the end."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def flat_row(row: dict) -> dict:
    """A row for a table: {"ms": {"update": 1}} becomes {"ms.update": 1}, a list its JSON text."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in flat_row(value).items()}
        else:
            flat[key] = json.dumps(value) if isinstance(value, list) else value
    return flat


def columns_of(rows: list[dict]) -> dict[str, None]:
    """The columns of some rows, in the order in which they come: an ordered set."""
    return dict.fromkeys(name for row in rows for name in flat_row(row))


class Progress:
    """A bar on a terminal, else a handful of plain lines; both with loss, tokens/s, MFU and the time left."""

    def __init__(self, total: int, completed_steps: int):
        self.total, self.first, self.step = total, completed_steps, completed_steps
        self.started = time.perf_counter()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=completed_steps, unit="step", dynamic_ncols=True)

    def update(self, row: dict) -> None:
        """`row` is the last of those written to metrics.jsonl."""
        before, self.step = self.step, row["step"]
        mfu = f"  MFU {row['mfu']:.1%}" if row.get("mfu") is not None else ""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s{mfu}")
            self.bar.update(self.step - before)
        elif self.step * PLAIN_LINES // self.total > before * PLAIN_LINES // self.total:
            left = (time.perf_counter() - self.started) / (self.step - self.first) * (self.total - self.step)
            print(
                f"step {self.step}/{self.total}  loss {row['loss']:.4f}  "
                f"{row['tokens_per_s']:,} tokens/s{mfu}  {duration(left)} left",
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """ "8 s", "12 min", "3 h 05 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


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
