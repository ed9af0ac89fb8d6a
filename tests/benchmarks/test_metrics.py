"""The benchmark of watching really runs, on a CPU and a tiny model."""

import csv
import math
import sys

from lion_dist.benchmarks import metrics


def test_rows_say_what_watching_adds(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    arguments = ["--device", "cpu", "--repeats", "1", "--precisions", "bf16 split", "--csv", str(path)]
    monkeypatch.setattr(sys, "argv", ["metrics", *arguments])
    monkeypatch.setattr(metrics, "STEPS", 2)
    metrics.main()
    rows = list(csv.DictReader(path.open()))
    names = [f"metrics_every={every}" for every in metrics.INTERVALS]
    assert [row["what"] for row in rows] == [*names, "one check of replicas"]
    assert rows[0]["added_ms"] == "0.0" and float(rows[-1]["added_ms"]) > 0
    assert all(math.isfinite(float(row["added_ms"])) for row in rows)
    assert all(row["torch"] and row["device"] and row["date"] for row in rows)
