"""SIGTERM saves and ends the run, SIGUSR1 saves and goes on, whichever rank they reach."""

import os
import shutil
import signal
import sys

import pytest

from comparison import preemption
from comparison.preemption import NOTHING, Request, SignalRequests
from tests import preloaded
from tests.launch import jobs


@pytest.fixture
def requests(monkeypatch):
    monkeypatch.setattr(preemption, "SPREAD_SECONDS", 0.1)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    signals = SignalRequests()
    signals.begin_training()
    yield signals
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_noted_until_it_is_taken_once(requests):
    assert requests.take() == NOTHING
    os.kill(os.getpid(), signal.SIGUSR1)
    assert requests.take() == Request(save=1, stop=0)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert requests.take() == Request(save=1, stop=1)
    assert requests.take() == NOTHING


def test_rank_stopped_by_anothers_sigterm_asks_torchrun_to_start_it_again(requests, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert requests.exit_code() == preemption.START_AGAIN
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert requests.exit_code() == 0
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.exit_code() == 0


SIGNAL_AT_THE_FIRST_LINE = """
import os, signal, sys
import compare_engines

say, name = compare_engines.say, sys.argv.pop()

def say_and_signal(text):
    say(text)
    if "takes signals" in text:
        os.kill(os.getpid(), signal.Signals[name])

compare_engines.say = say_and_signal
sys.exit(compare_engines.main())
"""


def run_signalled_at_the_first_line(name: str, text, out):
    flags = [*jobs.TINY, "--engine", "plain", "--data", text, "--steps", 4, "--log-every", 2, "--out", out, name]
    environment = jobs.ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(jobs.COMPARE.parent), *sys.path])}
    command = [preloaded.python(), "-c", SIGNAL_AT_THE_FIRST_LINE, *map(str, flags)]
    return jobs.finish(jobs.start(command, environment))


def test_sigusr1_at_the_line_that_invites_it_is_kept_for_the_first_exchange(text, tmp_path):
    result = run_signalled_at_the_first_line("SIGUSR1", text, tmp_path)
    assert result.returncode == 0, result.stdout
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000002", "step-000004"]


def test_sigterm_during_start_up_ends_the_process_at_once(text, tmp_path):
    """There is nothing to save, and start-up may take longer than a launcher waits."""
    result = run_signalled_at_the_first_line("SIGTERM", text, tmp_path)
    assert result.returncode == -signal.SIGTERM
    assert "takes signals" in result.stdout and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def signalled(text, once):
    """Two ranks: SIGUSR1 reaches rank 1 in step 3, SIGTERM rank 0 in step 7; losses are exchanged every 2 steps."""

    def run(out):
        flags = [*jobs.TINY, "--data", text, "--steps", 12, "--log-every", 2, "--out", out]
        return out, jobs.run(jobs.torchrun(2, jobs.DRILL, "SIGUSR1:1:3+SIGTERM:0:7", *flags))

    return once("signalled", run)


def test_signals_of_one_rank_are_acted_on_by_all_after_the_same_step(signalled, sharded):
    out, result = signalled
    assert result.returncode == 0, result.stdout
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000004", "step-000008"]
    assert "SIGTERM: " in result.stdout and "step-000008 holds 8 of 12 steps" in result.stdout
    assert jobs.losses(out) == jobs.losses(sharded[0])[:8]


@pytest.mark.slow
def test_resumed_after_sigterm_the_losses_are_those_of_a_run_that_nothing_befell(signalled, sharded, text, tmp_path):
    out = shutil.copytree(signalled[0], tmp_path / "run")
    flags = [*jobs.TINY, "--data", text, "--steps", 12, "--resume", "auto", "--keep-last", 2, "--out", out]
    result = jobs.run(jobs.torchrun(2, jobs.COMPARE, *flags))
    assert result.returncode == 0, result.stdout
    assert f"resumed from {out / 'step-000008'}" in result.stdout and "other settings" not in result.stdout
    assert jobs.losses(out) == jobs.losses(sharded[0])
    assert sorted(path.name for path in out.glob("step-*")) == ["step-000008", "step-000012"]


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_checkpoint(text, tmp_path):
    """As Kubernetes and Slurm do. torchrun passes it on, waits for the ranks, and says by its own exit code that the
    job was not finished."""
    flags = [*jobs.TINY, "--data", text, "--steps", 100_000, "--log-every", 1, "--resume", "auto", "--out", tmp_path]
    patient = jobs.ENVIRONMENT | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(jobs.HANG)}  # not 30 s, after which it kills
    process = jobs.start(jobs.torchrun(2, jobs.COMPARE, *flags), patient)
    jobs.wait_for_steps(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    result = jobs.finish(process)
    assert result.returncode != 0
    (checkpoint,) = tmp_path.glob("step-*")
    assert f"SIGTERM: {checkpoint} holds" in result.stdout
    assert not checkpoint.name.endswith(".partial")
