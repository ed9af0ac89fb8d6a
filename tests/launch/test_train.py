"""launch/train.py as a user starts it: torchrun on CPUs with a tiny model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import train as train_program

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
TINY = "--layers 1 --dim 16 --heads 2 --seq-len 16 --batch-size 8 --warmup 2 --lr 1e-2".split()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(500)))
    return path


def run(ranks: int, *flags: object) -> subprocess.CompletedProcess:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*start, str(TRAIN), *TINY, *map(str, flags)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        printed, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers; killing torchrun would leave them running
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, printed, errors)


def train(ranks: int, out: Path, *flags: object) -> list[dict]:
    """Runs it to the end and returns the lines of metrics.jsonl."""
    result = run(ranks, "--out", out, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict]) -> list[tuple]:
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="session")
def sharded(text, tmp_path_factory):
    """Twelve steps of ShardedLion on two ranks, never stopped; a checkpoint every five."""
    out = tmp_path_factory.mktemp("sharded")
    result = run(2, "--data", text, "--steps", 12, "--checkpoint-every", 5, "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


def test_sharded_run_learns_and_leaves_its_results(sharded):
    out, printed = sharded
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(math.isfinite(row["grad_norm"]) and row["tokens_per_s"] > 0 for row in rows)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out"]["12"] < summary["held_out"]["0"] - 0.5
    assert summary["skipped_steps"] == 0
    assert (out / "loss-curve.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "latest").read_text() == "step-000012" and (out / "step-000012").exists()
    assert "full parameters bit-identical on all ranks: yes" in printed


def test_table_shows_each_rank_with_its_share_of_the_momentum(sharded):
    out, printed = sharded
    summary = json.loads((out / "summary.json").read_text())
    memory, numel = summary["memory_bytes"], summary["numel"]
    assert all(label in printed for label in memory)
    ranks = [memory["rank 0, sharded"], memory["rank 1, sharded"]]
    unsharded = memory["unsharded Lion (computed)"]
    assert unsharded == {"params": 4 * numel, "main_params": 0, "exp_avg": 4 * numel, "grads": 4 * numel}
    assert memory["unsharded AdamW (computed)"]["exp_avg"] == 8 * numel
    padding = 1024  # bytes by which a bucket may be rounded up
    assert 4 * numel <= sum(rank["exp_avg"] for rank in ranks) <= 4 * numel + 8 * padding
    assert max(rank["exp_avg"] for rank in ranks) <= 4 * numel / 2 + 4 * padding


def test_resumed_run_repeats_the_losses_of_one_never_stopped(sharded, text, tmp_path):
    """As after a kill at step 7, whose checkpoint of step 5 is the last complete one."""
    out, _ = sharded
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "step-000005").symlink_to(out / "step-000005")
    (stopped / "latest").write_text("step-000005")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    rows = train(2, stopped, "--engine", "sharded", "--data", text, "--steps", 12, "--resume")
    assert losses(rows) == losses([json.loads(line) for line in lines])
    uninterrupted = json.loads((out / "summary.json").read_text())["held_out"]
    assert json.loads((stopped / "summary.json").read_text())["held_out"]["12"] == uninterrupted["12"]


def test_two_ranks_see_the_data_of_one(sharded, text, tmp_path):
    """The first loss is of the same weights and windows; later ones differ by the rounding of gradients."""
    rows = train(1, tmp_path, "--engine", "plain", "--data", text, "--steps", 12)
    two_ranks = [json.loads(line) for line in (sharded[0] / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(two_ranks[0]["loss"], rel=1e-6)
    assert [row["lr"] for row in rows] == [row["lr"] for row in two_ranks]
    assert rows[-1]["loss"] == pytest.approx(two_ranks[-1]["loss"], rel=0.05)


@pytest.mark.parametrize(
    "flags",
    [
        "--engine sharded --zero-stage 1 --micro-batches 2 --precision bf16 --momentum-dtype fp32",
        "--engine ddp --micro-batches 2 --precision bf16",
    ],
    ids=["zero-1", "ddp"],
)
def test_accumulation_in_bf16_on_two_ranks(flags, text, tmp_path):
    rows = train(2, tmp_path, *flags.split(), "--data", text, "--steps", 4)
    assert rows[-1]["loss"] < rows[0]["loss"]
    memory = json.loads((tmp_path / "summary.json").read_text())["memory_bytes"]
    assert all(size["main_params"] > 0 for label, size in memory.items() if label.startswith("rank"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data nowhere", "no such file or folder: nowhere. Pass --data PATH"),
        ("--batch-size 7 --micro-batches 2", "--batch-size 7 does not divide among 1 ranks x 2"),
        ("--dim 18 --heads 4", "--dim must be a multiple of 2 * --heads"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--resume", "--resume found no checkpoint in"),
        ("--zero-stage 3", "fully_shard"),
    ],
)
def test_bad_input_exits_with_2_and_sets_up_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), "--out", str(tmp_path / "run")])
    assert train_program.main() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not dist.is_initialized()


def test_bad_data_path_is_said_once_by_two_ranks(tmp_path):
    result = run(2, "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert result.returncode != 0
    assert result.stderr.count(f"no such file or folder: {tmp_path / 'nowhere'}. Pass --data PATH") == 1
    assert "exitcode  : 2" in result.stderr


def test_plain_engine_refuses_two_ranks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--engine", "plain"])
    monkeypatch.setattr(train_program, "WORLD_SIZE", 2)
    assert train_program.main() == 2
    printed = capsys.readouterr().err
    assert "--engine plain trains in one process" in printed and "--engine ddp" in printed


def test_default_batch_divides_among_any_number_of_ranks(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--micro-batches", "2"])
    for world_size, batch_size in [(1, 8), (2, 8), (3, 12), (6, 12), (8, 16)]:
        monkeypatch.setattr(train_program, "WORLD_SIZE", world_size)
        assert train_program.parse_arguments().batch_size == batch_size
