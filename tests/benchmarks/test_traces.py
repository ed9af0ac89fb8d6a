"""Which phase a kernel belongs to: by the label in which the host launched it."""

import gzip
import json

import pytest

from lion_dist.benchmarks.traces import CAUSES, COMPUTE, TraceError, read_trace
from lion_dist.sharding.phases import LABEL, PHASES

FORWARD, BACKWARD = 100, 101  # threads


def label(phase: str, start: float, stop: float, thread: int = FORWARD, name: str = " a .. b") -> dict:
    event = {"cat": "user_annotation", "name": f"{LABEL}{phase}{name}", "ts": start, "dur": stop - start}
    return event | {"ph": "X", "pid": 1, "tid": thread}


def launch(number: int, time: float, name: str = "cudaLaunchKernel", thread: int = FORWARD, cat="cuda_runtime") -> dict:
    event = {"cat": cat, "name": name, "ts": time, "dur": 1, "ph": "X", "pid": 1, "tid": thread}
    return event | {"args": {"correlation": number}}


def kernel(number: int | None, start: float, name: str = "a kernel", cat: str = "kernel") -> dict:
    event = {"cat": cat, "name": name, "ts": start, "dur": 1, "ph": "X", "pid": 0, "tid": 7}
    return event | {"args": {"stream": 7} if number is None else {"stream": 7, "correlation": number}}


def write(folder, events: list[dict]):
    path = folder / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*events, {"name": "process_name", "ph": "M", "pid": 1}]}))
    return path


def causes(folder, events: list[dict]) -> list[str]:
    return [found.cause for found in read_trace(write(folder, events)).kernels]


def test_causes_are_phases_of_the_engine():
    assert set(CAUSES) == set(PHASES) - {"measure", "elsewhere"}


@pytest.mark.parametrize("phase", CAUSES)
@pytest.mark.parametrize(
    ("cat", "call", "api"),
    [
        ("kernel", "cudaLaunchKernel", "cuda_runtime"),
        ("kernel", "cuLaunchKernelEx", "cuda_driver"),
        ("gpu_memcpy", "cudaMemcpyAsync", "cuda_runtime"),
        ("gpu_memset", "cudaMemsetAsync", "cuda_runtime"),
    ],
)
def test_work_belongs_to_the_label_it_was_launched_in(tmp_path, phase, cat, call, api):
    events = [label(phase, 0, 5), launch(1, 2, call, cat=api), kernel(1, 50, cat=cat)]
    assert causes(tmp_path, events) == [phase]


def test_work_launched_outside_every_label_computes(tmp_path):
    events = [label("norm", 3, 5), launch(1, 2), launch(2, 5), kernel(1, 3), kernel(2, 4)]
    assert causes(tmp_path, events) == [COMPUTE, COMPUTE]
    assert read_trace(tmp_path / "trace.json").unattributed == 0


def test_the_innermost_label_counts_and_after_it_the_outer_one_again(tmp_path):
    labels = [label("update", 0, 20), label("param_sync", 4, 8), label("param_sync", 10, 12)]
    launches = [launch(i, time) for i, time in enumerate([1, 5, 9, 11, 15, 25])]
    kernels = [kernel(i, 30 + i) for i in range(6)]
    expected = ["update", "param_sync", "update", "param_sync", "update", COMPUTE]
    assert causes(tmp_path, [*kernels, *launches, *labels]) == expected


def test_a_label_is_of_its_thread_alone(tmp_path):
    labels = [label("norm", 0, 10), label("grad_sync", 2, 8, BACKWARD)]
    launches = [launch(1, 5), launch(2, 5, thread=BACKWARD), launch(3, 9, thread=BACKWARD)]
    kernels = [kernel(i, 20 + i) for i in (1, 2, 3)]
    assert causes(tmp_path, [*labels, *launches, *kernels]) == ["norm", "grad_sync", COMPUTE]


def test_labels_of_others_and_of_the_device_are_no_phase(tmp_path):
    on_device = label("norm", 0, 90, thread=7) | {"cat": "gpu_user_annotation", "pid": 0}
    others = [label("", 1, 4) | {"name": name} for name in ("nccl:_reduce_scatter_base", "update")]
    events = [on_device, label("grad_sync", 0, 5), *others, launch(1, 2), launch(2, 6), kernel(1, 20), kernel(2, 21)]
    assert causes(tmp_path, events) == ["grad_sync", COMPUTE]


