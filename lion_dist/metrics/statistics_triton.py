"""``statistics.py`` on a GPU: one launch for a whole list of tensors, each byte read once, nothing written but sums.

Tensors are found through the update's address table (``triton_backend/launch.py``). Each program goes over BLOCK
elements in pieces, keeps one running sum a lane and column, and writes one row of sums; the rows are added up in a
fixed order, so the result is the same from run to run. Squares are exact in fp64; only the order of their sum differs
from the definition's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_dist.kernels.reference import StepScalars, as_int32, seed_key_int
from lion_dist.triton_backend import launch
from lion_dist.triton_backend.blocks import (
    INTERPRETED,
    _bits,
    _from_bf16,
    _pointers,
    _quiet_bits,
    _random_bits,
    _random_keys,
    _read_block,
    _step_param,
    _upper_half,
)
from lion_dist.triton_backend.kernels import (
    EXP_AVG,
    INDEX_START,
    MAIN,
    NOT_SPECIALIZED,
    NUMEL,
    PARAM,
    ROW,
    STEP,
    _find_tensor,
    _read_scalars,
    _takes_part,
)
from lion_dist.triton_backend.launch import TL_DTYPES, AddressTable, launch_on


@dataclass(frozen=True)
class LaunchShape:
    block: int  # elements per program
    piece: int  # of them at a time, a power of two
    num_warps: int


# Rows of sums are 1/100 of the bytes read. Four elements a thread and piece: 16 bytes of fp32, 8 of bf16.
LAUNCH_SHAPE = LaunchShape(block=8192, piece=512, num_warps=4)


@triton.jit
def _opposite_or_same(x, y):
    """(x and y have opposite signs, x and y have the same sign); neither where one is 0 or NaN."""
    nonzero = (tl.abs(x) > 0) & (tl.abs(y) > 0)
    differ = ((_bits(x) ^ _bits(y)) & 0x80000000) != 0
    return nonzero & differ, nonzero & (differ == 0)


@triton.jit
def _add_piece(
    sums,  # of grad, param, update, exp_avg [PIECE] fp64; flipped, agreement, zero, lost [PIECE] int32
    param,  # pointers, as in blocks._update_block
    main,
    exp_avg,
    grad,
    start,  # int64, the first element
    offsets,  # [PIECE] int32, from there
    mask,  # [PIECE] bool, or None: all
    index,  # int64, global element index of the first element
    keys,  # of the random bits, or None
    scalars,
):
    lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, grad_scale = scalars
    ALIGNED: tl.constexpr = mask is None
    param = _pointers(param, start, offsets, ALIGNED)
    exp_avg = _pointers(exp_avg, start, offsets, ALIGNED)
    grad = _pointers(grad, start, offsets, ALIGNED)
    if main is not None:
        main = _pointers(main, start, offsets, ALIGNED)

    # Update, as in blocks._step_block.
    p, m, g = _read_block(param, main, exp_avg, grad, mask, grad_scale)
    finite = tl.abs(g) < float("inf")
    c = m * beta1 + g * one_minus_beta1
    new_p = tl.where(finite, _step_param(p, c, lr, decay), p)

    # Measure.
    moves = finite & (tl.abs(c) > 0)
    flipped, _ = _opposite_or_same(c, m)
    _, agreement = _opposite_or_same(c, g)
    stored = new_p
    if keys is not None:
        elements = index + start + offsets
        random = _random_bits(elements, elements >> 32, keys)
        word = _quiet_bits(new_p) + (random & 0xFFFF)
        stored = _from_bf16(_upper_half(word)).to(tl.float32, bitcast=True)
    zero, flipped, agreement, lost = moves == 0, moves & flipped, moves & agreement, moves & (stored == p)
    g64, p64, m64 = g.to(tl.float64), p.to(tl.float64), m.to(tl.float64)
    update = new_p.to(tl.float64) - p64
    if mask is not None:
        g64, p64, m64 = tl.where(mask, g64, 0.0), tl.where(mask, p64, 0.0), tl.where(mask, m64, 0.0)
        update = tl.where(mask, update, 0.0)
        zero, flipped, agreement, lost = zero & mask, flipped & mask, agreement & mask, lost & mask
    return (
        sums[0] + g64 * g64,
        sums[1] + p64 * p64,
        sums[2] + update * update,
        sums[3] + m64 * m64,
        sums[4] + flipped.to(tl.int32),
        sums[5] + agreement.to(tl.int32),
        sums[6] + zero.to(tl.int32),
        sums[7] + lost.to(tl.int32),
    )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _statistics_kernel(
    rows,  # these and what follows: as triton_backend.kernels._list_kernel's
    grads,
    first_blocks,
    search_table,
    sums_of_blocks,  # [blocks, COLUMNS] fp64
    lr,
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    grad_scale,
    active,
    seed_key: tl.int32,
    PARAM_DTYPE: tl.constexpr,
    MAIN_DTYPE: tl.constexpr,
    EXP_AVG_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    SCALARS_ON_DEVICE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    scalars = _read_scalars(lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, grad_scale, SCALARS_ON_DEVICE)
    block = tl.program_id(0)
    i = _find_tensor(block, first_blocks, search_table, STRIDE)
    row = rows + i * ROW
    numel = tl.load(row + NUMEL)
    start = (block - tl.load(first_blocks + i)).to(tl.int64) * BLOCK
    index = tl.load(row + INDEX_START)
    param = tl.load(row + PARAM).to(tl.pointer_type(PARAM_DTYPE))
    exp_avg = tl.load(row + EXP_AVG).to(tl.pointer_type(EXP_AVG_DTYPE))
    grad = tl.load(grads + i).to(tl.pointer_type(GRAD_DTYPE))
    addresses = param.to(tl.int64) | exp_avg.to(tl.int64) | grad.to(tl.int64)
    main = None
    if MAIN_DTYPE is not None:
        main = tl.load(row + MAIN).to(tl.pointer_type(MAIN_DTYPE))
        addresses |= main.to(tl.int64)
    keys = None
    if MAIN_DTYPE is None and PARAM_DTYPE == tl.bfloat16:
        keys = _random_keys(seed_key, tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.int64))))

    zeros64, zeros = tl.zeros([PIECE], tl.float64), tl.zeros([PIECE], tl.int32)
    sums = (zeros64, zeros64, zeros64, zeros64, zeros, zeros, zeros, zeros)
    count = tl.minimum(numel - start, BLOCK)
    if _takes_part(None, active, i):
        offsets = tl.arange(0, PIECE)
        if (count == BLOCK) & ((addresses & 15) == 0):
            for first in range(0, BLOCK, PIECE):
                sums = _add_piece(sums, param, main, exp_avg, grad, start + first, offsets, None, index, keys, scalars)
        else:
            for first in range(0, BLOCK, PIECE):
                mask = first + offsets < count
                sums = _add_piece(sums, param, main, exp_avg, grad, start + first, offsets, mask, index, keys, scalars)
    else:
        count = count * 0
    out = sums_of_blocks + block.to(tl.int64) * 9
    tl.store(out, count.to(tl.float64))
    for column in tl.static_range(8):
        tl.store(out + 1 + column, tl.sum(sums[column], axis=0).to(tl.float64))


def _launch_shape(tensors) -> LaunchShape:
    if INTERPRETED.value:  # which pays per block, not per element
        largest = triton.next_power_of_2(max(tensors.numels))
        return LaunchShape(*2 * (min(launch.INTERPRETER_BLOCK, largest),), num_warps=4)
    return LAUNCH_SHAPE


def measure(tensors, grads, scalars: StepScalars, *, grad_scale, active, seed) -> Tensor:
    """Arguments and result as ``statistics.measure``'s, on one GPU (or, in Triton's interpreter, on the CPU)."""
    if not any(tensors.numels):
        return torch.zeros(9, dtype=torch.float64, device=tensors.device)
    shape = _launch_shape(tensors)
    table = tensors.launch_cache.get(shape.block)
    if table is None:
        table = tensors.launch_cache[shape.block] = AddressTable.build(tensors, shape.block)
    sums_of_blocks = torch.empty(table.num_blocks, 9, dtype=torch.float64, device=tensors.device)
    with launch_on(tensors.device):
        _statistics_kernel[(table.num_blocks,)](
            table.rows,
            table.grads_on_device(grads),
            table.first_blocks,
            table.search_table,
            sums_of_blocks,
            lr=scalars.lr,
            decay=scalars.decay,
            beta1=scalars.beta1,
            one_minus_beta1=1.0 - scalars.beta1,
            beta2=scalars.beta2,
            one_minus_beta2=1.0 - scalars.beta2,
            grad_scale=grad_scale,
            active=active,
            seed_key=as_int32(seed_key_int(seed)),
            PARAM_DTYPE=TL_DTYPES[tensors.params[0].dtype],
            MAIN_DTYPE=None if tensors.mains is None else TL_DTYPES[tensors.mains[0].dtype],
            EXP_AVG_DTYPE=TL_DTYPES[tensors.exp_avgs[0].dtype],
            GRAD_DTYPE=TL_DTYPES[grads[0].dtype],
            SCALARS_ON_DEVICE=isinstance(scalars.lr, Tensor),
            STRIDE=launch.SEARCH_STRIDE,
            BLOCK=shape.block,
            PIECE=shape.piece,
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )
    return sums_of_blocks.sum(0)
