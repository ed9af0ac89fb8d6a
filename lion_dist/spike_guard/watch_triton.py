"""The verdict of ``watch.py`` in one launch of one program: by PyTorch operations it is some forty."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_dist.triton_backend.launch import launch_on


@triton.jit
def _enter(
    window,
    entered_at,
    value_at,
    SIGMAS: tl.constexpr,
    LEAST_STD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SpikeWatch._enter of one row; ``value_at`` may be None, and is no spike then. [] int32, and what clips it."""
    is_spike = tl.full([], 0, tl.int32)
    coefficient = tl.full([], 1.0, tl.float64)
    if value_at is not None:
        places = tl.arange(0, BLOCK)
        value = tl.load(value_at).to(tl.float64)
        entered = tl.load(entered_at)
        count = tl.minimum(entered, WINDOW)
        known = places < count
        x = tl.load(window + places, mask=places < WINDOW, other=0.0)
        mean = tl.sum(tl.where(known, x, 0.0), axis=0) / tl.maximum(count, 1.0)
        apart = tl.where(known, x - mean, 0.0)
        variance = tl.sum(apart * apart, axis=0) / tl.maximum(count - 1.0, 1.0)
        limit = mean + SIGMAS * tl.maximum(tl.sqrt(variance), LEAST_STD * tl.abs(mean))
        is_finite = tl.abs(value) < float("inf")
        above = (count >= WINDOW // 2) & (value > limit) & is_finite
        place = entered - WINDOW * tl.floor(entered / WINDOW)
        stored = tl.where(above, limit, value) + tl.zeros_like(x)
        tl.store(window + places, stored, mask=(places.to(tl.float64) == place) & (tl.abs(stored) < float("inf")))
        tl.store(entered_at, entered + is_finite.to(tl.float64))
        is_spike = above.to(tl.int32)
        coefficient = tl.where(above, limit / value, 1.0)
    return is_spike, coefficient


@triton.jit
def _verdict_kernel(
    state,  # [2 * WINDOW + 5] fp64: SpikeWatch.state
    norm,  # [] of any floating-point dtype, or None
    loss,  # the same
    skip,  # [] fp32, or None
    verdict,  # [] fp32
    clip_coefficient,  # [] fp32, or None: a norm that is a spike skips
    SIGMAS: tl.constexpr,
    LEAST_STD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entered, numbers = state + 2 * WINDOW, state + 2 * WINDOW + 2
    is_spike, coefficient = _enter(state, entered, norm, SIGMAS, LEAST_STD, WINDOW, BLOCK)
    must_skip, _ = _enter(state + WINDOW, entered + 1, loss, SIGMAS, LEAST_STD, WINDOW, BLOCK)
    if clip_coefficient is None:
        must_skip |= is_spike
    else:
        tl.store(clip_coefficient, coefficient.to(tl.float32))
    is_spike |= must_skip
    judged = tl.load(numbers) + 1.0
    tl.store(numbers, judged)
    tl.store(numbers + 1, tl.load(numbers + 1) + is_spike.to(tl.float64))
    tl.store(numbers + 2, tl.where(is_spike != 0, judged, tl.load(numbers + 2)))
    result = must_skip != 0
    if skip is not None:
        result |= tl.load(skip) != 0
    tl.store(verdict, result.to(tl.float32))


def verdict(
    state: Tensor, norm: Tensor | None, loss: Tensor | None, skip: Tensor | None, *, clip: bool, **constants
) -> tuple[Tensor, Tensor | None]:
    """The verdict and the clip coefficient. Arguments as ``SpikeWatch.verdict``'s, on one device; ``constants``: the
    kernel's."""
    result = torch.empty((), dtype=torch.float32, device=state.device)
    coefficient = torch.empty_like(result) if clip else None
    with launch_on(state.device):
        constants["BLOCK"] = triton.next_power_of_2(constants["WINDOW"])
        _verdict_kernel[(1,)](
            state, norm, loss, skip, result, coefficient, **constants, num_warps=1, enable_fp_fusion=False
        )
    return result, coefficient
