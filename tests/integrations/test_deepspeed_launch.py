"""launch/compare_engines.py --engine deepspeed, with the JSON of each stage, as a user starts it."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch.distributed as dist

import compare_engines
from comparison import deepspeed_engine
from lion_dist.integrations.deepspeed import read_params
from tests import preloaded
from tests.launch import jobs

pytest.importorskip("deepspeed")

COMPARE = Path(compare_engines.__file__)
TINY = "--layers 1 --dim 16 --heads 2 --seq-len 16 --batch-size 8 --micro-batches 2 --warmup 2 --lr 1e-2".split()


@pytest.mark.parametrize("stage", range(4))
def test_config_of_each_stage_is_filled_in_from_the_arguments(monkeypatch, stage):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    args = Namespace(zero_stage=stage, deepspeed_config=None, batch_size=8, micro_batches=2, lr=0.5, weight_decay=0.25)
    args.__dict__ |= {"clip": 2.0, "precision": "bf16", "momentum_dtype": None}
    config = deepspeed_engine.deepspeed_config(args)
    assert "auto" not in json.dumps(config)
    assert config["zero_optimization"]["stage"] == stage
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 2)
    assert config["gradient_clipping"] == 2.0 and config["bf16"]["enabled"] is True
    keywords = read_params(config["optimizer"]["params"])
    assert (keywords["lr"], keywords["betas"], keywords["weight_decay"]) == (0.5, (0.9, 0.99), 0.25)


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        ({"bf16": {"enabled": "auto"}}, 'no "optimizer" with "params". Write "optimizer": {"type": "Lion", "params":'),
        ({"optimizer": {"params": {}}}, 'no "bf16" with "enabled". Write "bf16": {"enabled": "auto"}'),
        ({"optimizer": {"params": {}}, "bf16": None}, 'no "bf16" with "enabled"'),
        ([], 'no "optimizer" with "params"'),
    ],
    ids=["optimizer", "bf16", "null", "list"],
)
def test_config_without_a_section_that_is_filled_in_says_what_to_write(config, remedy, monkeypatch, capsys, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    flags = ["--engine", "deepspeed", "--deepspeed-config", str(path), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["compare_engines.py", *flags])
    assert compare_engines.main() == 2
    assert f"compare_engines.py: {path} has {remedy}" in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "stage"), [("deepspeed", 4), ("sharded", 3)])
def test_stage_that_an_engine_has_not_is_refused(monkeypatch, capsys, tmp_path, engine, stage):
    flags = ["--engine", engine, "--zero-stage", str(stage), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["compare_engines.py", *flags])
    assert compare_engines.main() == 2
    assert "zero" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """``start(out, *flags)`` runs the program on two ranks and returns (rows of metrics.jsonl, what it printed)."""
    folder = tmp_path_factory.mktemp("launch")
    text = folder / "text.txt"
    text.write_text("".join(f"{i} green bottles hanging on the wall\n" for i in range(500)))
    environment = os.environ | preloaded.ON_CPUS | {"OMP_NUM_THREADS": "1"}
    environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")  # a lock left by a killed build would hang it

    def start(out: Path, *flags: object) -> tuple[list[dict], str]:
        torchrun = jobs.torchrun(2, frameworks=preloaded.DEEPSPEED)
        command = [*torchrun, str(COMPARE), "--engine", "deepspeed", *TINY, "--data", str(text), "--out", str(out)]
        process = subprocess.Popen(
            [*command, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        try:
            printed, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers; killing torchrun would leave them running
            raise
        assert process.returncode == 0, printed
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], printed

    return start


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_training_learns_and_a_resumed_run_repeats_it(start, tmp_path, stage):
    flags = ["--zero-stage", stage, "--precision", "bf16", "--steps", 8]
    rows, printed = start(tmp_path / "whole", *flags, "--checkpoint-every", 4)
    assert [row["step"] for row in rows] == list(range(1, 9))
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["held_out"]["8"] < summary["held_out"]["0"] - 0.3
    assert "full parameters bit-identical on all ranks: yes" in printed
    share = 1 if stage == 0 else 2  # ranks that the momentum, bf16, is spread over
    for rank in (0, 1):
        exp_avg = summary["memory_bytes"][f"rank {rank}, deepspeed"]["exp_avg"]
        assert 0 <= exp_avg - 2 * summary["numel"] / share <= 64

    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "step-000004").symlink_to(tmp_path / "whole" / "step-000004")
    again, printed = start(stopped, *flags, "--resume")
    assert "resumed from" in printed and "other settings" not in printed
    keys = ("step", "loss", "lr", "grad_norm")
    assert [[row[key] for key in keys] for row in again] == [[row[key] for key in keys] for row in rows[4:]]
