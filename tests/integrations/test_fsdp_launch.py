"""launch/compare_engines.py --engine fsdp2 and fsdp1, as a user starts it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import compare_engines
from tests.launch import jobs

pytestmark = pytest.mark.slow

TINY = "--layers 1 --dim 16 --heads 2 --seq-len 16 --batch-size 8 --micro-batches 2 --warmup 2 --lr 1e-2 --steps 8"
BF16 = "--precision bf16".split()
BYTES = {  # a parameter
    "fp32": {"params": 4, "main_params": 0, "exp_avg": 4, "grads": 4},
    "bf16": {"params": 2, "main_params": 2, "exp_avg": 2, "grads": 2},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """``start(ranks, engine, out, *flags)`` runs the program; returns (rows of metrics.jsonl, summary, its output)."""
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(500)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(ranks: int, engine: str, out: Path, *flags: str) -> tuple[list[dict], dict, str]:
        torchrun = jobs.torchrun(ranks)
        command = [*torchrun, compare_engines.__file__, "--engine", engine, *TINY.split(), *flags]
        command += ["--data", str(text), "--out", str(out)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        try:
            printed, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers; killing torchrun would leave them running
            raise
        assert process.returncode == 0, printed
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return rows, json.loads((out / "summary.json").read_text()), printed

    return start


@pytest.fixture(scope="module")
def plain(start, tmp_path_factory):
    """The held-out loss of one process at the end, by precision."""
    out = tmp_path_factory.mktemp("plain")
    runs = {"fp32": start(1, "plain", out / "fp32"), "bf16": start(1, "plain", out / "bf16", *BF16)}
    return {precision: summary["held_out"]["8"] for precision, (_, summary, _) in runs.items()}


def trajectory(rows: list[dict]) -> list[list]:
    return [[row[key] for key in ("step", "loss", "lr", "grad_norm")] for row in rows]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["fsdp2", "fsdp1"])
def test_engine_lands_near_plain_and_a_resumed_run_repeats_it(start, plain, tmp_path, engine, precision):
    flags = ["--precision", precision]
    rows, summary, printed = start(2, engine, tmp_path / "whole", *flags, "--checkpoint-every", "4")
    assert summary["held_out"]["8"] < summary["held_out"]["0"] - 0.3
    assert summary["held_out"]["8"] == pytest.approx(plain[precision], abs=0.02)
    assert "full parameters bit-identical on all ranks: yes" in printed
    for rank in (0, 1):
        for kind, size in summary["memory_bytes"][f"rank {rank}, {engine}"].items():
            assert size == pytest.approx(BYTES[precision][kind] * summary["numel"] / 2, abs=64), kind

    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "step-000004").symlink_to(tmp_path / "whole" / "step-000004")
    again, _, printed = start(2, engine, stopped, *flags, "--resume")
    assert "resumed from" in printed and "other settings" not in printed
    assert trajectory(again) == trajectory(rows[4:])


def test_a_checkpoint_of_fsdp2_goes_on_under_other_engines_and_ranks(start, plain, tmp_path):
    start(2, "fsdp2", tmp_path / "first", *BF16, "--checkpoint-every", "4")
    for ranks, engine in [(3, "fsdp1"), (2, "sharded"), (1, "fsdp2")]:
        out = tmp_path / f"{engine}-{ranks}"
        out.mkdir()
        (out / "step-000004").symlink_to(tmp_path / "first" / "step-000004")
        flags = [*BF16, "--resume", "--batch-size", "12", "--micro-batches", "1"]
        _, summary, printed = start(ranks, engine, out, *flags)
        assert "resumed from" in printed
        assert summary["held_out"]["8"] == pytest.approx(plain["bf16"], abs=0.1)


def test_fsdp2_in_two_replicas_of_two_shards(start, plain, tmp_path):
    _, summary, printed = start(4, "fsdp2", tmp_path / "run", "--replicate", "2", "--micro-batches", "1")
    assert summary["held_out"]["8"] == pytest.approx(plain["fp32"], abs=0.02)
    assert "full parameters bit-identical on all ranks: yes" in printed
    assert summary["memory_bytes"]["rank 3, fsdp2"]["exp_avg"] == pytest.approx(2 * summary["numel"], abs=64)