def test_what_measures_computes(tmp_path):
    assert causes(tmp_path, [label("measure", 0, 5, name=""), launch(1, 2), kernel(1, 9)]) == [COMPUTE]


def test_kernels_of_a_replayed_graph_belong_to_the_label_of_its_launch(tmp_path):
    events = [label("grad_sync", 0, 5), launch(1, 2, "cudaGraphLaunch"), launch(2, 8, "cudaGraphLaunch")]
    trace = read_trace(write(tmp_path, [*events, *(kernel(1, 10 + i) for i in range(3)), kernel(2, 20)]))
    assert [found.cause for found in trace.kernels] == 3 * ["grad_sync"] + [COMPUTE]
    assert trace.unlabelled_graphs == 1


def test_work_without_a_launch_in_the_trace_is_counted(tmp_path):
    events = [label("norm", 0, 5), launch(1, 2), kernel(1, 9), kernel(None, 10), kernel(44, 11)]
    trace = read_trace(write(tmp_path, events))
    assert [found.cause for found in trace.kernels] == ["norm", COMPUTE, COMPUTE]
    assert trace.unattributed == 2 and len(list(trace.doubts())) == 1


def test_a_trace_without_doubt_says_nothing(tmp_path):
    assert not list(read_trace(write(tmp_path, [label("norm", 0, 5), launch(1, 2), kernel(1, 9)])).doubts())


def test_collectives_communicate_and_packing_does_not(tmp_path):
    launches = [launch(i, i) for i in (1, 2, 3, 8)]
    names = {1: "multi_tensor_apply_kernel", 2: "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", 8: "ncclDevKernel_X"}
    kernels = [*(kernel(i, 20 + i, name) for i, name in names.items()), kernel(3, 23, "Memcpy DtoD", "gpu_memcpy")]
    found = read_trace(write(tmp_path, [label("grad_sync", 0, 5), *launches, *kernels])).kernels
    assert [k.communicates for k in found] == [False, True, False, True]


def test_copies_beside_a_barrier_between_peers_communicate(tmp_path):
    """A replayed reduction: copies, barrier, sum; and a gather beside it; a copy of nobody's."""
    labels = [label("grad_sync", 0, 5), label("param_sync", 6, 9)]
    launches = [launch(1, 2, "cudaGraphLaunch"), launch(2, 7, "cudaGraphLaunch"), launch(3, 12, "cudaMemcpyAsync")]
    reduction = [("Memcpy PtoP", "gpu_memcpy"), ("barrier_kernel", "kernel"), ("_a_sum", "kernel")]
    gather = [("barrier_kernel", "kernel"), ("Memcpy PtoP", "gpu_memcpy"), ("barrier_kernel", "kernel")]
    kernels = [kernel(1, 20 + i, *what) for i, what in enumerate(reduction)]
    kernels += [kernel(2, 30 + i, *what) for i, what in enumerate(gather)]
    kernels.append(kernel(3, 40, "Memcpy PtoP", "gpu_memcpy"))
    found = read_trace(write(tmp_path, [*labels, *launches, *kernels])).kernels
    assert [k.cause for k in found] == [*3 * ["grad_sync"], *3 * ["param_sync"], COMPUTE]
    assert [k.communicates for k in found] == [True, True, False, True, True, True, False]


def test_a_compressed_trace_is_read(tmp_path):
    events = [label("update", 0, 5), launch(1, 2), kernel(1, 10)]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert [(k.cause, k.start, k.stop) for k in read_trace(tmp_path / "trace.json.gz").kernels] == [("update", 10, 11)]


def test_a_trace_without_labels_is_refused(tmp_path):
    with pytest.raises(TraceError, match="1 kernels, copies and fills, and no label .*ProfilerActivity.CPU and .CUDA"):
        read_trace(write(tmp_path, [launch(1, 2), kernel(1, 9)]))


def test_a_trace_without_a_device_is_refused(tmp_path):
    with pytest.raises(TraceError, match="no kernel, copy or fill of a GPU"):
        read_trace(write(tmp_path, [label("norm", 0, 5)]))


def test_a_phase_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(TraceError, match="phases \\['gradients'\\], and this version of lion_dist knows"):
        read_trace(write(tmp_path, [label("gradients", 0, 5), launch(1, 2), kernel(1, 9)]))
