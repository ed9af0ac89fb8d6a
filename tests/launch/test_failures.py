"""Drills: a rank is killed, stuck or refused. The others say which and end; the job goes on by itself, or ends."""

import json
import math
import re
import statistics
from datetime import timedelta

import pytest

from comparison import journal, ranks
from tests import preloaded
from tests.launch import jobs

KILLED = [(1, "backward", 5), (0, "reduce-scatter", 6), (1, "step", 7), (0, "all-gather", 9), (1, "save", 10)]


@pytest.fixture(scope="module")
def killed(text, once):
    """One job of six attempts: in five of them a rank is killed, each time in another phase."""

    def run(out):
        drills = ",".join(f"{phase}:{rank}:{step}" for rank, phase, step in KILLED)
        flags = ["--data", text, "--steps", 12, "--checkpoint-every", 2, "--log-every", 1, "--resume", "auto"]
        command = jobs.torchrun(2, jobs.DRILL, drills, *jobs.TINY, *flags, "--out", out)
        command.insert(command.index(str(jobs.DRILL)), f"--max-restarts={len(KILLED)}")
        return out, jobs.run(command)

    return once("killed", run)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "phase", "step"), KILLED, ids=[phase for _, phase, _ in KILLED])
def test_when_a_rank_is_killed_the_other_says_so_and_the_job_resumes(killed, rank, phase, step):
    out, result = killed
    assert result.returncode == 0, result.stdout
    after = result.stdout.split(f"drill: rank {rank}, {phase}, step {step}\n")[1].split("drill: ")[0]
    said = re.search(r"compare_engines.py: rank (\d) of 2 failed in (.*?): (.*)", after)
    assert said, after
    assert int(said[1]) == 1 - rank and re.search(r"step \d+", said[2])
    gone = "no word from any: the store" if rank == 0 else "rank 1: no word from it, it was killed"
    assert gone in after
    resumed = re.search(rf"resumed from {out}/step-(\d+)", after)
    assert resumed and step - 4 <= int(resumed[1]) <= step


@pytest.mark.slow
def test_after_five_kills_the_losses_are_those_of_a_run_that_nothing_befell(killed, sharded):
    out, result = killed
    assert jobs.losses(out) == jobs.losses(sharded[0]), result.stdout
    assert "other settings" not in result.stdout


@pytest.fixture(scope="module")
def ill(text, once):
    """Six steps on two ranks. Rank 1 is slow throughout, and has a NaN gradient in step 3."""

    def run(out):
        flags = [*jobs.TINY, "--data", text, "--steps", 6, "--metrics-every", 2, "--out", out]
        result = jobs.run(jobs.torchrun(2, jobs.DRILL, "nan:1:3+slow:1:any", *flags))
        assert result.returncode == 0, result.stdout
        return out, result.stdout

    return once("ill", run)


@pytest.mark.slow
def test_a_nan_gradient_on_one_rank_skips_the_step_on_all(ill):
    out, _ = ill
    summary = json.loads((out / "summary.json").read_text())
    assert summary["skipped_steps"] == 1 and summary["differing"] == {}
    assert [math.isnan(loss) for _, loss, *_ in jobs.losses(out)] == [False] * 6  # the gradient alone was NaN
    assert [math.isfinite(norm) for *_, norm in jobs.losses(out)] == [True, True, False, True, True, True]


@pytest.mark.slow
def test_a_slow_rank_is_measured_and_named(ill):
    out, printed = ill
    measured = [row for row in jobs.rows(out) if "slowest_rank" in row]
    assert [row["step"] for row in measured] == [4, 6]  # the last one measured before each exchange
    for row in measured:
        slowest, own = row["slowest_rank"], row["rank_ms"]
        assert own[1] > 200 and own[slowest] == max(own)
        # Of rank 1, unless the machine has no time for rank 0 either.
        is_slow = own[slowest] > journal.SLOW * statistics.median(own)
        assert is_slow == (f"step {row['step']}: rank {slowest} is slow, {own[slowest]:.1f} ms of its own" in printed)


