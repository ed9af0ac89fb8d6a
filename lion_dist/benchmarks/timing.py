"""How long a step takes, on the device and on the host, and how much memory it takes on the way."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Quantiles over the repeats, in ms."""

    median: float
    p10: float
    p90: float
    repeats: int
    host: float | None = None  # median time until step() returns
    host_moved: float | None = None  # the same when every gradient comes at another address
    extra_peak_bytes: int | None = None  # peak of the step above what was held before it

    @classmethod
    def of(cls, times: list[float], **more) -> Timing:
        cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
        return cls(statistics.median(times), cuts[0], cuts[8], len(times), **more)


def time_on_gpu(step: Callable[[], None], repeats: int, budget_s: float = 1.0) -> Timing:
    """Between CUDA events around each of up to ``repeats`` steps; fewer where they would take over ``budget_s``.

    The host is not waited for, so a step that the host cannot issue as fast shows the host's time.
    """
    for _ in range(WARM_UP):
        step()
    extra = _extra_peak_bytes(step)
    host = _host_time(step)
    repeats = max(5, min(repeats, int(1e3 * budget_s / host) if host > 0 else repeats))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    return Timing.of(times, host=host, extra_peak_bytes=extra)


def _extra_peak_bytes(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def _host_time(step: Callable[[], None], before: Callable[[], None] = lambda: None) -> float:
    """Median ms until ``step()`` returns, in bursts of three: the first call after waiting for the device is slower,
    which training does not see, and a longer burst would fill the launch queue. ``before`` runs untimed."""
    times, started = [], time.perf_counter()
    while len(times) < 60 and (len(times) < 6 or time.perf_counter() - started < 1.0):
        torch.cuda.synchronize()
        before()
        step()
        for _ in range(3):
            before()
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def host_time_of_moving_gradients(step: Callable[[], None], params: list[torch.nn.Parameter]) -> float:
    """:func:`time_on_gpu`'s ``host``, with the gradients at other addresses in each call."""
    sets = [[param.grad for param in params], [torch.empty_like(param.grad) for param in params]]

    def swap() -> None:
        sets.reverse()
        for param, grad in zip(params, sets[0], strict=True):
            param.grad = grad

    return _host_time(step, before=swap)


def time_in_graph(step: Callable[[], None], repeats: int, steps: int = 20) -> Timing:
    """Time of one step within replays of a CUDA graph of ``steps``: the device alone, without the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(steps):
            step()
    whole = time_on_gpu(graph.replay, repeats)
    return Timing(whole.median / steps, whole.p10 / steps, whole.p90 / steps, whole.repeats)


Key = TypeVar("Key")


def time_on_cpu(steps: dict[Key, Callable[[], object]], repeats: int) -> dict[Key, Timing]:
    """Wall time; the contenders take turns, so that other load on the machine meets them alike."""
    times: dict[Key, list[float]] = {name: [] for name in steps}
    for repeat in range(-1, repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: Timing.of(values) for name, values in times.items()}


def seconds_of_additions() -> float:
    """How fast the host runs Python: ten million additions."""
    start, total = time.perf_counter(), 0
    for i in range(10_000_000):
        total += i
    return time.perf_counter() - start


def free_gpu_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
