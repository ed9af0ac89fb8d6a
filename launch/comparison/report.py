"""What a training run leaves and shows: metrics in three forms, progress, the loss curve and the final table."""

import csv
import importlib.util
import json
import time
from pathlib import Path

import torch

from comparison.durable import replace_text
from lion_dist import PrecisionPolicy
from lion_dist.reporting import ProgressBar, aligned, duration, figure_into

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
        self.bar = ProgressBar("trained", total, "steps")
        self.bar(completed_steps)

    def update(self, row: dict) -> None:
        """`row` is the last of those written to metrics.jsonl."""
        before, self.step = self.step, row["step"]
        if self.bar.is_shown:
            self.bar(self.step - before, self._note(row))
        elif self.step * PLAIN_LINES // self.total > before * PLAIN_LINES // self.total:
            print(f"step {self.step}/{self.total}  {self._note(row)}", flush=True)

    def _note(self, row: dict) -> str:
        mfu = f"  MFU {row['mfu']:.1%}" if row.get("mfu") is not None else ""
        left = (time.perf_counter() - self.started) / (self.step - self.first) * (self.total - self.step)
        return f"loss {row['loss']:.4f}  {row['tokens_per_s']:,} tokens/s{mfu}  {duration(left)} left"

    def close(self) -> None:
        self.bar.__exit__()


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
    lines = [["bytes per parameter", "params", "main params", "momentum", "grads", "total", "MiB"]]
    for label, row in rows.items():
        total = sum(row[kind] for kind in MEMORY_KINDS)
        cells = [*(row[kind] / numel for kind in MEMORY_KINDS), total / numel, total / 2**20]
        lines.append([label, *(f"{cell:.2f}" for cell in cells)])
    return aligned(lines)


def save_loss_curve(metrics_path: Path, held_out: dict[int, float], path: Path) -> None:
    """Draws the training loss of every step and the held-out losses {step: loss} into a PNG."""
    rows = read_metrics(metrics_path)
    with figure_into(path, size=(7, 4)) as (_, ((axes,),)):
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
        axes.plot(list(held_out), list(held_out.values()), "o", label="held-out text")
        axes.set(xlabel="step", ylabel="loss, nats per byte", title=path.parent.name)
        axes.legend()
