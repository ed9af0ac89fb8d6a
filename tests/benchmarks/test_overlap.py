"""What is exposed, from the kernels of a trace."""

import ast
import functools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lion_dist
from lion_dist.benchmarks.overlap import CAUSES, COMPUTE, SIGNS, Kernel, exposed_ms, length, read_trace, union, without

NAMES = {
    COMPUTE: "nvjet_sm90_gemm",
    "update": "_list_kernel",
    "grad_sync": "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL",
    "param_sync": "ncclDevKernel_AllGather_RING_LL",
    "norm": "ncclDevKernel_AllReduce_Sum_f64_RING_LL",
}
kernels = st.lists(
    st.builds(
        lambda cause, start, duration: Kernel(NAMES[cause], start, start + duration),
        st.sampled_from(list(NAMES)),
        st.integers(0, 50),
        st.integers(1, 20),
    ),
    min_size=1,
    max_size=15,
)


def moments(selected) -> set[int]:
    """The whole microseconds that ``selected`` kernels cover."""
    return {t for k in selected for t in range(int(k.start), int(k.stop))}


@pytest.mark.parametrize("cause", NAMES)
def test_kernels_are_known_by_their_names(cause):
    assert Kernel(NAMES[cause], 0, 1).cause == cause


@functools.cache
def own_kernels() -> set[str]:
    """The Triton kernels of the package: functions that ``@triton.jit`` decorates and that are called kernels."""
    found = set()
    for path in Path(lion_dist.__file__).parent.rglob("*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        jitted = [f.name for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]
        found.update(name for name in jitted if name.endswith("_kernel"))
    return found


def test_kernels_that_are_known_by_name_are_the_packages():
    known = {sign for signs in SIGNS.values() for sign in signs if sign.startswith("_")}
    assert known and known <= own_kernels()


@pytest.mark.parametrize(
    ("kernel", "cause"),
    {
        "_flat_kernel": "update",
        "_list_kernel": "update",
        "_update_and_encode_kernel": "update",
        "_encode_kernel": "update",
        "_ordered_sum_kernel": "grad_sync",
        "_replay_kernel": "param_sync",
        "_escape_kernel": "param_sync",
        "_squares_kernel": "norm",
    }.items(),
)
def test_kernels_of_a_step_have_their_causes(kernel, cause):
    assert kernel in own_kernels() and Kernel(kernel, 0, 1).cause == cause


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


def test_a_trace_is_read_as_the_profiler_writes_it(tmp_path):
    events = [
        {"cat": "kernel", "name": NAMES[COMPUTE], "ts": 10.0, "dur": 5.0, "args": {"stream": 7}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "ts": 15.0, "dur": 1.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1.0, "dur": 4.0},
        {"name": "process_name", "ph": "M"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert [(k.start, k.stop) for k in read_trace(tmp_path / "trace.json")] == [(10.0, 15.0), (15.0, 16.0)]


def test_copies_from_peers_are_told_apart_by_what_lies_between_their_barriers(tmp_path):
    names = ["pack_kernel", "barrier_kernel", "Memcpy PtoP", "_ordered_sum_kernel", "barrier_kernel"]
    names += ["barrier_kernel", "Memcpy PtoP", "Memcpy PtoP", "barrier_kernel"]
    events = [
        {"cat": "gpu_memcpy" if "Memcpy" in name else "kernel", "name": name, "ts": i, "dur": 1, "args": {"stream": 21}}
        for i, name in enumerate(names)
    ]
    events.append({"cat": "gpu_memcpy", "name": "Memcpy PtoP", "ts": 2.5, "dur": 1, "args": {"stream": 7}})
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    found = read_trace(tmp_path / "trace.json")
    assert [k.cause for k in found if k.start != 2.5] == [COMPUTE, *4 * ["grad_sync"], *4 * ["param_sync"]]
    assert [k.communicates for k in found if k.start != 2.5] == [False, True, True, False, *5 * [True]]
    assert [k.cause for k in found if k.start == 2.5] == [COMPUTE]
