"""What a run has logged: ``metrics.jsonl`` of the programs in launch/, or ``trainer_state.json`` of a Trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path

from lion_dist import values
from lion_dist.cli.errors import UsageError

METRICS, SUMMARY, TRAINER_STATE = "metrics.jsonl", "summary.json", "trainer_state.json"
TRAINERS_WORDS = {"learning_rate": "lr", "eval_loss": "held_out_loss"}


def read_rows(folder: Path, columns: Collection[str]) -> list[dict]:
    """The rows of a run, each with its "step"; of ``columns`` every value is a number that can be drawn, or missing.

    Half a line at the end of metrics.jsonl, of a run that is going on, is left out. Losses on held-out text are rows of
    their own, with "held_out_loss".

    Raises:
        UsageError: no such folder or file, no whole line, or a line that is not JSON with a step.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder. Pass the --out folder of a run of launch/train.py, or a Trainer's."
        )
    if (folder / METRICS).is_file():
        path, rows = folder / METRICS, _read_metrics(folder / METRICS)
        rows += _held_out_of(folder / SUMMARY)
    else:
        path = _trainer_state_in(folder)
        rows = _read_trainer_state(path)
    for number, row in enumerate(rows, 1):
        for column in ("step", *columns):
            if not _can_be_drawn(row.get(column), may_miss=column != "step"):
                raise UsageError(
                    f'{path}, line {number}: "{column}" must be a number, got {values.shown(row[column])}. Delete the '
                    "line, or the run."
                )
    if not rows:
        raise UsageError(f"{path} has no line yet: the run has not come to its first --log-every steps.")
    return rows


def _read_metrics(path: Path) -> list[dict]:
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
        rows.append(row)
    return rows


def _held_out_of(path: Path) -> list[dict]:
    """The losses on held-out text that a run of launch/compare_engines.py has left in its summary."""
    if not path.is_file():
        return []
    summary = _read_json(path)
    held_out = summary.get("held_out") if isinstance(summary, dict) else None
    if not isinstance(held_out, dict) or not all(str(step).isdigit() for step in held_out):
        raise UsageError(f'{path} has no "held_out" by step: it is not of launch/compare_engines.py. Move it away.')
    return [{"step": int(step), "held_out_loss": loss} for step, loss in held_out.items()]


def _trainer_state_in(folder: Path) -> Path:
    """Of the folder itself, or of its checkpoint with the most steps."""
    checkpoints = [path for path in folder.glob(f"checkpoint-*/{TRAINER_STATE}") if path.parent.name[11:].isdigit()]
    found = [folder / TRAINER_STATE, *sorted(checkpoints, key=lambda path: -int(path.parent.name[11:]))]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        inside = sorted(child.parent.name for child in folder.glob(f"*/{METRICS}"))
        hint = (
            f"Did you mean {', '.join(str(folder / name) for name in inside)}?"
            if inside
            else f"launch/train.py writes it into its --out folder, and a Trainer {TRAINER_STATE}."
        )
        raise UsageError(f"{folder} has no metrics.jsonl. {hint}")
    return path


def _read_trainer_state(path: Path) -> list[dict]:
    state = _read_json(path)
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(row, dict) and "step" in row for row in history):
        raise UsageError(f'{path} has no "log_history" of rows with a step: it is not of a Trainer.')
    return [{TRAINERS_WORDS.get(key, key): value for key, value in row.items()} for row in history]


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}). Move it away, or write it anew.") from None


def _can_be_drawn(value: object, *, may_miss: bool) -> bool:
    """Whether a column is a number within what axes reach, or a gap: null, NaN, infinity."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return may_miss
    number = values.as_number(value)
    return number is not None and abs(number) <= values.FP32_MAX
