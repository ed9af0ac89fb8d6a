"""launch/train.py, which users copy: it needs nothing beside it, and trains as compare_engines.py --engine sharded."""

import ast
import json
import os
import re
import shutil
import signal
import sys
from datetime import timedelta

import pytest

import train
from tests import preloaded
from tests.launch import jobs


def imported_names(path) -> set[str]:
    """Modules that a program imports, and "module.name" of what it takes from one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_it_imports_the_standard_library_torch_and_public_names_only():
    import lion_dist

    public = {f"lion_dist.{name}" for name in lion_dist.__all__} | {"lion_dist.checkpoint"}
    names = imported_names(jobs.TRAIN)
    assert "lion_dist.ShardedLion" in names
    assert {name for name in names if name.startswith("lion_dist")} <= public
    elsewhere = {name.split(".")[0] for name in names} - {"lion_dist", "torch"}
    assert elsewhere <= sys.stdlib_module_names


def test_it_is_short_enough_to_be_read():
    assert len(jobs.TRAIN.read_text().splitlines()) <= 320


# Writes down what it gets, a line each.
WANDB = """
import json

class Run:
    def __init__(self, path):
        self.path = path

    def log(self, row, step):
        with open(self.path, "a") as file:
            file.write(json.dumps([step, row]) + "\\n")

def init(project, dir, config):
    run = Run(dir / "wandb.jsonl")
    run.log({"project": project, "lr": config["lr"]}, 0)
    return run
