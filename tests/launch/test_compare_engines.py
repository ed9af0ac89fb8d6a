"""launch/compare_engines.py as a user starts it: torchrun on CPUs with a tiny model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import compare_engines
import train as program
from comparison import arguments
from tests import preloaded
from tests.launch import jobs


def run(ranks: int, *flags: object) -> subprocess.CompletedProcess:
    program = [jobs.COMPARE, *jobs.TINY, *flags]
    return jobs.run(jobs.torchrun(ranks, *program) if ranks > 1 else [preloaded.python(), *map(str, program)])


def train(ranks: int, out: Path, *flags: object) -> list[dict]:
    """Runs it to the end and returns the lines of metrics.jsonl."""
    result = run(ranks, "--out", out, *flags)
    assert result.returncode == 0, result.stdout
    return jobs.rows(out)


def test_sharded_run_learns_and_leaves_its_results(sharded):
    out, printed = sharded
    rows = jobs.rows(out)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(math.isfinite(row["grad_norm"]) and row["tokens_per_s"] > 0 for row in rows)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out"]["12"] < summary["held_out"]["0"] - 0.5
    assert summary["skipped_steps"] == 0
    assert (out / "loss-curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000005", "step-000010", "step-000012"]
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


@pytest.mark.slow
def test_resumed_run_repeats_the_losses_of_one_never_stopped(sharded, text, tmp_path):
    """As after a kill at step 7, whose checkpoint of step 5 is the last complete one."""
    out, _ = sharded
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "step-000005").symlink_to(out / "step-000005")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    train(2, stopped, "--engine", "sharded", "--data", text, "--steps", 12, "--resume")
    assert jobs.losses(stopped) == jobs.losses(out)
    uninterrupted = json.loads((out / "summary.json").read_text())["held_out"]
    assert json.loads((stopped / "summary.json").read_text())["held_out"]["12"] == uninterrupted["12"]


def test_loss_curve_continues_on_another_number_of_ranks(sharded, text, tmp_path):
    """Two ranks until step 5, then one. Gradients are summed in another order, so the last bits may differ."""
    out, _ = sharded
    (tmp_path / "step-000005").symlink_to(out / "step-000005")
    result = run(1, "--data", text, "--steps", 12, "--resume", "auto", "--out", tmp_path)
    assert result.returncode == 0, result.stdout
    assert "so its losses will not repeat: ranks 2 -> 1" in result.stdout
    continued, never_stopped = jobs.rows(tmp_path), jobs.rows(out)[5:]
    assert [(row["step"], row["lr"]) for row in continued] == [(row["step"], row["lr"]) for row in never_stopped]
    assert [row["loss"] for row in continued] == pytest.approx([row["loss"] for row in never_stopped], rel=0.02)


def test_a_checkpoint_that_fails_costs_only_itself(text, tmp_path):
    (tmp_path / "step-000004").write_text("in the way")
    result = run(1, "--data", text, "--steps", 12, "--checkpoint-every", 4, "--out", tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("a checkpoint failed, training goes on") == 1
    assert sorted(path.name for path in tmp_path.glob("step-*/")) == ["step-000008", "step-000012"]


@pytest.mark.parametrize("steps", [(4, 8), (12,)], ids=["two in a row", "the last"])
def test_a_run_without_a_checkpoint_to_go_on_from_fails(text, tmp_path, steps):
    for step in steps:
        (tmp_path / f"step-{step:06d}").write_text("in the way")
    result = run(1, "--data", text, "--steps", 12, "--checkpoint-every", 4, "--out", tmp_path)
    assert result.returncode != 0
    assert f"step-{steps[-1]:06d} exists and is no checkpoint" in result.stdout


def test_two_ranks_see_the_data_of_one(sharded, text, tmp_path):
    """The first loss is of the same weights and windows; later ones differ by the rounding of gradients."""
    rows = train(1, tmp_path, "--engine", "plain", "--data", text, "--steps", 12)
    two_ranks = jobs.rows(sharded[0])
    assert rows[0]["loss"] == pytest.approx(two_ranks[0]["loss"], rel=1e-6)
    assert [row["lr"] for row in rows] == [row["lr"] for row in two_ranks]
    assert rows[-1]["loss"] == pytest.approx(two_ranks[-1]["loss"], rel=0.05)


@pytest.mark.slow
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
        ("--steps 0", "--steps must be a finite number of at least 1, got 0"),
        ("--resume", "--resume found no checkpoint in"),
        ("--zero-stage 3", "fully_shard"),
        ("--keep-last -1", "--keep-last must be a finite number of at least 0, got -1"),
        ("--timeout 0", "--timeout must be a finite number of at least 1, got 0"),
        ("--timeout inf", "--timeout must be a finite number of at least 1, got inf"),
        ("--clip -1", "--clip must be a finite number of at least 0, got -1"),
        ("--clip nan", "--clip must be a finite number of at least 0, got nan"),
        ("--lr -0.1", "--lr must be a finite number of at least 0, got -0.1"),
        ("--weight-decay -0.1", "--weight-decay must be a finite number of at least 0, got -0.1"),
        ("--warmup -5", "--warmup must be a finite number of at least 0, got -5"),
        ("--seed -1", "--seed must be a finite number of at least 0, got -1"),
        ("--peak-tflops 0", "--peak-tflops must be a finite number above 0, got 0"),
        ("--engine ddp --zero-stage 2", "--zero-stage 2 is for --engine sharded or deepspeed, got ddp"),
        ("--engine fsdp2 --param-sync gather", "--param-sync gather is for --engine sharded, got fsdp2"),
        ("--engine deepspeed --main-params split", "--main-params split is for --engine plain or ddp or sharded"),
        ("--deepspeed-config ds.json", "--deepspeed-config ds.json is for --engine deepspeed, got sharded"),
        ("--engine deepspeed --deepspeed-config ds.json --zero-stage 3", "ds.json says its own stage. Leave one"),
        ("--engine deepspeed --deepspeed-config nowhere.json", "nowhere.json cannot be read"),
        ("--replicate 2", "--replicate 2 does not divide 1 ranks"),
        ("--engine ddp --replicate 2", "--replicate 2 is for --engine sharded or fsdp2, got ddp"),
    ],
)
def test_bad_input_exits_with_2_and_sets_up_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_engines.py", *flags.split(), "--out", str(tmp_path / "run")])
    assert compare_engines.main() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not dist.is_initialized()


@pytest.mark.slow
def test_bad_data_path_is_said_once_by_two_ranks(tmp_path):
    result = run(2, "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert result.returncode != 0
    assert result.stdout.count(f"no such file or folder: {tmp_path / 'nowhere'}. Pass --data PATH") == 1
    assert "exitcode  : 2" in result.stdout


def test_plain_engine_refuses_two_ranks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_engines.py", "--engine", "plain"])
    monkeypatch.setattr(program, "WORLD_SIZE", 2)
    assert compare_engines.main() == 2
    printed = capsys.readouterr().err
    assert "--engine plain trains in one process" in printed and "--engine ddp" in printed


def test_default_batch_divides_among_any_number_of_ranks(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare_engines.py", "--micro-batches", "2"])
    for world_size, batch_size in [(1, 8), (2, 8), (3, 12), (6, 12), (8, 16)]:
        monkeypatch.setattr(program, "WORLD_SIZE", world_size)
        assert arguments.parse_arguments("").batch_size == batch_size
