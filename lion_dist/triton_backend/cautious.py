"""Cautious Lion's statistic on a GPU: how many elements of each tensor have an update with the gradient's sign.

One launch for all tensors, by the same table of addresses as the update. It reads momentum and gradients once. Counts
are integers, so the order in which programs add theirs does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_dist.kernels.reference import StepScalars
from lion_dist.triton_backend import launch
from lion_dist.triton_backend.blocks import INTERPRETED, _have_same_sign, _load_fp32, _pointers
from lion_dist.triton_backend.kernels import EXP_AVG, NUMEL, ROW, _find_tensor
from lion_dist.triton_backend.launch import (
    TL_DTYPES,
    LaunchShape,
    address_table,
    launch_on,
    launch_shape,
)

PIECES = 4  # a program's blocks of the update's size: fewer programs add to one count


@triton.jit
def _aligned(exp_avg, grad, mask, beta1, one_minus_beta1, grad_scale):
    """[n] int32 of [n] pointers: 1 where the update and a finite gradient have the same sign."""
    m = _load_fp32(exp_avg, mask)
    g = _load_fp32(grad, mask) * grad_scale
    c = m * beta1 + g * one_minus_beta1
    result = (_have_same_sign(c, g) & (tl.abs(g) < float("inf"))).to(tl.int32)
    if mask is not None:
        result = tl.where(mask, result, 0)
    return result


@triton.jit(do_not_specialize=["rows", "grads", "first_blocks", "search_table", "grad_scale", "counts"])
def _count_kernel(
    rows,  # [T, ROW] int64, this and the next three: as kernels._list_kernel's
    grads,
    first_blocks,
    search_table,
    beta1,
    one_minus_beta1,
    grad_scale,  # [] fp32, or None
    counts,  # [T] int64, added to
    EXP_AVG_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    factor = 1.0
    if grad_scale is not None:
        factor = tl.load(grad_scale)
    factor, beta1, one_minus_beta1 = (
        tl.cast(factor, tl.float32),
        tl.cast(beta1, tl.float32),
        tl.cast(one_minus_beta1, tl.float32),
    )
    i = _find_tensor(tl.program_id(0), first_blocks, search_table, STRIDE)
    row = rows + i * ROW
    exp_avg = tl.load(row + EXP_AVG).to(tl.pointer_type(EXP_AVG_DTYPE))
    grad = tl.load(grads + i).to(tl.pointer_type(GRAD_DTYPE))
    start = (tl.program_id(0) - tl.load(first_blocks + i)).to(tl.int64) * BLOCK
    left = tl.load(row + NUMEL) - start
    total = tl.zeros([PIECE], tl.int32)
    if (left >= BLOCK) & (((exp_avg.to(tl.int64) | grad.to(tl.int64)) & 15) == 0):
        offsets = tl.max_contiguous(tl.arange(0, PIECE), VECTOR)
        for first in tl.static_range(0, BLOCK, PIECE):  # unrolled: all loads are under way at once
            m, g = _pointers(exp_avg, start + first, offsets, True), _pointers(grad, start + first, offsets, True)
            total += _aligned(m, g, None, beta1, one_minus_beta1, factor)
    else:
        for first in range(0, BLOCK, PIECE):
            offsets = first + tl.arange(0, PIECE)
            m, g = _pointers(exp_avg, start, offsets, False), _pointers(grad, start, offsets, False)
            total += _aligned(m, g, offsets < left, beta1, one_minus_beta1, factor)
    tl.atomic_add(counts + i, tl.sum(total, axis=0).to(tl.int64), sem="relaxed")


def count_shape(shape: LaunchShape) -> tuple[int, int]:
    """Elements of a program, and of them at a time."""
    return (shape.block, shape.block) if INTERPRETED.value else (PIECES * shape.block, shape.block)


def count_aligned(tensors, grads, scalars: StepScalars, *, grad_scale: Tensor | None) -> Tensor:
    """Arguments as ``update.count_aligned_elements``'s, on one GPU (or, in Triton's interpreter, on the CPU)."""
    counts = torch.zeros(len(tensors.params), dtype=torch.int64, device=tensors.device)
    if not any(tensors.numels):
        return counts
    shape = launch_shape(tensors, grads)
    block, piece = count_shape(shape)
    arguments = {
        "beta1": scalars.beta1,
        "one_minus_beta1": 1.0 - scalars.beta1,
        "grad_scale": grad_scale,
        "counts": counts,
        "EXP_AVG_DTYPE": TL_DTYPES[tensors.exp_avgs[0].dtype],
        "GRAD_DTYPE": TL_DTYPES[grads[0].dtype],
        "STRIDE": launch.SEARCH_STRIDE,  # what the table was built with
        "BLOCK": block,
        "PIECE": piece,
        "VECTOR": shape.vector,
    }
    variant = "count", block, grads[0].dtype, None if grad_scale is None else grad_scale.dtype
    with launch_on(tensors.device):
        table = address_table(tensors, block)
        arguments |= table.arguments(grads)
        compiled = tensors.launch_cache.get(variant)
        if compiled is None:
            options = {"num_warps": shape.num_warps, "enable_fp_fusion": False}
            tensors.launch_cache[variant] = _count_kernel[(table.num_blocks,)](**arguments, **options)
        else:
            compiled[(table.num_blocks, 1, 1)](*map(arguments.get, _count_kernel.arg_names))
    return counts
