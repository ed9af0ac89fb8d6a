"""launch/deepspeed/hostfile, and launch/train.py under DeepSpeed's own launcher."""

import pytest

from tests import preloaded
from tests.launch import jobs

pytest.importorskip("deepspeed")
HOSTFILE = jobs.ROOT / "launch" / "deepspeed" / "hostfile"


def test_hostfile_is_what_deepspeeds_launcher_reads():
    from deepspeed.launcher import runner

    assert runner.fetch_hostfile(str(HOSTFILE)) == {"node-1": 8, "node-2": 8}


@pytest.mark.slow
def test_training_program_runs_under_deepspeeds_launcher(text, tmp_path):
    """On this node, two CPU ranks. (More nodes need ssh or Slurm.)"""
    flags = [*jobs.TINY, "--data", text, "--steps", 4, "--out", tmp_path]
    store, where = jobs.meeting_place()  # the launcher's own port is 29500, whoever else has it
    launcher = [preloaded.python(*preloaded.DEEPSPEED), "-m", "deepspeed.launcher.runner"]
    launcher += ["--hostfile", "", "--num_gpus", "2"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(store.port), "--no_local_rank"]
    command = [*launcher, str(jobs.TRAIN), *map(str, flags)]
    result = jobs.finish(jobs.start(command, jobs.ENVIRONMENT | where | {"DS_ACCELERATOR": "cpu"}))
    assert result.returncode == 0, result.stdout
    assert [row[0] for row in jobs.losses(tmp_path)] == [1, 2, 3, 4]
    assert "on the first of 2 ranks" in result.stdout
