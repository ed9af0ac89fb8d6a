"""The benchmark of whole steps really runs, on CPU ranks and a tiny model."""

import csv
import os
import subprocess
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from lion_dist.benchmarks.engines import engines
from lion_dist.benchmarks.llama import SIZES, Llama
from tests.launch import jobs


def train_by(name: str) -> bool:
    """One step of a tiny model; whether it has moved."""
    model = Llama(**SIZES["tiny"])
    before = [param.detach().clone() for param in model.parameters()]
    engines(1)[name](model)([torch.randint(256, (1, 17))])
    return any((whole(new) != old).any() for new, old in zip(model.parameters(), before, strict=True))


def whole(param: torch.Tensor) -> torch.Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()


def test_adamw_stands_beside_every_engine(gloo):
    names = [name for name in engines(1) if "AdamW" in name]
    assert [name.split()[0] for name in names] == ["DDP", "DDP", "FSDP2", "FSDP2"]
    for name in names:
        assert gloo.run(2, train_by, name) == [True, True]


def test_rows_carry_ratios_memory_and_versions(tmp_path):
    command = jobs.torchrun(2, "-m", "lion_dist.benchmarks.step")
    command += ["--size", "tiny", "--seq-len", "16", "--steps", "3"]
    command += ["--micro-batch", "1", "--micro-batches", "2", "--warm-up", "1", "--engines", "stage"]
    command += ["--csv", str(tmp_path / "step.csv"), "--png", str(tmp_path / "step.png")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "step.csv").open()))
    names = [row["engine"] for row in rows]
    assert names[0] == "forward + backward alone" and {"lion_dist stage 1", "lion_dist stage 2"} < set(names)
    assert rows[0]["ratio"] == "1.0"
    assert all(float(row["ms_p10"]) <= float(row["ms_median"]) <= float(row["ms_p90"]) for row in rows)
    assert {row["ranks"] for row in rows} == {"2"}
    assert all(row["torch"] and row["device"] and row["date"] for row in rows)
    assert (tmp_path / "step.png").stat().st_size > 1000
