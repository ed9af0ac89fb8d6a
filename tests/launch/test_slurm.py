"""launch/slurm/train.sbatch, run by bash with a stand-in srun and scontrol in PATH: one node, two CPU ranks."""

import re
import signal

import pytest

from tests import preloaded
from tests.launch import jobs

SCRIPT = jobs.ROOT / "launch" / "slurm" / "train.sbatch"
STAND_INS = {
    "srun": 'echo "srun $*" >>"$CALLS"\nexec "$@"',  # a signal to srun reaches the task, as Slurm's passes it on
    "scontrol": 'echo "scontrol $*" >>"$CALLS"\n[ "$1" = requeue ] || echo 127.0.0.1',
}


@pytest.fixture
def slurm(tmp_path, text):
    """``slurm(steps)`` starts the script as sbatch would; ``slurm.calls()`` are the stand-ins' command lines."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = jobs.ENVIRONMENT | {
        "PATH": f"{programs}:{jobs.ENVIRONMENT['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_NAME": "lion",
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "node-[1-1]",
        "SLURM_NNODES": "1",
        "PYTHON": preloaded.python(),
        "RANKS_PER_NODE": "2",
        "OUT": str(tmp_path / "run"),
        "PORT": "0",  # torchrun, alone here, takes a free one
    }
    del environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]  # the script sets it

    def start(steps: int):
        flags = [*jobs.TINY, "--data", text, "--steps", steps, "--log-every", 1]
        return jobs.start(["bash", str(SCRIPT), *map(str, flags)], environment)

    start.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    start.out = tmp_path / "run"
    return start


def test_directives_come_before_commands_and_leave_time_to_save():
    lines = SCRIPT.read_text().splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert all(line.startswith("#") for line in lines[: directives[-1]])
    notice = int(re.search(r"--signal=B:TERM@(\d+)", SCRIPT.read_text())[1])
    assert int(re.search(r"SHUTDOWN_TIMEOUT:=(\d+)", SCRIPT.read_text())[1]) < notice


@pytest.mark.slow
def test_job_told_to_end_saves_requeues_itself_and_goes_on_when_started_again(slurm):
    job = slurm(100_000)
    jobs.wait_for_steps(job, slurm.out, 5)
    job.send_signal(signal.SIGTERM)  # to the batch shell alone, as --signal=B: does
    result = jobs.finish(job)
    assert result.returncode == 0, result.stdout
    (checkpoint,) = slurm.out.glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert slurm.calls()[0] == "scontrol show hostnames node-[1-1]" and slurm.calls()[1].startswith("srun ")
    assert slurm.calls()[2:] == ["scontrol requeue 4242"]

    result = jobs.finish(slurm(step + 5))
    assert result.returncode == 0, result.stdout
    assert f"{step} steps are done in {slurm.out}" in result.stdout
    assert [row[0] for row in jobs.losses(slurm.out)] == list(range(1, step + 6))
    assert slurm.calls()[-1].startswith("srun ")
