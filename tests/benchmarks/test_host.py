"""The host's part of a step: the benchmark really runs, and the library's part of its work is bounded."""

import csv
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from lion_dist.benchmarks import host
from tests.launch import jobs


@pytest.fixture
def pretended_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@contextmanager
def calls_of_the_library():
    """Counts calls of the library's functions, without those of its benchmarks."""
    calls = Counter()

    def count(frame, event, _argument):
        if event == "call":
            package = frame.f_globals.get("__name__", "").split(".")[:2]
            calls["lion_dist"] += package[0] == "lion_dist" and package[1:] != ["benchmarks"]

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def test_rows_say_what_the_library_adds(tmp_path, monkeypatch):
    """The clock tells calls of the library, not seconds: under load three steps of the model alone can take longer."""
    path = tmp_path / "host.csv"
    monkeypatch.setattr(sys, "argv", ["host", "--buckets", "14", "27", "--steps", "3", "--csv", str(path)])
    with calls_of_the_library() as calls:
        monkeypatch.setattr(host.time, "perf_counter", lambda: calls["lion_dist"])
        host.main()
    rows = list(csv.DictReader(path.open()))
    assert [row["buckets"] for row in rows] == ["14", "27"]
    for row in rows:
        parts = [float(row[f"{part}_ms"]) for part in host.PARTS]
        assert all(added > 0 for added in parts) and sum(parts) == float(row["host_ms"])
        assert float(row["alone_ms"]) == 0
    assert all(row["torch"] and row["device"] and row["date"] for row in rows)


def test_ranks_of_torchrun_measure_together_and_the_first_one_reports(tmp_path):
    path = tmp_path / "host.csv"
    command = jobs.torchrun(2, "-m", "lion_dist.benchmarks.host", "--buckets", "14", "--steps", "2", "--csv", path)
    done = subprocess.run(command, env=jobs.ENVIRONMENT, cwd=jobs.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(path.open())
    assert row["buckets"] == "14" and float(row["host_speed_s"]) > 0
    assert done.stdout.count("host_ms") == 1


def test_a_step_calls_a_bounded_number_of_the_librarys_functions(pretended_ranks):
    """Time would depend on the machine. 147 parameters in 27 buckets: some 70 calls a bucket and 10 a parameter."""
    model = host.make_model(27, torch.device("cpu"))
    optimizer = host.make_optimizer(model)
    x = torch.ones((), dtype=torch.bfloat16)
    for _ in range(2):
        list(host.step_parts(model, optimizer, x))
    with calls_of_the_library() as calls:
        list(host.step_parts(model, optimizer, x))
    assert 0 < calls["lion_dist"] < 3500
