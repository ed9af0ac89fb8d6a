"""``lion-dist plot``: the curves of several runs of ``launch/train.py`` in one picture."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

from lion_dist import values
from lion_dist.cli.errors import UsageError
from lion_dist.reporting import figure_into

# What has a panel when any run logged it: {column: (label, logarithmic axis)}; the first four always have.
PANELS = {
    "loss": ("loss", False),
    "grad_norm": ("gradient norm before clipping", True),
    "lr": ("learning rate", False),
    "tokens_per_s": ("tokens/s", False),
    "mfu": ("model FLOPs utilization", False),
    "update_ratio": ("update norm / parameter norm", True),
    "exp_avg_norm": ("momentum norm", True),
    "flipped_share": ("share of signs that flipped", False),
    "agreement_share": ("share where update and gradient agree", False),
    "zero_share": ("share of updates that are zero", False),
    "lost_share": ("share of updates lost to rounding", False),
    "skipped_steps": ("skipped steps", False),
}
ALWAYS = 4
COLUMNS = 3


def add_parser(verbs) -> None:
    parser = verbs.add_parser(
        "plot",
        help="loss, norms, learning rate and throughput of several runs, into one PNG",
        description="Draws metrics.jsonl of several runs of launch/train.py into one PNG, one line a run.",
        epilog="Example: lion-dist plot runs/sharded runs/ddp --out runs.png",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with metrics.jsonl (--out of a run)")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help="the picture (runs.png)")
    parser.set_defaults(run=run)


def run(args) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plot needs matplotlib, which is not installed: pip install matplotlib")
    if args.out.suffix != ".png":
        raise UsageError(f"--out {args.out} must end in .png")
    rows = {name: read_rows(folder) for name, folder in _names(args.runs).items()}
    draw(rows, args.out)
    steps = ", ".join(f"{name} {len(found)} steps" for name, found in rows.items())
    print(f"{args.out}: {steps}")
    return 0


def _names(folders: list[Path]) -> dict[str, Path]:
    """Each folder under its own name, or its path where two have the same."""
    names = [Path(os.path.realpath(folder)).name for folder in folders]  # resolve() raises where links form a ring
    return {str(f) if names.count(n) > 1 else n: f for f, n in zip(folders, names, strict=True)}


def read_rows(folder: Path) -> list[dict]:
    """The whole lines of ``folder/metrics.jsonl``; half a line at the end, of a run that is going on, is left out.

    Raises:
        UsageError: no such folder or file, no whole line, or a line that is not JSON with a step.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder. Pass the --out folder of a run of launch/train.py.")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        inside = sorted(child.parent.name for child in folder.glob("*/metrics.jsonl"))
        hint = (
            f"Did you mean {', '.join(str(folder / name) for name in inside)}?"
            if inside
            else ("launch/train.py writes it into its --out folder.")
        )
        raise UsageError(f"{folder} has no metrics.jsonl. {hint}")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number} is not JSON ({error}). Delete the line, or the run.") from None
        if not isinstance(row, dict) or "step" not in row:
            raise UsageError(f'{path}, line {number} has no "step": it is not of launch/train.py.')
        for column in ("step", *PANELS):
            if not _can_be_drawn(row.get(column), may_miss=column != "step"):
                raise UsageError(
                    f'{path}, line {number}: "{column}" must be a number, got {values.shown(row[column])}. Delete the '
                    "line, or the run."
                )
        rows.append(row)
    if not rows:
        raise UsageError(f"{path} has no line yet: the run has not come to its first --log-every steps.")
    return rows


def _can_be_drawn(value: object, *, may_miss: bool) -> bool:
    """Whether a column is a number within what axes reach, or a gap: null, NaN, infinity."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return may_miss
    number = values.as_number(value)
    return number is not None and abs(number) <= values.FP32_MAX


def panels_of(rows: dict[str, list[dict]]) -> list[str]:
    """The columns to draw: the first four, and the others that some run has."""
    logged = {key for found in rows.values() for row in found for key in row}
    return [name for i, name in enumerate(PANELS) if i < ALWAYS or name in logged]


def draw(rows: dict[str, list[dict]], path: Path) -> None:
    panels = panels_of(rows)
    labels = {name: name.encode(errors="backslashreplace").decode().replace("$", r"\$") for name in rows}
    lines = -(-len(panels) // COLUMNS)
    with figure_into(path, lines, COLUMNS, size=(5 * COLUMNS, 3 * lines)) as (_, grid):
        for axes, panel in zip(grid.flat, panels, strict=False):
            label, logarithmic = PANELS[panel]
            for name, found in rows.items():
                points = [(row["step"], row[panel]) for row in found if row.get(panel) is not None]
                axes.plot(*zip(*points, strict=True) if points else ([], []), alpha=0.8, label=labels[name])
            if logarithmic and any(line.get_ydata().max(initial=0) > 0 for line in axes.lines if len(line.get_ydata())):
                axes.set_yscale("log")
            axes.set(xlabel="step", ylabel=label)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        grid.flat[0].legend()
