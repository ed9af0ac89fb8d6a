"""The benchmark of parameter sync really runs, on two CPU ranks and a tiny model."""

import csv
import os
import subprocess
import sys

SMALL = ["--layers", "1", "--dim", "64", "--vocab", "512", "--seq-len", "8", "--steps", "1", "--burst", "2"]


def test_codes_send_less_than_a_gather_and_train_alike(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "lion_dist.benchmarks.param_sync", *SMALL, "--csv", str(tmp_path / "sync.csv")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {(row["parameters"], row["engine"]): row for row in csv.DictReader((tmp_path / "sync.csv").open())}
    assert len(rows) == 6 and all(row["ms_median"] and row["last_loss"] for row in rows.values())
    for parameters in ("bf16, split main params", "fp32"):
        gather, coded = (rows[parameters, f"ShardedLion, {kind}"] for kind in ("gather", "coded"))
        assert coded["last_loss"] == gather["last_loss"]
        assert float(coded["sent_bytes_per_param"]) < 0.7 * float(gather["sent_bytes_per_param"])
