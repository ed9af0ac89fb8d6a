"""The rows that compare_engines.py writes: what is in them, where the optimizer's metrics come, and after a resume."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compare_engines
from tests import preloaded

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "compare_engines.py"
TINY = "--engine sharded --layers 1 --dim 16 --heads 2 --seq-len 16 --batch-size 8 --warmup 2 --lr 1e-2".split()


def train(text: Path, out: Path, *flags: object) -> tuple[list[dict], str]:
    """On one process; returns the rows of metrics.jsonl, and what was printed."""
    command = [preloaded.python(), str(TRAIN), *TINY, "--data", str(text), "--out", str(out), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], done.stdout


FLAGS = "--log-every 4 --metrics-every 2 --peak-tflops 0.1 --checkpoint-every 3".split()


@pytest.fixture(scope="module")
def first_run(text, once):
    return once("logged", lambda out: (out, *train(text, out, "--steps", 7, *FLAGS)))


def csv_of(out: Path) -> list[dict]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_carry_speed_and_every_so_many_the_optimizers_metrics(first_run):
    out, rows, printed = first_run
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert all(row["seconds"] > 0 and 0 < row["mfu"] < 1 and row["tokens_per_s"] > 0 for row in rows)
    # Logged after steps 3 (a checkpoint), 4, 6 and 7.
    assert [row["step"] for row in rows if "update_ratio" in row] == [2, 4, 6]
    assert printed.count("metrics in") == 1 and " left" in printed and "MFU" in printed
    assert [float(row["loss"]) for row in csv_of(out)] == [row["loss"] for row in rows]
    assert [row["update_ratio"] for row in csv_of(out)].count("") == 4


def test_a_resumed_run_drops_rows_and_goes_on_in_both_files(first_run, text, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(first_run[0], out)
    shutil.rmtree(out / "step-000007")  # killed after step 7's rows, before its checkpoint
    rows, _ = train(text, out, "--steps", 8, "--resume", *FLAGS)
    assert [row["step"] for row in rows] == [int(row["step"]) for row in csv_of(out)] == list(range(1, 9))
    assert rows[:6] == first_run[1][:6]
    assert "update_ratio" in rows[7]  # measured steps count from the resumed step 6


@pytest.mark.parametrize("flags", ["--metrics-every -1", "--engine deepspeed --metrics-every 5"])
def test_metrics_that_no_engine_gives_are_refused(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_engines.py", *flags.split(), "--out", str(tmp_path / "run")])
    assert compare_engines.main() == 2
    assert "--metrics-every must be 0 with --engine deepspeed" in capsys.readouterr().err