def test_a_rank_is_slow_above_one_and_a_half_times_the_median():
    assert journal._slow_rank(2, [100.0, 100.0, 149.0]) is None
    named = journal._slow_rank(2, [100.0, 100.0, 151.0])
    assert named == "rank 2 is slow, 151.0 ms of its own a step where the median is 100.0"
    assert journal._slow_rank(None, []) is None


@pytest.fixture
def two_ranks():
    """``two_ranks(flags of each, program)`` starts ranks of two by hand, so that no torchrun ends one when the other
    has ended."""
    store, where = jobs.meeting_place()
    processes = []

    def start(flags_of: list[list[object]], program: list[object]) -> list:
        for rank, flags in enumerate(flags_of):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            command = [preloaded.python(), *map(str, program), *map(str, flags)]
            processes.append(jobs.start(command, jobs.ENVIRONMENT | where | place))
        return processes

    yield start
    for process in processes:
        jobs.end(process)
    del store


@pytest.mark.slow
def test_a_stuck_rank_is_given_up_within_the_timeout_and_named(text, tmp_path, two_ranks):
    """The time-out is also how much later than the other a rank may be ready."""
    flags = [*jobs.TINY, "--data", text, "--steps", 6, "--timeout", 30, "--out", tmp_path]
    well, _ = two_ranks([flags, flags], [jobs.DRILL, "stuck:1:3"])
    result = jobs.finish(well)
    assert result.returncode == 1
    says = r"py: rank 0 of 2 failed in .*step 3: .*waited in vain .*time-out is 30 s.*gradients of .* in step 3"
    assert re.search(says, result.stdout), result.stdout
    assert "rank 1: no word from it, it was killed, is stuck" in result.stdout


@pytest.mark.slow
def test_an_error_of_one_rank_alone_ends_the_other_with_its_reason(text, tmp_path, two_ranks):
    flags = [*jobs.TINY, "--data", text, "--out", tmp_path]
    processes = two_ranks([flags, flags], [jobs.DRILL, "error:1:0"])
    first, second = map(jobs.finish, processes)
    assert (first.returncode, second.returncode) == (1, 1)
    reason = "failed in setting up the engine: ValueError: this rank alone cannot be set up"
    assert f"compare_engines.py: rank 1 of 2 {reason}" in second.stdout
    assert f"  rank 1: {reason}" in first.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--dim", 32, "'--dim' = 32 there, '--dim' = 16 on rank 0"),
        ("--lr", 0.02, "'--lr' = 0.02 there, '--lr' = 0.01 on rank 0"),
        ("--seed", 1, "'--seed' = 1 there, '--seed' = 0 on rank 0"),
    ],
)
def test_a_rank_with_another_model_lr_or_seed_is_refused_at_start(flag, value, message, text, tmp_path, two_ranks):
    flags = [*jobs.TINY, "--data", text, "--out", tmp_path / "run"]
    first, other = map(jobs.finish, two_ranks([flags, [*flags, flag, value]], [jobs.COMPARE]))
    assert (first.returncode, other.returncode) == (2, 2)
    assert "compare_engines.py: rank 1 differs from rank 0" in first.stdout and message in first.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_that_never_starts_is_not_waited_for_longer_than_the_timeout(text, tmp_path, two_ranks):
    flags = [*jobs.TINY, "--data", text, "--timeout", 5, "--out", tmp_path]
    (alone,) = two_ranks([flags], [jobs.COMPARE])
    result = jobs.finish(alone)
    assert result.returncode == 1
    said = r"py: rank 0 found no connection to the other ranks at 127.0.0.1 \(--timeout 5\): .*after 5000ms"
    assert re.search(said, result.stdout), result.stdout


def test_shared_store_of_torchrun_is_refused_with_restarts(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        ranks.start_process_group(timedelta(seconds=1))
