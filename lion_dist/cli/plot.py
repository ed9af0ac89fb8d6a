"""``lion-dist plot``: the curves of several runs in one picture."""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
from pathlib import Path

from lion_dist.cli.errors import UsageError
from lion_dist.cli.run_logs import read_rows
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
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def add_parser(verbs) -> None:
    parser = verbs.add_parser(
        "plot",
        help="loss, norms, learning rate and throughput of several runs, into one PNG",
        description="Draws several runs into one PNG, one line a run: metrics.jsonl of the programs in launch/, with "
        "the held-out losses of summary.json, or trainer_state.json of a Hugging Face Trainer.",
        epilog="Example: lion-dist plot runs/sharded runs/ddp --out runs.png",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, with its log")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="draw the loss as a mean of N logged values")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help="the picture (runs.png)")
    parser.set_defaults(run=run)


def run(args) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plot needs matplotlib, which is not installed: pip install matplotlib")
    if args.out.suffix != ".png":
        raise UsageError(f"--out {args.out} must end in .png")
    if args.smooth < 1:
        raise UsageError(f"--smooth must be at least 1, got {args.smooth}. Pass how many values a mean is of.")
    rows = {name: read_rows(folder, (*PANELS, "held_out_loss")) for name, folder in _names(args.runs).items()}
    draw(rows, args.out, args.smooth)
    counts = {name: sum("held_out_loss" not in row for row in found) for name, found in rows.items()}
    steps = ", ".join(f"{name} {count} steps" for name, count in counts.items())
    print(f"{args.out}: {steps}")
    return 0


def _names(folders: list[Path]) -> dict[str, Path]:
    """Each folder under its own name, or its path where two have the same."""
    names = [Path(os.path.realpath(folder)).name for folder in folders]  # resolve() raises where links form a ring
    return {str(f) if names.count(n) > 1 else n: f for f, n in zip(folders, names, strict=True)}


def panels_of(rows: dict[str, list[dict]]) -> list[str]:
    """The columns to draw: the first four, and the others that some run has."""
    logged = {key for found in rows.values() for row in found for key in row}
    return [name for i, name in enumerate(PANELS) if i < ALWAYS or name in logged]


def draw(rows: dict[str, list[dict]], path: Path, smooth: int = 1) -> None:
    """One panel a column, one line a run. ``smooth``: how many logged values the line of a loss is the mean of."""
    panels = panels_of(rows)
    labels = {name: name.encode(errors="backslashreplace").decode().replace("$", r"\$") for name in rows}
    lines = -(-len(panels) // COLUMNS)
    with figure_into(path, lines, COLUMNS, size=(5 * COLUMNS, 3 * lines)) as (figure, grid):
        for axes, panel in zip(grid.flat, panels, strict=False):
            for i, (name, found) in enumerate(rows.items()):
                _draw_run(axes, found, panel, i, len(rows), labels[name], smooth)
            _set_axes(axes, panel)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        if len(rows) == 1:
            ((name, found),) = rows.items()
            figure.suptitle(f"{labels[name]}: {title_of(found)}")
        grid.flat[0].legend()


def _draw_run(axes, found: list[dict], panel: str, i: int, runs: int, label: str, smooth: int) -> None:
    """Later lines are thinner and broken: where two runs agree to the bit, both are seen."""
    color, style = f"C{i % 10}", {"linewidth": 1.2 + 1.6 * (runs - 1 - i) / runs, "linestyle": STYLES[i % len(STYLES)]}
    steps, logged = _points(found, panel)
    if panel == "loss":
        if smooth > 1 and logged:
            axes.plot(steps, logged, linewidth=0.6, alpha=0.3, color=color)
            logged = running_mean(logged, smooth)
        held_out = _points(found, "held_out_loss")
        if held_out[0]:
            axes.plot(*held_out, "o", markersize=5, color=color, label=f"{label}, held out")
    axes.plot(steps, logged, color=color, label=label, **style)


def _points(found: list[dict], column: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[column]) for row in found if row.get(column) is not None]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(logged: list[float], count: int) -> list[float]:
    """The mean of each value and up to ``count - 1`` before it; those that are not finite do not count."""
    means = []
    for i in range(len(logged)):
        part = [x for x in logged[max(0, i + 1 - count) : i + 1] if math.isfinite(x)]
        means.append(sum(part) / len(part) if part else math.nan)
    return means


def _set_axes(axes, panel: str) -> None:
    label, logarithmic = PANELS[panel]
    drawn = [y for line in axes.lines for y in line.get_ydata() if math.isfinite(y)]
    if logarithmic and max(drawn, default=0) > 0:
        axes.set_yscale("log")
    elif drawn and min(drawn) == max(drawn):  # an axis around a constant would show a millionth of it
        axes.set_ylim(*sorted((0.0, 1.2 * drawn[0])) if drawn[0] else (0.0, 1.0))
    axes.set(xlabel="step", ylabel=label)


def title_of(found: list[dict]) -> str:
    """What was run, in a line: steps, losses, throughput."""
    steps, losses = _points(found, "loss")
    _, held_out = _points(found, "held_out_loss")
    _, rates = _points(found, "tokens_per_s")
    parts = [f"{max(row['step'] for row in found):g} steps"]
    if losses:
        parts.append(f"loss {losses[0]:.4g} to {losses[-1]:.4g}")
    if held_out:
        parts.append(f"held out {held_out[-1]:.4g}")
    if rates:
        parts.append(f"{statistics.median(rates):,.0f} tokens/s")
    return ", ".join(parts)
