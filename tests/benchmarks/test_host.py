"""The host's part of a step: the benchmark really runs, and the library's part of its work is bounded."""

import csv
import sys
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from lion_dist.benchmarks import host


@pytest.fixture
def pretended_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def test_rows_say_what_the_library_adds(tmp_path, monkeypatch):
    path = tmp_path / "host.csv"
    monkeypatch.setattr(sys, "argv", ["host", "--buckets", "14", "27", "--steps", "3", "--csv", str(path)])
    host.main()
    dist.destroy_process_group()
    rows = list(csv.DictReader(path.open()))
    assert [row["buckets"] for row in rows] == ["14", "27"]
    assert all(float(row["host_ms"]) > 0 and float(row["backward_ms"]) > 0 for row in rows)
    assert all(row["torch"] and row["device"] and row["date"] for row in rows)


def test_a_step_calls_a_bounded_number_of_the_librarys_functions(pretended_ranks):
    """Time would depend on the machine. 147 parameters in 27 buckets: some 70 calls a bucket and 10 a parameter."""
    cpu = torch.device("cpu")
    model = host.make_model(27, cpu)
    optimizer = host.make_optimizer(model)
    x, calls = torch.ones((), dtype=torch.bfloat16), Counter()

    def count(frame, event, _argument):
        package = frame.f_globals.get("__name__", "").split(".")[:2]
        calls["lion_dist"] += event == "call" and package[0] == "lion_dist" and package[1:] != ["benchmarks"]

    for step in range(3):
        sys.setprofile(count if step == 2 else None)
        list(host.step_parts(model, optimizer, x))
        sys.setprofile(None)
    assert 0 < calls["lion_dist"] < 3500
