"""``launch/train.py --cuda-graph`` on all GPUs: losses, log and checkpoints are those of the program without the flag.

The model is small enough that attention has one block of keys: its backward pass then adds up in one order.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.launch import jobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
CASES = {
    "fp32": "",
    "bf16, accumulation, stage 1": "--precision bf16 --micro-batches 2 --zero-stage 1",
    "bf16, accumulation, stage 2, no clipping": "--precision bf16 --micro-batches 2 --clip 0",
}


def train(out: Path, text: Path, *flags: str) -> str:
    """12 steps, of which the flag captures the fourth, and a save after each fifth. Returns what is printed last."""
    ranks = torch.cuda.device_count()
    settings = [*jobs.TINY, "--batch-size", 8 * ranks, "--data", text, "--out", out]
    command = jobs.torchrun(ranks, jobs.TRAIN, *settings, "--steps", 12, "--checkpoint-every", 5, *flags)
    result = jobs.finish(jobs.start(command, ENVIRONMENT))
    assert result.returncode == 0, result.stdout
    return next(line for line in result.stdout.splitlines() if line.startswith("held-out loss"))


def assert_same_run(found: Path, expected: Path, *steps: str) -> None:
    """Losses, norms and learning rates of all steps; in the checkpoints weights and momentum of each rank, by bytes."""
    assert len(jobs.losses(expected)) == 12
    assert jobs.losses(found) == jobs.losses(expected)
    for step in steps:
        saved = sorted(path.name for path in (expected / step).glob("*.distcp"))
        assert saved == sorted(path.name for path in (found / step).glob("*.distcp")) and saved
        for name in saved:
            assert (found / step / name).read_bytes() == (expected / step / name).read_bytes(), (step, name)


@pytest.mark.parametrize("case", CASES)
def test_the_program_trains_to_the_same_bits_with_the_flag_and_without(text, tmp_path, case):
    """With the schedule, evaluations before and after, and checkpoints between replays."""
    flags = CASES[case].split()
    printed = train(tmp_path / "eager", text, *flags)
    assert train(tmp_path / "captured", text, *flags, "--cuda-graph") == printed
    assert_same_run(tmp_path / "captured", tmp_path / "eager", "step-000005", "step-000010", "step-000012")


def test_a_run_that_goes_on_with_the_flag_repeats_one_that_never_stopped(text, tmp_path):
    """From the checkpoint of step 5 of a run without it; that of step 10 is then a replay's."""
    train(tmp_path / "eager", text)
    out = tmp_path / "captured"
    out.mkdir()
    (out / "step-000005").symlink_to(tmp_path / "eager" / "step-000005")
    lines = (tmp_path / "eager" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:5]))
    train(out, text, "--cuda-graph", "--resume", "auto")
    assert_same_run(out, tmp_path / "eager", "step-000010", "step-000012")
