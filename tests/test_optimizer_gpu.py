"""``Lion.step()`` on a GPU: the host never waits, and a CUDA graph of it replays under a schedule."""

import time

import pytest
import torch
from torch import nn

from lion_dist import Lion, PrecisionPolicy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

POLICIES = {
    "fp32": (torch.float32, PrecisionPolicy()),
    "fp32 main": (torch.bfloat16, PrecisionPolicy(main_params="fp32")),
    "split": (torch.bfloat16, PrecisionPolicy()),
    "none, stochastic momentum": (torch.bfloat16, PrecisionPolicy(main_params="none", momentum_rounding="stochastic")),
}
SHAPES = [(100, 70), (3,), (1,), (513, 9)]


def params_with_grads(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, device="cuda", generator=generator).to(dtype)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn(param.shape, device="cuda", generator=generator).to(dtype)
    return params


def in_two_groups(params: list[nn.Parameter], lr, **arguments) -> Lion:
    return Lion([{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:]}], lr=lr, **arguments)


def assert_same(a: Lion, b: Lion) -> None:
    for one, other in zip(a.state, b.state, strict=True):
        assert torch.equal(one, other)
        for key, value in a.state[one].items():
            assert torch.equal(value, b.state[other][key]), key


@pytest.mark.parametrize("policy", POLICIES)
def test_a_captured_step_replays_under_a_schedule(policy):
    dtype, precision = POLICIES[policy]
    lr = torch.tensor(1e-3, device="cuda")
    captured, eager = (in_two_groups(params_with_grads(dtype), lr, precision=precision) for _ in range(2))
    captured.step()
    eager.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for new_lr in (1e-3, 3e-4, 1e-5):
        lr.fill_(new_lr)
        graph.replay()
        eager.step()
        assert_same(captured, eager)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_captured_step_skips_a_learning_rate_that_cannot_be_used(policy):
    """In one group of two, and without the host looking."""
    dtype, precision = POLICIES[policy]
    lr = torch.tensor(1e-3, device="cuda")
    captured, eager = (in_two_groups(params_with_grads(dtype), lr.clone(), precision=precision) for _ in range(2))
    for optimizer in (captured, eager):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for new_lr in (1e-3, float("nan"), -1e-3, float("inf"), 1e-4):
        lr.fill_(new_lr)
        graph.replay()
        if new_lr in (1e-3, 1e-4):
            eager.step()
        assert_same(captured, eager)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_goes_on_while_the_device_is_busy(policy):
    """With gradients at new addresses, whose table has to travel to the device."""
    dtype, precision = POLICIES[policy]
    params = params_with_grads(dtype)
    optimizer = in_two_groups(params, 1e-3, precision=precision)
    optimizer.step()
    moved = [param.grad.clone() for param in params]
    for param, grad in zip(params, moved, strict=True):
        param.grad = grad
    torch.cuda.synchronize()
    torch.cuda._sleep(3_000_000_000)  # cycles: more than a second
    busy, started = torch.cuda.Event(), time.perf_counter()
    busy.record()
    optimizer.step()
    assert not busy.query(), f"the step returned after {time.perf_counter() - started:.2f} s, when the device was done"
    torch.cuda.synchronize()


def test_no_call_of_a_step_waits_for_the_device():
    """By the CUDA calls that a profiler sees, GradScaler's skip included: sync debug mode looks at fewer."""
    params = params_with_grads(torch.float32)  # torch unscales no bf16 gradients
    optimizer = in_two_groups(params, torch.tensor(1e-3, device="cuda"))
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.ones((), device="cuda"))
    scaler.step(optimizer)
    scaler.update()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for param in params:
                param.grad = torch.randn_like(param)
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    calls = {event.name for event in trace.events()}
    assert any("Launch" in name for name in calls), calls
    waits = [name for name in calls if "Synchronize" in name]
    # The profiler itself waits once, when it stops.
    assert waits in ([], ["cudaDeviceSynchronize"]), waits


def test_a_capture_before_the_first_step_is_refused():
    optimizer = in_two_groups(params_with_grads(torch.bfloat16), 1e-3)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="Run a step before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_one_launch_updates_all_tensors_that_are_alike():
    params = [nn.Parameter(torch.randn(37, 11, device="cuda", dtype=torch.bfloat16)) for _ in range(147)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Lion(params)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        optimizer.step()
        torch.cuda.synchronize()
    events = [event.name for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert events == ["_list_kernel"]
