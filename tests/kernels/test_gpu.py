"""The compiled kernels on a GPU: bit-identical to the reference, one launch, no waiting, no memory."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lion_dist.kernels.reference import StepScalars
from lion_dist.kernels.update import LionTensors, count_aligned_elements, lion_update_
from lion_dist.triton_backend import launch
from tests.kernels.cases import AVERAGED, BF16, FP32, GRAD_DTYPES, INT16, STORAGES, Case, Storage, assert_same
from tests.kernels.strategies import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BLOCK = max(shape.block for shape in launch.LAUNCH_SHAPES.values())
NUMELS = [3 * BLOCK + 5, 0, 1, BLOCK, 100_003]
STOCHASTIC = Storage(BF16, None, BF16, True)


def to_cpu(tensors: LionTensors) -> LionTensors:
    move = lambda column: None if column is None else [x.cpu() for x in column]  # noqa: E731
    columns = [move(x) for x in (tensors.params, tensors.exp_avgs, tensors.mains)]
    averages = move(tensors.averages), tensors.ema_decay
    return LionTensors(*columns, tensors.index_starts, tensors.steps.cpu(), tensors.stochastic_momentum, *averages)


def check(case: Case, backend: str = "triton", misalignment: int = 0) -> None:
    """On the GPU, against the reference implementation on the CPU."""
    on_gpu = case.to("cuda")
    actual = on_gpu.tensors(misalignment)
    lion_update_(actual, backend=backend, **on_gpu.arguments())
    assert_same(to_cpu(actual), case.expected())


@pytest.mark.parametrize("numels", [NUMELS, [100_003], [4 * BLOCK]], ids=["list", "flat", "flat whole blocks"])
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_every_storage(storage, grad_dtype, numels):
    """The index starts just below 2**32: a block of it has two upper halves."""
    case = Case.make(storage, grad_dtype, numels, index_start=2**32 - BLOCK - 100, step=3, seed=7)
    check(case)
    check(case, "chunked_reference")


@pytest.mark.parametrize("numels", [NUMELS, [4 * BLOCK + 3]], ids=["list", "flat"])
@pytest.mark.parametrize("storage", AVERAGED, ids=str)
def test_every_storage_with_an_average_of_the_weights(storage, numels):
    case = Case.make(storage, BF16, numels, index_start=2**32 - BLOCK - 100, step=3, seed=7)
    check(case)
    check(case, "chunked_reference")


@settings(max_examples=100)  # nearly each compiles its own combination of arguments
@given(case=cases(BLOCK), misalignment=st.sampled_from([0, 0, 1, 8]))
def test_anything(case, misalignment):
    check(case, misalignment=misalignment)


@pytest.mark.parametrize("storage", STORAGES[::2], ids=str)
def test_elements_whose_update_agrees_with_the_gradient_are_counted(storage):
    case = Case.make(storage, BF16, [9 * BLOCK + 5, 0, 1, 4 * BLOCK], grad_scale=torch.tensor(0.37))
    on_gpu = case.to("cuda")
    for misalignment in (0, 1):
        how = {"grad_scale": on_gpu.grad_scale, "backend": "triton"}
        counts = count_aligned_elements(on_gpu.tensors(misalignment), on_gpu.grads, on_gpu.scalars, **how)
        assert counts.tolist() == case.counts().tolist()


@pytest.mark.parametrize("others", [[], [70, BLOCK]], ids=["flat", "list"])
@pytest.mark.parametrize("storage", [Storage(BF16, INT16, BF16), STOCHASTIC], ids=str)
def test_more_elements_than_32_bits_can_count(storage, others):
    """DeepSpeed's FusedLion ends in an illegal memory access at 2**31 + 1024 elements."""
    numel = 2**31 + BLOCK + 5
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    windows = [slice(0, 1000), slice(2**31 - 1000, 2**31 + 1000), slice(numel - BLOCK - 100, numel)]
    small = Case.make(storage, BF16, [1000, *others]).to("cuda")

    def spread(column):  # the first tensor repeated to the full size
        return [column[0].repeat(numel // 1000 + 1)[:numel], *column[1:]]

    grads = spread(small.grads)
    columns = [spread(small.params), spread(small.exp_avgs), None if small.mains is None else spread(small.mains)]
    starts = [0, *(numel + 1000 * i for i in range(len(others)))]
    steps = torch.full((len(starts),), 5, device="cuda")
    big = LionTensors(*columns, starts, steps, storage.stochastic_momentum)

    def cut(column, window):
        return None if column is None else [column[0][window].clone()]

    pieces = [
        LionTensors(*(cut(x, w) for x in columns), [w.start], steps[:1].clone(), storage.stochastic_momentum)
        for w in windows
    ]
    lion_update_(big, grads, small.scalars, backend="triton")
    for piece, window in zip(pieces, windows, strict=True):
        lion_update_(piece, cut(grads, window), small.scalars, backend="chunked_reference")
        found = LionTensors(
            *(cut(x, window) for x in (big.params, big.exp_avgs, big.mains)),
            [window.start],
            big.steps[:1],
            storage.stochastic_momentum,
        )
        assert_same(found, piece)


def gpu_case(storage=STOCHASTIC, numels=NUMELS, **arguments) -> Case:
    return Case.make(storage, storage.param, numels, **arguments).to("cuda")


@pytest.mark.parametrize("numels", [NUMELS, [5000]], ids=["list", "flat"])
def test_the_host_never_waits(numels):
    """Also when gradients come back at other addresses, and when lr, scale, skip and active live on the device."""
    active = torch.ones(len(numels))
    case = gpu_case(
        numels=numels,
        scalars=StepScalars.from_group(torch.tensor(1e-3), (0.9, 0.99), 0.1),
        grad_scale=torch.tensor(0.5),
        skip=torch.tensor(0.0),
        active=active,
    )
    tensors = case.tensors()
    lion_update_(tensors, backend="triton", **case.arguments())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            moved = replace(case, grads=[grad.clone() for grad in case.grads])
            lion_update_(tensors, backend="triton", **moved.arguments())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_list_is_one_launch():
    case = gpu_case(Storage(BF16, INT16, BF16), 50 * [1000])
    tensors = case.tensors()
    lion_update_(tensors, backend="triton", **case.arguments())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        lion_update_(tensors, backend="triton", **case.arguments())
        torch.cuda.synchronize()
    events = [event.name for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert events == ["_list_kernel"]


@pytest.mark.parametrize("numels", [NUMELS, [2**24]], ids=["list", "flat"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_an_update_takes_no_memory(storage, numels):
    case = gpu_case(storage, numels)
    tensors = case.tensors()
    lion_update_(tensors, backend="triton", **case.arguments())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    lion_update_(tensors, backend="triton", **case.arguments())
    assert torch.cuda.max_memory_allocated() - held < 2**20


def capture(step) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("numels", [NUMELS, [5000]], ids=["list", "flat"])
@pytest.mark.parametrize("storage", [Storage(FP32, None, FP32), STOCHASTIC], ids=str)
def test_a_captured_step_replays_under_a_schedule(storage, numels):
    case = gpu_case(storage, numels)
    lr = torch.tensor(1e-3, device="cuda")
    captured, eager = case.tensors(), case.tensors()

    def step(tensors):
        scalars = StepScalars.from_group(lr, (0.9, 0.99), 0.1)
        lion_update_(tensors, backend="triton", **(case.arguments() | {"scalars": scalars}))

    step(captured)
    step(eager)
    graph = capture(lambda: step(captured))
    for new_lr in (1e-3, 5e-4, 1e-4):
        lr.fill_(new_lr)
        for grad in case.grads:
            grad.copy_(torch.randn_like(grad))
        graph.replay()
        step(eager)
        assert_same(captured, eager)


def test_a_capture_over_gradients_that_no_step_has_seen():
    """A captured backward allocates its gradients in the graph's own memory."""
    case = gpu_case()
    captured, eager = case.tensors(), case.tensors()
    lion_update_(captured, backend="triton", **case.arguments())
    lion_update_(eager, backend="triton", **case.arguments())
    static = replace(case, grads=[torch.randn_like(grad) for grad in case.grads])
    graph = capture(lambda: lion_update_(captured, backend="triton", **static.arguments()))
    for _ in range(2):
        graph.replay()
        lion_update_(eager, backend="triton", **static.arguments())
        assert_same(captured, eager)


def test_eager_steps_between_replays_do_not_disturb_the_graph():
    """The table of addresses that a graph reads must outlive, unchanged, what later eager steps look up."""
    case = gpu_case()
    captured, eager = case.tensors(), case.tensors()
    for tensors in (captured, eager):
        lion_update_(tensors, backend="triton", **case.arguments())
    graph = capture(lambda: lion_update_(captured, backend="triton", **case.arguments()))
    for _ in range(3):
        other = replace(case, grads=[torch.randn_like(grad) for grad in case.grads])
        for tensors in (captured, eager):
            lion_update_(tensors, backend="triton", **other.arguments())
        graph.replay()
        lion_update_(eager, backend="triton", **case.arguments())
        assert_same(captured, eager)


@pytest.mark.parametrize("numels", [NUMELS, [5000]], ids=["list", "flat"])
def test_one_group_is_updated_with_one_kind_of_arguments_after_another(numels):
    """Each kind is a binary of its own, and the group remembers which."""
    case = gpu_case(Storage(BF16, INT16, BF16), numels)
    actual, expected = case.tensors(), case.tensors()
    one, active = torch.ones((), device="cuda"), torch.ones(len(numels), device="cuda")
    kinds = [{}, {"grad_scale": one / 2}, {"skip": 0 * one}, {"skip": one}, {"active": active}, {"active": 0 * active}]
    kinds += [{"grad_scale": one, "skip": 0 * one, "active": active}]
    kinds += [{"grads": [grad.to(dtype) for grad in case.grads]} for dtype in GRAD_DTYPES]
    for lr, betas in ((1e-3, (0.9, 0.99)), (1e-3 * one, (0.9, 0.99)), (1e-2, (0, 0)), (0, (0.5, 0.75))):
        kinds += [{"scalars": StepScalars.from_group(lr, betas, 0.1)}]
    for kind in kinds + kinds[::-1]:
        for tensors, backend in ((actual, "triton"), (expected, "chunked_reference")):
            lion_update_(tensors, backend=backend, **(case.arguments() | kind))
        assert_same(actual, expected)


def test_another_stream_reads_the_right_gradients():
    case = gpu_case()
    actual, expected = case.tensors(), case.tensors()
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for k in range(6):
        with torch.cuda.stream(streams[k % 2]):
            lion_update_(actual, backend="triton", **case.arguments())
        torch.cuda.synchronize()
        lion_update_(expected, backend="chunked_reference", **case.arguments())
        assert_same(actual, expected)
