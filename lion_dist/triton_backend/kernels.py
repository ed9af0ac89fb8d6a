"""The fused update: one launch for a whole shard, or for a whole list of tensors.

Each byte is read once and written once; what is done with a block of elements is in ``blocks.py``.

Two kernels share one body. ``_flat_kernel`` takes one tensor's pointers as arguments, so that nothing has to be on
the device before it starts. ``_list_kernel`` takes T tensors by a table of their addresses; a program finds its tensor
by a binary search over the tensors' first blocks. A block of BLOCK elements takes the fast path (no masks, 128-bit
accesses) when it is full and its tensors are aligned to 16 bytes; what is left, tails and unaligned views, takes masks.

Here is what runs on the GPU; ``launch.py`` is the host's side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lion_dist.triton_backend.blocks import _random_bits, _random_keys, _update_block

# Columns of the address table: one row of int64 a tensor.
PARAM, MAIN, EXP_AVG, NUMEL, INDEX_START, STEP, AVERAGE = (tl.constexpr(column) for column in range(7))
ROW = tl.constexpr(8)  # padded to 64 bytes, so that a row lies in one cache line


@triton.jit
def _update_tensor(
    block,  # which block of the tensor this program updates
    param,  # pointers, as in _update_block
    main,
    exp_avg,
    grad,
    average,
    numel,  # int64
    index_start,  # int64, global element index of the first element
    step,  # pointer to int64, completed steps; or None
    seed_key,  # int32, reference.seed_key_int()
    scalars,
    cautious_lrs,  # pointer to the tensor's two, or None
    ema_decay,
    one_minus_ema_decay,
    CAUTIOUS_WD: tl.constexpr,
    STOCHASTIC_MOMENTUM: tl.constexpr,
    STOCHASTIC_AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    STOCHASTIC_STATE: tl.constexpr = STOCHASTIC_MOMENTUM or STOCHASTIC_AVERAGE
    STOCHASTIC: tl.constexpr = STOCHASTIC_STATE or (main is None and param.dtype.element_ty == tl.bfloat16)
    start = block.to(tl.int64) * BLOCK
    index = index_start + start
    addresses = param.to(tl.int64) | exp_avg.to(tl.int64) | grad.to(tl.int64)
    if main is not None:
        addresses |= main.to(tl.int64)
    if average is not None:
        addresses |= average.to(tl.int64)
    fast = (numel - start >= BLOCK) & ((addresses & 15) == 0)
    keys = None
    if STOCHASTIC:
        keys = _random_keys(seed_key, tl.load(step))
        fast &= (index & 0xFFFFFFFF) <= 0x100000000 - BLOCK  # else the block has two upper halves of indices

    if fast:
        offsets = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
        if STOCHASTIC:
            random = _random_bits(index + offsets, index >> 32, keys)
        else:
            random = None
        _update_block(
            param,
            main,
            exp_avg,
            grad,
            average,
            start,
            offsets,
            None,
            random,
            scalars,
            cautious_lrs,
            ema_decay,
            one_minus_ema_decay,
            CAUTIOUS_WD,
            STOCHASTIC_MOMENTUM,
        )
    else:  # in smaller pieces: masked accesses need an address and a predicate an element, hence registers
        for first in range(0, BLOCK, MASKED_BLOCK):
            piece = first + tl.arange(0, MASKED_BLOCK)
            if STOCHASTIC:
                masked_random = _random_bits(index + piece, (index + piece) >> 32, keys)
            else:
                masked_random = None
            _update_block(
                param,
                main,
                exp_avg,
                grad,
                average,
                start,
                piece,
                piece < numel - start,
                masked_random,
                scalars,
                cautious_lrs,
                ema_decay,
                one_minus_ema_decay,
                CAUTIOUS_WD,
                STOCHASTIC_MOMENTUM,
            )


@triton.jit
def _read_scalars(lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, grad_scale, ON_DEVICE: tl.constexpr):
    """fp32, rounded once: arguments are fp32 on a GPU but Python floats in the interpreter."""
    if ON_DEVICE:
        lr, decay = tl.load(lr), tl.load(decay)
    factor = 1.0  # folded away; Triton 3.6 returns no None in a tuple
    if grad_scale is not None:
        factor = tl.load(grad_scale)
    return (
        tl.cast(lr, tl.float32),
        tl.cast(decay, tl.float32),
        tl.cast(beta1, tl.float32),
        tl.cast(one_minus_beta1, tl.float32),
        tl.cast(beta2, tl.float32),
        tl.cast(one_minus_beta2, tl.float32),
        tl.cast(factor, tl.float32),
    )


@triton.jit
def _takes_part(skip, active, i):
    result = tl.full([], True, tl.int1)
    if skip is not None:
        result &= tl.load(skip) == 0
    if active is not None:
        result &= tl.load(active + i) != 0
    return result


# The kernels. Nothing is specialized on the values or the alignment of arguments: every shape runs the same binary.

NOT_SPECIALIZED = [
    *("param", "main", "exp_avg", "grad", "numel", "index_start", "step", "rows", "grads", "first_blocks"),
    *("search_table", "lr", "decay", "grad_scale", "skip", "active", "cautious_lrs", "seed_key"),
    *("average", "ema_decay", "one_minus_ema_decay"),
]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _flat_kernel(
    param,
    main,
    exp_avg,
    grad,
    average,
    numel: tl.int64,
    index_start: tl.int64,
    step,
    lr,  # fp32, or a pointer to it
    decay,  # fp32, or a pointer to it
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    grad_scale,
    skip,
    active,
    cautious_lrs,  # [T, 2] fp32, or None: reference.cautious_lrs
    ema_decay,  # fp32, this and the next; None without averages
    one_minus_ema_decay,
    seed_key: tl.int32,
    SCALARS_ON_DEVICE: tl.constexpr,
    CAUTIOUS_WD: tl.constexpr,
    STOCHASTIC_MOMENTUM: tl.constexpr,
    STOCHASTIC_AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    scalars = _read_scalars(lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, grad_scale, SCALARS_ON_DEVICE)
    if _takes_part(skip, active, 0):
        _update_tensor(
            tl.program_id(0),
            param,
            main,
            exp_avg,
            grad,
            average,
            numel,
            index_start,
            step,
            seed_key,
            scalars,
            cautious_lrs,
            ema_decay,
            one_minus_ema_decay,
            CAUTIOUS_WD,
            STOCHASTIC_MOMENTUM,
            STOCHASTIC_AVERAGE,
            BLOCK,
            MASKED_BLOCK,
            VECTOR,
        )


@triton.jit
def _find_tensor(block, first_blocks, search_table, STRIDE: tl.constexpr):
    """The last tensor whose first block is at most ``block``. (A tensor without elements shares its successor's.)"""
    low = tl.load(search_table + block // STRIDE)
    high = tl.load(search_table + block // STRIDE + 1)
    while low < high:
        middle = (low + high + 1) // 2
        is_past = tl.load(first_blocks + middle) > block
        low = tl.where(is_past, low, middle)
        high = tl.where(is_past, middle - 1, high)
    return low


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _list_kernel(
    rows,  # [T, ROW] int64
    grads,  # [T] int64, addresses
    first_blocks,  # [T] int32
    search_table,  # [blocks / STRIDE + 1] int32
    lr,
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    grad_scale,
    skip,
    active,
    cautious_lrs,  # [T, 2] fp32, or None: reference.cautious_lrs
    ema_decay,  # fp32, this and the next; None without averages
    one_minus_ema_decay,
    seed_key: tl.int32,
    PARAM_DTYPE: tl.constexpr,
    MAIN_DTYPE: tl.constexpr,
    EXP_AVG_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    AVERAGE_DTYPE: tl.constexpr,
    SCALARS_ON_DEVICE: tl.constexpr,
    CAUTIOUS_WD: tl.constexpr,
    STOCHASTIC_MOMENTUM: tl.constexpr,
    STOCHASTIC_AVERAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    scalars = _read_scalars(lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, grad_scale, SCALARS_ON_DEVICE)
    i = _find_tensor(tl.program_id(0), first_blocks, search_table, STRIDE)
    if _takes_part(skip, active, i):
        row = rows + i * ROW
        if cautious_lrs is not None:
            cautious_lrs += 2 * i
        main = None
        if MAIN_DTYPE is not None:
            main = tl.load(row + MAIN).to(tl.pointer_type(MAIN_DTYPE))
        average = None
        if AVERAGE_DTYPE is not None:
            average = tl.load(row + AVERAGE).to(tl.pointer_type(AVERAGE_DTYPE))
        step = None
        STOCHASTIC_STATE: tl.constexpr = STOCHASTIC_MOMENTUM or STOCHASTIC_AVERAGE
        if STOCHASTIC_STATE or (MAIN_DTYPE is None and PARAM_DTYPE == tl.bfloat16):
            step = tl.load(row + STEP).to(tl.pointer_type(tl.int64))
        _update_tensor(
            tl.program_id(0) - tl.load(first_blocks + i),
            tl.load(row + PARAM).to(tl.pointer_type(PARAM_DTYPE)),
            main,
            tl.load(row + EXP_AVG).to(tl.pointer_type(EXP_AVG_DTYPE)),
            tl.load(grads + i).to(tl.pointer_type(GRAD_DTYPE)),
            average,
            tl.load(row + NUMEL),
            tl.load(row + INDEX_START),
            step,
            seed_key,
            scalars,
            cautious_lrs,
            ema_decay,
            one_minus_ema_decay,
            CAUTIOUS_WD,
            STOCHASTIC_MOMENTUM,
            STOCHASTIC_AVERAGE,
            BLOCK,
            MASKED_BLOCK,
            VECTOR,
        )
