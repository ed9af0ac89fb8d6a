"""HF Accelerate and the HF Trainer train a small transformers model with ``Lion`` on two ranks, and go on."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import preloaded
from tests.launch import jobs

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def train(program: str, out: Path, *resume: str) -> dict:
    environment = os.environ | preloaded.ON_CPUS | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = ["-m", "tests.integrations.fsdp_programs", program, out, *resume]
    command = jobs.torchrun(2, *program, frameworks=preloaded.TRAINER)
    process = subprocess.Popen(
        command, cwd=out, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        printed, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers; killing torchrun would leave them running
        raise
    assert process.returncode == 0, printed
    return json.loads((out / "found.json").read_text())


def assert_trained(found: dict, wrapper: str, ranks_that_share_state: int) -> None:
    assert found["optimizer"] == "lion_dist.lion.Lion"
    assert found["wrapper"] == wrapper
    assert found["state"] == ["exp_avg torch.bfloat16", "main_param torch.int16"]
    assert found["losses"][-1] < found["losses"][0] - 0.5
    whole = 4 * 3_632  # bytes: of the tiny Llama's parameters, bf16 momentum and 16-bit remainder
    assert found["bytes of state"] == 2 * [whole // ranks_that_share_state]


@pytest.mark.parametrize("program", ["accelerate", "trainer fsdp2"])
def test_fsdp2_trains_and_a_resumed_run_repeats_it(tmp_path, program):
    """The Trainer saves a full state dict, Accelerate a sharded one."""
    found = train(program, tmp_path)
    assert_trained(found, "FSDPModule", 2)
    again = train(program, tmp_path, "resume")
    assert again["losses"][-12:] == found["losses"][-12:]


def test_trainer_takes_an_optimizer_of_the_users_own(tmp_path):
    found = train("trainer ddp", tmp_path)
    assert_trained(found, "DistributedDataParallel", 1)
    assert train("trainer ddp", tmp_path, "resume")["losses"] == found["losses"]
