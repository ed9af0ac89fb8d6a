"""The pool that the other tests stand on: a failure on one rank must be a failure, and must not take others along."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.gloo_workers import GlooPool, RankError


def rank_and_sum(addend: int) -> tuple[int, int, float]:
    total = torch.tensor(float(addend + dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("only here")


def wait_for_a_rank_that_sleeps() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def crash_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


class DiesWhenItIsCollected:
    def __init__(self):
        self.itself = self

    def __del__(self):
        os._exit(9)


def leave_what_dies_later() -> None:
    DiesWhenItIsCollected()


def test_functions_run_on_as_many_ranks_as_asked_for(gloo):
    assert gloo.run(2, rank_and_sum, 10) == [(0, 2, 21.0), (1, 2, 21.0)]
    assert gloo.run(1, rank_and_sum, 10) == [(0, 1, 10.0)]
    assert gloo.run(4, rank_and_sum, 0) == [(rank, 4, 6.0) for rank in range(4)]


def test_error_comes_back_with_its_rank_and_traceback(gloo):
    with pytest.raises(RankError, match="only here") as caught:
        gloo.run(2, fail_on_rank_1)
    assert list(caught.value.errors) == [1]
    assert "fail_on_rank_1" in caught.value.errors[1]
    assert gloo.run(2, rank_and_sum, 0) == [(0, 2, 1.0), (1, 2, 1.0)]


def test_hang_and_death_are_failures_and_the_pool_starts_anew():
    pool = GlooPool()
    try:
        with pytest.raises(RankError, match="did not return in 10.0 s") as caught:
            pool.run(2, wait_for_a_rank_that_sleeps, timeout=10.0)
        assert "wait_for_a_rank_that_sleeps" in caught.value.errors[0]
        with pytest.raises(RankError, match="exit code 7"):
            pool.run(2, die_on_rank_1)  # on new processes
        with pytest.raises(RankError, match="exit code -11(.|\n)*Segmentation fault(.|\n)*crash_on_rank_1"):
            pool.run(2, crash_on_rank_1)
        assert pool.run(2, rank_and_sum, 0) == [(0, 2, 1.0), (1, 2, 1.0)]
    finally:
        pool.stop()


def test_a_rank_that_dies_after_its_task_fails_the_next_one_alone():
    pool = GlooPool()
    try:
        pool.run(1, leave_what_dies_later)
        time.sleep(1.0)
        with pytest.raises(RankError, match="after the task before, the process died with exit code 9"):
            pool.run(1, rank_and_sum, 0)
        assert pool.run(1, rank_and_sum, 0) == [(0, 1, 0.0)]
    finally:
        pool.stop()
