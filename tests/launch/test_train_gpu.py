"""launch/train.py as a user starts it on GPUs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lion_dist import checkpoint
from tests.launch import jobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ON_GPUS = {key: value for key, value in jobs.ENVIRONMENT.items() if key != "CUDA_VISIBLE_DEVICES"}
ON_GPUS |= {key: os.environ[key] for key in ("CUDA_VISIBLE_DEVICES",) if key in os.environ}
RUN = [*jobs.TINY, "--precision", "bf16", "--micro-batches", "2", "--steps", "16", "--checkpoint-every", "6"]


def train(out: Path, *flags: str) -> list[dict]:
    """The rows of a run on all GPUs."""
    data = ["--data", str(Path(jobs.__file__).parent)]
    command = jobs.torchrun(torch.cuda.device_count(), jobs.TRAIN, *RUN, *data, "--out", out, *flags)
    done = jobs.finish(jobs.start(command, ON_GPUS))
    assert done.returncode == 0, done.stdout
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_captured_run_learns_saves_and_resumes_in_a_graph(tmp_path):
    """Its checkpoints are whole, though parameters are stale between replays, and a resumed run repeats its losses."""
    whole = train(tmp_path / "whole", "--cuda-graph")
    assert [row["step"] for row in whole] == list(range(1, 17))
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.5
    assert whole[1]["lr"] == pytest.approx(0.01) and whole[-1]["lr"] < 0.002  # the schedule, read on the device
    stopped = tmp_path / "stopped"
    (tmp_path / "whole").rename(stopped)
    for path in [stopped / f"step-{step:06d}" for step in (12, 16)]:
        path.rename(tmp_path / path.name)
    assert checkpoint.newest(stopped, verified=True).name == "step-000006"
    again = train(stopped, "--cuda-graph", "--resume", "auto")
    assert [(row["loss"], row["grad_norm"]) for row in again] == [(row["loss"], row["grad_norm"]) for row in whole]


def test_a_captured_run_has_the_losses_of_an_eager_one(tmp_path):
    """Within what an fp32 learning rate on the device differs from a Python float."""
    rows = [train(tmp_path / name, *flags) for name, flags in (("eager", ()), ("graph", ("--cuda-graph",)))]
    for eager, captured in zip(*rows, strict=True):
        assert captured["loss"] == pytest.approx(eager["loss"], rel=2e-2)
