"""Programs that know nothing of lion_dist, started by ``python -m lion_dist.integrations.deepspeed``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import preloaded
from tests.launch import jobs

pytest.importorskip("deepspeed")

PROGRAMS = Path(__file__).with_name("trainer_programs.py")
RUNNER = ["-m", "lion_dist.integrations.deepspeed"]

REPORTING_SCRIPT = """
import json, os, sys
import deepspeed.ops.lion
import sibling
from lion_dist.integrations.deepspeed import DeepSpeedLion

found = {
    "argv": sys.argv, "name": __name__, "sibling": sibling.VALUE,
    "registered": [deepspeed.ops.lion.FusedLion is DeepSpeedLion, deepspeed.ops.lion.DeepSpeedCPULion is DeepSpeedLion],
}
open(os.path.join(sys.argv[-1], f"found{os.environ.get('RANK', '')}.json"), "w").write(json.dumps(found))
"""


def run(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | preloaded.ON_CPUS | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers; killing torchrun would leave them running
            raise
    assert process.returncode == 0, printed
    return subprocess.CompletedProcess(command, process.returncode, printed)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "sibling.py").write_text("VALUE = 3\n")
    path = tmp_path / "train.py"
    path.write_text(REPORTING_SCRIPT)
    return path


def assert_registered(found: dict, argv: list[str]) -> None:
    assert found == {"argv": argv, "name": "__main__", "sibling": 3, "registered": [True, True]}


def test_script_runs_registered_with_its_own_arguments(script, tmp_path):
    python = preloaded.python(*preloaded.DEEPSPEED)
    done = run([python, *RUNNER, "--local_rank=0", str(script), "--flag", str(tmp_path)])
    found = json.loads((tmp_path / "found.json").read_text())
    assert_registered(found, [str(script), "--local_rank=0", "--flag", str(tmp_path)])
    assert "replaced deepspeed.ops.lion.FusedLion by lion_dist.integrations.deepspeed.DeepSpeedLion" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_start_the_runner_on_two_ranks(script, tmp_path, launcher):
    if launcher == "torchrun":
        flags = [[], []]
        run(jobs.torchrun(2, *RUNNER, script, tmp_path, frameworks=preloaded.DEEPSPEED))
    else:
        deepspeed = Path(sys.executable).with_name("deepspeed")
        command = [preloaded.python(*preloaded.DEEPSPEED), str(deepspeed), "--num_gpus", "2", "--module"]
        flags = [["--local_rank=0"], ["--local_rank=1"]]
        run([*command, "lion_dist.integrations.deepspeed", str(script), str(tmp_path)])
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found{rank}.json").read_text())
        assert_registered(found, [str(script), *flags[rank], str(tmp_path)])


def test_nothing_to_run_is_said():
    done = subprocess.run([preloaded.python(), *RUNNER], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: python -m lion_dist.integrations.deepspeed SCRIPT.py" in done.stderr


CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "optimizer": {"type": "Lion", "params": {"lr": 3e-3, "momentum_dtype": "bf16"}},
}


def train_by(framework: str, config: dict, tmp_path: Path) -> dict:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    run(jobs.torchrun(2, *RUNNER, PROGRAMS, framework, path, tmp_path, frameworks=preloaded.TRAINER))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["optimizer"] == "lion_dist.integrations.deepspeed.DeepSpeedLion"
    assert found["state"] == ["exp_avg torch.bfloat16"]
    assert found["losses"][-1] < found["losses"][0] - 0.5
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_hf_trainer(tmp_path, stage):
    """With the Trainer's "auto", and a run resumed from its checkpoint."""
    pytest.importorskip("transformers")
    params = {"lr": "auto", "betas": "auto", "weight_decay": "auto", "momentum_dtype": "bf16"}
    config = CONFIG | {
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Lion", "params": params},
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    del config["bf16"]  # the Trainer refuses bf16 without a GPU
    found = train_by("trainer", config, tmp_path)
    assert found["betas"] == [0.9, 0.99]
    assert train_by("resume", config, tmp_path)["losses"] == found["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_accelerate(tmp_path, offload):
    pytest.importorskip("transformers")
    zero = {"stage": 2} | ({"offload_optimizer": {"device": "cpu", "pin_memory": False}} if offload else {})
    train_by("accelerate", CONFIG | {"zero_optimization": zero}, tmp_path)


@pytest.mark.slow
def test_accelerate_under_offload_keeps_a_lion_of_the_users_own(tmp_path):
    """Unregistered, Accelerate makes a DeepSpeedCPUAdam of it and says nothing."""
    pytest.importorskip("transformers")
    config = CONFIG | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    del config["optimizer"]
    train_by("client", config, tmp_path)
