"""The benchmark of the optimizer over FSDP2 shards really runs, on the CPU and a tiny model."""

import csv
import subprocess
from pathlib import Path

from tests import preloaded


def test_rows_carry_ratios_bytes_and_versions(tmp_path):
    command = [preloaded.python(), "-m", "lion_dist.benchmarks.fsdp", "--size", "tiny", "--repeats", "2"]
    command += ["--providers", "plain", "--csv", str(tmp_path / "fsdp.csv")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "fsdp.csv").open()))
    assert [(row["provider"], row["precision"]) for row in rows] == [
        ("lion_dist list", "bf16 split"),
        ("lion-pytorch plain", "bf16"),
        ("lion-pytorch plain", "fp32"),
    ]
    numel = int(rows[0]["bytes_moved"]) / 14
    assert [int(row["bytes_moved"]) / numel for row in rows] == [14, 10, 20]
    assert float(rows[0]["ratio"]) == 1.0 and all(float(row["ratio"]) > 0 for row in rows)
    assert {row["ranks"] for row in rows} == {"1"}
    assert all(row["torch"] and row["device"] and row["date"] and row["version"] for row in rows)