"""


@pytest.fixture(scope="module")
def copied(text, once):
    """The file alone in a folder of its own, trained for twelve steps on two ranks: (folder of the run, its output).

    With --wandb, and a stand-in for that package (the real one takes seconds: see the slow test below)."""

    def run(folder):
        alone, packages, out = folder / "alone", folder / "packages", folder / "alone" / "run"
        alone.mkdir()
        packages.mkdir()
        program = shutil.copy(jobs.TRAIN, alone / "my_training.py")
        (packages / "wandb.py").write_text(WANDB)
        path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
        flags = [*jobs.TINY, "--data", text, "--steps", 12, "--checkpoint-every", 5, "--out", out]
        command = jobs.torchrun(2, program, *flags, "--wandb", "bottles")
        result = jobs.finish(jobs.start(command, jobs.ENVIRONMENT | {"PYTHONPATH": path}))
        assert result.returncode == 0, result.stdout
        return out, result.stdout

    return once("copied", run)


def test_a_copy_learns_and_leaves_metrics_and_checkpoints(copied):
    out, printed = copied
    assert [row["step"] for row in jobs.rows(out)] == list(range(1, 13))
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000005", "step-000010", "step-000012"]
    before, after = map(float, re.search(r"held-out loss, .*: ([\d.]+) after step 0, ([\d.]+) after", printed).groups())
    assert after < before - 0.5
    assert "bytes per parameter on the first of 2 ranks: params 4." in printed


def test_weights_and_biases_gets_each_step_once(copied):
    """From the first of two ranks only."""
    (_, run), *logged = [json.loads(line) for line in (copied[0] / "wandb.jsonl").read_text().splitlines()]
    assert run == {"project": "bottles", "lr": 1e-2}
    assert [row for _, row in logged] == jobs.rows(copied[0])
    assert [step for step, _ in logged] == list(range(1, 13))


@pytest.mark.slow  # wandb starts a service of its own
def test_weights_and_biases_writes_an_offline_run(text, tmp_path):
    flags = [*jobs.TINY, "--data", text, "--steps", 3, "--out", tmp_path / "run", "--wandb", "bottles"]
    command = [preloaded.python(), *map(str, [jobs.TRAIN, *flags])]
    result = jobs.finish(jobs.start(command, jobs.ENVIRONMENT | {"WANDB_MODE": "offline"}))
    assert result.returncode == 0, result.stdout
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    written = run.read_bytes()
    assert all(name in written for name in (b"bottles", b"grad_norm", b"tokens_per_s"))


def test_weights_and_biases_where_it_is_missing_is_refused_with_the_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--wandb", "bottles", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.main()
    assert "wandb is not installed, and --wandb needs it: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_its_losses_are_those_of_compare_engines(copied, sharded):
    assert jobs.losses(copied[0]) == jobs.losses(sharded[0])


def test_a_resumed_run_repeats_the_losses_of_one_never_stopped(copied, text, tmp_path):
    """As after a kill in step 7, whose checkpoint of step 5 is the last complete one, and half a line was written."""
    out, _ = copied
    (tmp_path / "step-000005").symlink_to(out / "step-000005")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    flags = [*jobs.TINY, "--data", text, "--steps", 12, "--resume", "auto", "--keep-last", 1, "--out", tmp_path]
    result = jobs.run(jobs.torchrun(2, jobs.TRAIN, *flags))
    assert result.returncode == 0, result.stdout
    assert f"5 steps are done in {tmp_path}" in result.stdout
    assert jobs.losses(tmp_path) == jobs.losses(out)


def test_a_run_that_begins_anew_sets_the_earlier_one_aside(copied, text, tmp_path):
    for name in ("step-000005", "step-000010"):
        shutil.copytree(copied[0] / name, tmp_path / name)
    shutil.copy(copied[0] / "metrics.jsonl", tmp_path)
    flags = [*jobs.TINY, "--data", text, "--steps", 2, "--zero-stage", 1, "--micro-batches", 2, "--precision", "bf16"]
    result = jobs.run([preloaded.python(), *map(str, [jobs.TRAIN, *flags, "--out", tmp_path])])
    assert result.returncode == 0, result.stdout
    aside = sorted(path.name for path in (tmp_path / "earlier-1").iterdir())
    assert aside == ["metrics.jsonl", "step-000005", "step-000010"]
    assert [row["step"] for row in jobs.rows(tmp_path)] == [1, 2] and len(jobs.rows(tmp_path / "earlier-1")) == 12
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000002"]


@pytest.mark.slow
def test_signals_of_one_rank_save_on_all_and_torchrun_starts_again_what_it_may(text, tmp_path):
    """SIGUSR1 saves. SIGTERM to one rank of two saves and ends both; the other one asks torchrun to go on."""
    flags = [*jobs.TINY, "--data", text, "--steps", 400, "--log-every", 1, "--resume", "auto", "--out", tmp_path]
    command = jobs.torchrun(2, jobs.TRAIN, *flags)
    command.insert(command.index(str(jobs.TRAIN)), "--max-restarts=1")
    job = jobs.start(command)
    line = next(line for line in job.stdout if "takes signals" in line)
    process = int(re.search(r"process (\d+) takes signals", line)[1])
    jobs.wait_for_steps(job, tmp_path, 3)
    os.kill(process, signal.SIGUSR1)
    jobs.wait_for_steps(job, tmp_path, len(jobs.rows(tmp_path)) + 10)
    (saved,) = tmp_path.glob("step-*")
    os.kill(process, signal.SIGTERM)
    result = jobs.finish(job)
    assert result.returncode == 0, result.stdout
    ended = re.search(rf"SIGTERM: {tmp_path}/step-(\d+) holds (\d+) of 400 steps", result.stdout)
    assert ended and int(ended[1]) == int(ended[2]) > int(saved.name.removeprefix("step-"))
    assert f"{ended[2]} steps are done in {tmp_path}" in result.stdout
    assert [row["step"] for row in jobs.rows(tmp_path)] == list(range(1, 401))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 7 --micro-batches 2", "--batch-size must be a multiple of 1 ranks x 2 micro-batches, got 7"),
        ("--replicate 2", "the ranks a multiple of --replicate, got 2"),
        ("--zero-stage 3", "invalid choice: 3"),
        ("--engine ddp", "unrecognized arguments: --engine ddp"),
        ("--data nowhere", "train.py: no such file or folder: nowhere. Pass --data PATH"),
    ],
)
def test_bad_input_ends_with_a_message_and_leaves_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code and message in f"{capsys.readouterr().err} {ended.value.code}"
    assert not (tmp_path / "run").exists()


def test_shared_store_of_torchrun_is_refused_with_restarts(monkeypatch):
    monkeypatch.setattr(train, "MAX_RESTARTS", 3)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        train.start_process_group(timedelta(seconds=1))


def test_default_batch_divides_among_any_number_of_ranks(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--micro-batches", "2"])
    for world_size, batch_size in [(1, 8), (2, 8), (3, 12), (6, 12), (8, 16)]:
        monkeypatch.setattr(train, "WORLD_SIZE", world_size)
        assert train.parse_arguments().batch_size == batch_size
