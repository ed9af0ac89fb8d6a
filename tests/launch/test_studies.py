"""launch/precision_study.py and launch/variants_study.py: paired runs, resumed where cut off, and a table."""

import json

import pytest
import torch

import precision_study
import variants_study
from comparison import study
from comparison.study import Arm

FLAGS = "--layers 1 --dim 16 --heads 2 --seq-len 8 --batch-size 2 --steps 6 --held-out 4 --no-compile --lr 1e-2".split()


def start(program, monkeypatch, out, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", [program.__name__, *FLAGS, "--out", str(out), *flags])
    program.main()


def rows(out) -> list[dict]:
    return [json.loads(line) for path in out.glob("*.jsonl") for line in path.read_text().splitlines()]


@pytest.mark.parametrize("program", [precision_study, variants_study], ids=lambda program: program.__name__)
def test_every_arm_runs_once_for_each_seed_and_is_reported(program, monkeypatch, tmp_path, capsys):
    start(program, monkeypatch, tmp_path, "--seeds", "0", "1")
    found = rows(tmp_path)
    assert [(row["seed"], row["arm"]) for row in found] == [(seed, arm) for seed in (0, 1) for arm in program.ARMS]
    start(program, monkeypatch, tmp_path, "--seeds", "0", "1")
    assert rows(tmp_path) == found  # nothing is repeated
    capsys.readouterr()
    start(program, monkeypatch, tmp_path, "--report")
    printed = capsys.readouterr().out
    assert all(f"| {arm} |" in printed for arm in program.ARMS) and "2 seeds" in printed
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_arms_of_a_seed_begin_alike(monkeypatch, tmp_path):
    start(variants_study, monkeypatch, tmp_path, "--seeds", "3")
    firsts = {row["losses"][0] for row in rows(tmp_path)}
    assert len(firsts) == 1


def test_a_poisoned_batch_is_of_random_bytes_and_the_same_in_all_arms(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["study", *FLAGS])
    args = study.parse_arguments("", str(tmp_path))
    text = torch.full((1000,), 7, dtype=torch.uint8)
    arm = Arm(poison_every=3)
    batches = [study.batch(args, arm, text, 0, step) for step in range(6)]
    assert [bool((batch != 7).any()) for batch in batches] == [False, False, True] * 2
    assert torch.equal(batches[2], study.batch(args, arm, text, 0, 2)) and not torch.equal(batches[2], batches[5])


def test_differences_are_paired_and_have_an_interval():
    held_out = {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 1.1, ("b", 1): 2.3}
    results = [{"arm": arm, "seed": seed, "held_out": loss} for (arm, seed), loss in held_out.items()]
    _, row = study.summarize(results, {"a": None, "b": "a"})
    assert row["difference"] == pytest.approx(0.2)
    assert row["half_interval"] == pytest.approx(12.71 * 0.1)  # of 0.1 and 0.3, one degree of freedom


def test_a_report_of_nothing_says_so(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="holds no results yet"):
        start(variants_study, monkeypatch, tmp_path, "--report")
