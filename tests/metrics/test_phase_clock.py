"""One timeline cut into phases, by a clock that goes forward a second a look."""

import pytest
import torch

from lion_dist.metrics import phase_clock
from lion_dist.metrics.phase_clock import PhaseClock
from lion_dist.sharding import collectives
from lion_dist.sharding.phases import PHASES


@pytest.fixture
def clock(monkeypatch) -> PhaseClock:
    seconds = iter(range(1000))
    monkeypatch.setattr(phase_clock.time, "perf_counter", lambda: float(next(seconds)))
    return PhaseClock(torch.device("cpu"))


def test_each_moment_belongs_to_the_innermost_phase(clock):
    clock.start()
    with clock.phase("norm"):
        with clock.phase("grad_sync"):
            pass
    clock.stop()
    assert clock.last.ms_by_phase() == dict.fromkeys(PHASES, 0.0) | {"elsewhere": 2e3, "norm": 2e3, "grad_sync": 1e3}


def test_bytes_belong_to_the_phase_in_which_they_were_sent(clock):
    clock.start()
    with clock.phase("update"):
        collectives.count_sent(3)
        with clock.phase("param_sync"):
            collectives.count_sent(40)
        collectives.count_sent(500)
    clock.stop()
    assert clock.last.bytes_by_phase() == dict.fromkeys(PHASES, 0) | {"update": 503, "param_sync": 40}


def test_a_clock_that_does_not_run_looks_at_no_time(clock, monkeypatch):
    monkeypatch.setattr(phase_clock.time, "perf_counter", lambda: pytest.fail("looked at the time"))
    with clock.phase("norm"):
        pass
    clock.stop()
    assert clock.last is None


def test_an_error_ends_its_phase(clock):
    clock.start()
    with pytest.raises(ZeroDivisionError), clock.phase("norm"):
        raise ZeroDivisionError
    clock.stop()
    assert clock.last.ms_by_phase()["elsewhere"] == 2e3
