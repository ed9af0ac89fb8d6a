"""What is exposed, from the kernels of a trace."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lion_dist.benchmarks import overlap
from lion_dist.benchmarks.overlap import exposed_ms, length, union, without
from lion_dist.benchmarks.traces import CAUSES, COMPUTE, Kernel
from tests.benchmarks.test_traces import kernel, label, launch, write

kernels = st.lists(
    st.builds(
        lambda cause, start, duration, sends: Kernel(cause, start, start + duration, sends and cause != COMPUTE),
        st.sampled_from([COMPUTE, *CAUSES]),
        st.integers(0, 50),
        st.integers(1, 20),
        st.booleans(),
    ),
    min_size=1,
    max_size=15,
)


def moments(selected) -> set[int]:
    """The whole microseconds that ``selected`` kernels cover."""
    return {t for k in selected for t in range(int(k.start), int(k.stop))}


@given(kernels)
def test_compute_and_what_is_exposed_add_up_to_the_step(trace):
    row = exposed_ms(trace, steps=1)
    assert row["step"] == pytest.approx(row[COMPUTE] + row["host"] + sum(row[cause] for cause in CAUSES))
    assert min(row.values()) >= 0 and row["hidden_share"] <= 1


@given(kernels)
def test_a_moment_has_the_first_cause_that_runs(trace):
    row, taken = exposed_ms(trace, steps=2), moments(k for k in trace if k.cause == COMPUTE)
    for cause in CAUSES:
        alone = moments(k for k in trace if k.cause == cause) - taken
        assert row[cause] == pytest.approx(len(alone) / 2e3)
        taken |= alone
    assert row["host"] == pytest.approx((row["step"] * 2e3 - len(taken)) / 2e3)


@given(kernels)
def test_hidden_is_what_runs_beside_computation(trace):
    communication = moments(k for k in trace if k.communicates)
    hidden = communication & moments(k for k in trace if k.cause == COMPUTE)
    expected = len(hidden) / len(communication) if communication else 1.0
    assert exposed_ms(trace, steps=1)["hidden_share"] == pytest.approx(expected)


@given(kernels, kernels)
def test_without_leaves_what_the_others_do_not_cover(some, others):
    left = without(union(some), union(others))
    assert length(left) == len(moments(some) - moments(others))


def show(monkeypatch, path) -> None:
    monkeypatch.setattr(sys, "argv", ["overlap", "--trace", str(path), "--steps", "1"])
    overlap.main()


def test_a_trace_file_is_shown_with_what_could_not_be_attributed(tmp_path, monkeypatch, capsys):
    events = [label("update", 0, 5), launch(1, 2), kernel(1, 10), kernel(None, 11), launch(3, 7, "cudaGraphLaunch")]
    show(monkeypatch, write(tmp_path, [*events, kernel(3, 12)]))
    out = capsys.readouterr().out
    assert "1 of 3 kernels, copies and fills have no launch in the trace" in out
    assert "1 of 3 kernels, copies and fills were replayed by CUDA graphs outside every label" in out


def test_a_trace_file_without_labels_ends_the_program_with_a_remedy(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no label lion_dist.* of a phase.*Trace again with ProfilerActivity.CPU"):
        show(monkeypatch, write(tmp_path, [launch(1, 2), kernel(1, 10)]))
