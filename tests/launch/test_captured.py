"""``launch/train.py --cuda-graph`` on CPUs: what the program does around a graph; on GPUs see test_captured_gpu."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

import train
from tests.launch import jobs

STEPS = 6


class InPlace:
    """Takes the place of ``CapturedStep``: eager steps, of which each overwrites what the one before has returned."""

    def __init__(self, step, optimizer):
        assert all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
        self._step, self._result = step, torch.zeros(2)

    def __call__(self, windows: Tensor) -> Tensor:
        return self._result.copy_(self._step(windows))


def run(cuda_graph: bool, text: Path, out: Path, *flags: str) -> list[Tensor]:
    """The whole program but for its beginning and end, in this process. Returns the trained parameters."""
    argv = ["train.py", *jobs.TINY, "--data", text, "--out", out, "--steps", STEPS, "--checkpoint-every", 3, *flags]
    signals = SimpleNamespace(signal=lambda *_: None, SIGUSR1=1, SIGTERM=2)  # this process has handlers of its own
    with mock.patch.object(sys, "argv", list(map(str, argv))), mock.patch.object(train, "signal", signals):
        args = train.parse_arguments()
    args.cuda_graph = cuda_graph  # parse_arguments() would refuse it here
    with mock.patch.object(train, "CapturedStep", InPlace), mock.patch.object(train, "signal", signals):
        training = train.Training(args, torch.device("cpu"))
        training.train(train.read_corpus(args.data, args.seq_len)[0], training.begin())
    training.optimizer.finish_param_sync()
    return [param.detach().clone() for param in training.model.parameters()]


def settings_of(checkpoint: Path) -> dict:
    """The scheduler's state and the param groups, as they were saved."""
    entries = json.loads((checkpoint / "lion_dist.json").read_text())
    return {"scheduler": entries["extra"]["scheduler"], "param_groups": entries["param_groups"]}


def compare(text: Path, folder: Path, flags: tuple[str, ...]) -> None:
    eager, captured = folder / "eager", folder / "captured"
    params = [run(False, text, eager, *flags), run(True, text, captured, *flags)]
    assert all(map(torch.equal, *params))
    assert len(jobs.losses(eager)) == STEPS and jobs.losses(captured) == jobs.losses(eager)
    for step in ("step-000003", "step-000006"):
        assert settings_of(captured / step) == settings_of(eager / step)


@pytest.mark.parametrize("flags", [(), ("--clip", "0", "--micro-batches", "2", "--zero-stage", "1")])
def test_a_learning_rate_on_the_device_has_the_bits_of_a_float(gloo, text, tmp_path, flags):
    """In the weights, the log and the checkpoints; and what the log holds is each step's, though all use one memory."""
    gloo.run(1, compare, text, tmp_path, flags)


def go_on(text: Path, folder: Path) -> None:
    first = {mode: run(mode, text, folder / f"from {mode}") for mode in (False, True)}
    for mode in (False, True):
        out = folder / f"on {mode}"
        out.mkdir()
        (out / "step-000003").symlink_to(folder / f"from {not mode}" / "step-000003")
        lines = (folder / f"from {not mode}" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(lines[:3]))
        assert all(map(torch.equal, run(mode, text, out, "--resume", "auto"), first[mode]))
        assert jobs.losses(out) == jobs.losses(folder / f"from {mode}")


def test_a_run_goes_on_with_the_flag_from_a_checkpoint_without_it_and_the_reverse(gloo, text, tmp_path):
    gloo.run(1, go_on, text, tmp_path)


def test_without_a_gpu_the_flag_is_refused_with_the_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--cuda-graph", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        train.main()
    message = "torch.cuda.is_available() is False, and --cuda-graph needs a GPU: leave the flag out on CPUs"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
