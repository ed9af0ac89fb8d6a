"""What a run leaves behind: rows in three forms that agree, also after a kill and a resume."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from comparison import report
from comparison.report import Metrics, Progress, read_metrics
from comparison.throughput import Throughput, flops_per_token, peak_flops, peak_of


def rows(*steps: int, **more) -> list[dict]:
    return [{"step": step, "loss": 1.0 / step} | more for step in steps]


def in_csv(folder: Path) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """Without TensorBoard, whose import takes a moment."""
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    return tmp_path / "metrics.jsonl"


def test_json_lines_and_csv_hold_the_same_rows(path):
    metrics = Metrics(path, 0)
    metrics.write(rows(1, 2))
    metrics.write(rows(3))
    assert read_metrics(path) == rows(1, 2, 3)
    assert [(int(r["step"]), float(r["loss"])) for r in in_csv(path.parent)] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_new_keys_become_new_columns(path):
    """The optimizer's metrics come every so many steps, with nested and listed values."""
    metrics = Metrics(path, 0)
    metrics.write(rows(1))
    metrics.write(rows(2, lost_share=0.5, ms_by_phase={"update": 3, "norm": 4}, rank_ms=[1, 2]))
    metrics.write(rows(3))
    found = in_csv(path.parent)
    assert list(found[0]) == ["step", "loss", "lost_share", "ms_by_phase.update", "ms_by_phase.norm", "rank_ms"]
    assert [r["lost_share"] for r in found] == ["", "0.5", ""]
    assert (found[1]["ms_by_phase.norm"], found[1]["rank_ms"]) == ("4", "[1, 2]")
    assert read_metrics(path)[1]["ms_by_phase"] == {"update": 3, "norm": 4}


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(path):
    Metrics(path, 0).write(rows(1, 2, 3, 4, mfu=0.4))
    metrics = Metrics(path, 2)
    assert [r["step"] for r in in_csv(path.parent)] == ["1", "2"]
    metrics.write(rows(3, 4, 5))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert [(r["step"], r["mfu"]) for r in in_csv(path.parent)] == [
        ("1", "0.4"), ("2", "0.4"), ("3", ""), ("4", ""), ("5", "")
    ]  # fmt: skip


def test_half_a_last_line_of_a_killed_run_is_dropped_from_both(path):
    Metrics(path, 0).write(rows(1, 2, 3))
    for name in ("metrics.jsonl", "metrics.csv"):
        whole = path.with_name(name).read_text()
        path.with_name(name).write_text(whole[:-5])
    Metrics(path, 3).write(rows(3, 4))
    assert read_metrics(path) == rows(1, 2, 3, 4)
    assert [int(r["step"]) for r in in_csv(path.parent)] == [1, 2, 3, 4]


def test_a_run_from_the_beginning_keeps_nothing_of_an_earlier_one(path):
    Metrics(path, 0).write(rows(1, 2))
    Metrics(path, 0)
    assert path.read_text() == "" and (path.parent / "metrics.csv").read_text() == ""


def test_a_kill_while_rows_are_being_dropped_loses_none(path, monkeypatch):
    Metrics(path, 0).write(rows(1, 2))

    def kill(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        Metrics(path, 1)
    assert read_metrics(path) == rows(1, 2)


def test_it_says_once_what_it_writes(path, capsys):
    metrics = Metrics(path, 0)
    metrics.write(rows(1))
    printed = capsys.readouterr().out
    also = "no TensorBoard (pip install tensorboard)"
    assert printed == f"metrics in {path.parent}: metrics.jsonl, metrics.csv, {also}\n"


def test_tensorboard_gets_every_number_and_hides_the_steps_of_before(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "metrics.jsonl"
    Metrics(path, 0).write(rows(1, 2, 3))
    assert "TensorBoard's events" in capsys.readouterr().out
    Metrics(path, 1).write(rows(2, ms_by_phase={"norm": 4}, rank_ms=[1]))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert [e.value for e in events.Scalars("ms_by_phase.norm")] == [4.0]
    assert "rank_ms" not in events.Tags()["scalars"] and "step" not in events.Tags()["scalars"]


def test_progress_shows_loss_speed_and_time_left(capsys, monkeypatch):
    now = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    progress = Progress(total=100, completed_steps=80)
    progress.update({"step": 85, "loss": 2.0, "tokens_per_s": 12345})  # no tenth of the run yet
    progress.update({"step": 90, "loss": 1.5, "tokens_per_s": 12345, "mfu": 0.4})
    assert capsys.readouterr().out == "step 90/100  loss 1.5000  12,345 tokens/s  MFU 40.0%  10 s left\n"


# ---- throughput


def test_mfu_is_the_share_of_the_peak_of_all_ranks():
    """Llama 2 7B at 4,096 tokens: 6 N + 12 * 32 * 4096 * 4096 = 46.9 GFLOPs a token."""
    flops = flops_per_token(6_738_415_616, layers=32, dim=4096, seq_len=4096)
    assert flops == 6 * 6_738_415_616 + 12 * 32 * 4096 * 4096
    throughput = Throughput(tokens_per_step=8 * 4096, flops_per_token=flops, ranks=8, peak=989e12)
    columns = throughput.columns(steps=10, seconds=5.0)
    assert columns["tokens_per_s"] == 65_536 and columns["seconds"] == 0.5
    assert columns["mfu"] == pytest.approx(65_536 * flops / (8 * 989e12))


def test_no_known_peak_leaves_mfu_out():
    assert set(Throughput(8, 100, 1, peak=None).columns(1, 1.0)) == {"tokens_per_s", "seconds"}
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA GH200 480GB", 989),
        ("Radeon", None),
    ],
)
def test_gpus_are_known_by_their_names(name, tflops):
    assert peak_of(name) == (None if tflops is None else tflops * 1e12)


def test_a_runs_csv_is_its_json_lines(tmp_path):
    """A row as train.py makes it goes through csv and back unchanged."""
    folder = tmp_path / "run"
    folder.mkdir()
    row = {"step": 1, "loss": 5.4, "lr": 1e-3, "grad_norm": 0.1, "tokens_per_s": 10, "seconds": 0.25}
    Metrics(folder / "metrics.jsonl", 0).write([row])
    assert {key: json.loads(value) for key, value in in_csv(folder)[0].items()} == row
