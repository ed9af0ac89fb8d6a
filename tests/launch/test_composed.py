"""launch/composed.py: one model, whatever axes its ranks have."""

import re

import pytest
import torch

from tests.checkpoint.engines import tensors_in
from tests.launch import jobs

COMPOSED = jobs.ROOT / "launch" / "composed.py"
FLAGS = "--layers 2 --dim 16 --heads 2 --seq-len 16 --batch-size 8 --lr 1e-3 --steps 10".split()


def trained(text, folder, ranks: int, *flags: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(losses, tensors of the checkpoint)"""
    out = folder / f"of{ranks}{''.join(map(str, flags))}"
    result = jobs.run(jobs.torchrun(ranks, COMPOSED, *FLAGS, "--data", text, "--out", out, *flags))
    assert result.returncode == 0, result.stdout
    losses = list(map(float, re.findall(r"step \d+/10  loss ([\d.]+)", result.stdout)))
    return losses, tensors_in(out / "step-000010")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(text, once):
    return once("composed-alone", lambda folder: trained(text, folder, 1))


@pytest.mark.parametrize("axis", ["--tensor-parallel", "--pipeline-parallel"])
def test_trains_the_model_of_one_process(alone, text, tmp_path, axis):
    """Sums are in another order: losses agree to four digits, and momentum nearly."""
    losses, tensors = trained(text, tmp_path, 2, axis, 2)
    expected, whole = alone
    assert len(losses) == 10 and losses == pytest.approx(expected, abs=2e-3)
    assert tensors.keys() == whole.keys()
    for name, tensor in whole.items():
        if name.endswith("exp_avg"):
            torch.testing.assert_close(tensors[name], tensor, rtol=0.05, atol=1e-3)


def test_experts_divided_over_ranks_train_as_on_one(text, tmp_path):
    """Two of four experts on each rank, and all of them in the checkpoint."""
    expected, whole = trained(text, tmp_path, 1, "--experts", 4)
    losses, tensors = trained(text, tmp_path, 4, "--experts", 4, "--expert-parallel", 2)
    assert len(losses) == 10 and losses == pytest.approx(expected, abs=2e-3)
    assert tensors.keys() == whole.keys()
    assert {f"model.blocks.1.experts.{number}.0.weight" for number in range(4)} <= tensors.keys()


def test_the_names_are_those_of_the_whole_model(alone):
    assert {"model.embedding.weight", "model.blocks.1.mlp_out.weight", "model.norm.weight"} <= alone[1].keys()
