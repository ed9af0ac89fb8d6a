"""Turns and the interval of a ratio."""

import argparse
import math

import pytest
import torch

from lion_dist.benchmarks import paired


def test_the_interval_of_an_exact_example():
    """Ratios of 0.9 and 1.1, three times each: their deviation is 0.1 * sqrt(6 / 5)."""
    found = paired.Comparison.of([9.0, 22.0, 9.0, 22.0, 9.0, 22.0], [10.0, 20.0, 10.0, 20.0, 10.0, 20.0])
    assert found.ms == (15.5, 15.0)
    assert found.ratio == pytest.approx(1.0)
    assert found.half_interval == pytest.approx(2.571 * 0.1 / math.sqrt(5))


@pytest.mark.parametrize("dof", paired.T_95)
def test_the_quantiles_hold_95_percent(dof):
    """Of Student's t, by its density in steps of 0.001."""
    grid = (i / 1000 for i in range(round(2000 * paired.T_95[dof])))
    area = sum((1 + (t - paired.T_95[dof]) ** 2 / dof) ** (-(dof + 1) / 2) for t in grid) / 1000
    whole = math.sqrt(dof * math.pi) * math.gamma(dof / 2) / math.gamma((dof + 1) / 2)
    assert area / whole == pytest.approx(0.95, abs=1e-4)


def test_blocks_start_with_one_and_with_the_other(monkeypatch):
    turns = []

    def time_block(step, steps, device):
        turns.append((step, steps))
        return {"own": 1.0, "other": 2.0}[step]

    monkeypatch.setattr(paired, "time_block", time_block)
    found = paired.compare("own", "other", argparse.Namespace(blocks=6, steps=5), torch.device("cpu"))
    assert turns == 3 * [("own", 5), ("other", 5), ("other", 5), ("own", 5)]
    assert found == paired.Comparison((1.0, 2.0), 0.5, 0.0)
