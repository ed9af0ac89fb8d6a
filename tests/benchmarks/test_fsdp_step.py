"""The benchmark of pairs over FSDP2 really runs, on CPU ranks and a tiny model."""

import argparse
import csv
import os
import subprocess
from pathlib import Path

import pytest
import torch

from lion_dist.benchmarks import fsdp_step
from tests.launch import jobs

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_rows_carry_ratios_and_versions_and_peers_in_trouble_are_named(tmp_path):
    (tmp_path / "flashoptim.py").write_text("def FlashLion(*_, **__): raise RuntimeError('no shards')")
    (tmp_path / "optimi.py").write_text("raise ImportError('no optimi')")
    command = jobs.torchrun(2, "-m", "lion_dist.benchmarks.fsdp_step")
    command += ["--size", "tiny", "--seq-len", "16", "--micro-batch", "1"]
    command += ["--blocks", "6", "--steps", "1", "--warm-up", "1", "--csv", str(tmp_path / "rows.csv")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FlashLion: failed (RuntimeError('no shards'))") == 2
    assert done.stdout.count("optimi Kahan: not installed (ImportError('no optimi'))") == 2
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    plain = [row for row in rows if row["peer"] == "lion-pytorch plain"]
    assert [row["engine"] for row in plain] == ["FSDP2 no reshard", "FSDP2 reshard"]
    assert all(float(row["ratio"]) > 0 and float(row["half_interval_95"]) > 0 for row in rows)
    assert {(row["ranks"], row["blocks"], row["main_params"]) for row in rows} == {("2", "6", "none")}
    assert all(row["version"] and row["torch"] and row["device"] and row["date"] for row in rows)


def test_trouble_of_our_own_ends_the_run(monkeypatch):
    peer = fsdp_step.PEERS[0]

    def warm_step(args, make, reshard, device):
        if make is peer.make:
            return lambda: None
        raise RuntimeError("ours")

    monkeypatch.setattr(fsdp_step, "warm_step", warm_step)
    args = argparse.Namespace(size="tiny", compile=False, micro_batch=1, seq_len=16, warm_up=1)
    with pytest.raises(RuntimeError, match="ours"):
        fsdp_step.measure(args, peer, reshard=False, device=torch.device("cpu"))
