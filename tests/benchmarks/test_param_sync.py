"""The benchmark of parameter sync really runs, on two CPU ranks and a tiny model."""

import csv
import os
import subprocess

import pytest

from tests import preloaded
from tests.launch import jobs

SMALL = ["--layers", "1", "--dim", "64", "--vocab", "512", "--seq-len", "8", "--steps", "1", "--burst", "2"]


@pytest.mark.slow
def test_codes_send_less_than_a_gather_and_train_alike(tmp_path):
    command = jobs.torchrun(2, "-m", "lion_dist.benchmarks.param_sync")
    command += [*SMALL, "--csv", str(tmp_path / "sync.csv")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {(row["parameters"], row["engine"]): row for row in csv.DictReader((tmp_path / "sync.csv").open())}
    assert len(rows) == 6 and all(row["ms_median"] and row["last_loss"] for row in rows.values())
    for parameters in ("bf16, split main params", "fp32"):
        gather, coded = (rows[parameters, f"ShardedLion, {kind}"] for kind in ("gather", "coded"))
        assert coded["last_loss"] == gather["last_loss"]
        assert float(coded["sent_bytes_per_param"]) < 0.7 * float(gather["sent_bytes_per_param"])


@pytest.mark.slow
def test_a_nodes_link_carries_the_bytes_of_the_formula(tmp_path):
    """Two namespaces with two ranks each, by their interfaces' counters: times 1/2, for there are two nodes."""
    try:
        subprocess.run(["ip", "netns", "add", "lion-probe"], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs network namespaces: {error}")
    subprocess.run(["ip", "netns", "del", "lion-probe"], check=True)
    size = "--layers 1 --dim 128 --vocab 8192 --seq-len 8 --steps 1 --burst 1".split()
    command = [preloaded.python(), "-m", "lion_dist.benchmarks.param_sync", "--nodes", "--ranks-per-node", "2", *size]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["--mbit", "1000", "--csv", str(tmp_path / "levels.csv")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr  # it compares losses with and without codes
    rows = {(row["parameters"], row["engine"]): row for row in csv.DictReader((tmp_path / "levels.csv").open())}
    for parameters, itemsize in (("bf16, split main params", 2), ("fp32", 4)):
        sent = float(rows[parameters, "ShardedLion, two levels, gather"]["sent_bytes_per_param"])
        assert sent == pytest.approx((itemsize + itemsize) / 2, rel=0.05)
    coded = float(rows["fp32", "ShardedLion, two levels, coded"]["sent_bytes_per_param"])
    assert coded == pytest.approx((4 + 0.2) / 2, rel=0.05)
