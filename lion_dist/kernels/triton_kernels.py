"""The fused update: one launch for a whole shard, or for a whole list of tensors.

Each byte is read once and written once. The same three stages as ``reference.py`` (read, update, store), and the same
bits: no fused multiply-add (``enable_fp_fusion=False``), rounding and random bits by integer arithmetic.

Two kernels share one body. ``_flat_kernel`` takes one tensor's pointers as arguments, so that nothing has to be on
the device before it starts. ``_list_kernel`` takes T tensors by a table of their addresses; a program finds its tensor
by a binary search over the tensors' first blocks. A block of BLOCK elements takes the fast path (no masks, 128-bit
accesses) when it is full and its tensors are aligned to 16 bytes; what is left, tails and unaligned views, takes masks.

Here is what runs on the GPU; ``triton_launch.py`` is the host's side.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from lion_dist.kernels import reference

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Columns of the address table: one row of int64 a tensor.
PARAM, MAIN, EXP_AVG, NUMEL, INDEX_START, STEP, AVERAGE = (tl.constexpr(column) for column in range(7))
ROW = tl.constexpr(8)  # padded to 64 bytes, so that a row lies in one cache line

MIX_1, MIX_2, MIX_3 = (tl.constexpr(c) for c in (reference.MIX_1, reference.MIX_2, reference.MIX_3))
GOLDEN = tl.constexpr(reference.GOLDEN)
QUIET_NAN = tl.constexpr(reference.BF16_NAN << 16)


# ---------------------------------------------------------------------------------------------------------------
# Random bits, as in reference.py.


@triton.jit
def _mix32(x):  # uint32
    x = (x ^ (x >> 17)) * MIX_1
    x = (x ^ (x >> 11)) * MIX_2
    x = (x ^ (x >> 15)) * MIX_3
    return x ^ (x >> 14)


@triton.jit
def _random_keys(seed_key, step):  # int32: the seed's part, mixed on the host; int64
    key = seed_key.to(tl.uint32, bitcast=True)
    key = _mix32(key ^ step.to(tl.uint32))
    key = _mix32(key ^ (step >> 32).to(tl.uint32))
    return key, _mix32(key ^ GOLDEN)


@triton.jit
def _random_bits(indices, high, keys):  # [n] int64; their upper 32 bits, [n] or []; from _random_keys
    x = indices.to(tl.uint32) ^ keys[0]
    x = (x ^ (x >> 17)) * MIX_1 + (keys[1] + high.to(tl.uint32) * GOLDEN)
    x = (x ^ (x >> 11)) * MIX_2
    x = (x ^ (x >> 15)) * MIX_3
    return x ^ (x >> 14)


# ---------------------------------------------------------------------------------------------------------------
# Rounding. 32-bit words whose upper half is a bf16 stay 32 bits wide until they are stored.


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _quiet_bits(x):
    """The fp32 bits of ``x``, a NaN's such that what is added to the lower half does not carry out of it."""
    return tl.where(x == x, _bits(x), QUIET_NAN)


@triton.jit
def _upper_half(word):
    return (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _round_nearest_even(x):
    if INTERPRETED:  # whose cast truncates
        word = _quiet_bits(x)
        return _upper_half(word + 0x7FFF + ((word >> 16) & 1))
    else:
        return x.to(tl.bfloat16)  # one instruction for two elements; the same bits


@triton.jit
def _from_bf16(x):
    """bf16 -> the 32-bit word of the same value."""
    return x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16


@triton.jit
def _load_fp32(pointers, mask):
    x = tl.load(pointers, mask=mask)
    if x.dtype == tl.bfloat16:
        x = _from_bf16(x).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


# ---------------------------------------------------------------------------------------------------------------
# One block of one tensor.


@triton.jit
def _pointers(base, start, offsets, ALIGNED: tl.constexpr):
    first = base + start
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + offsets


@triton.jit
def _read_block(param, main, exp_avg, grad, mask, grad_scale):  # [n] pointers, main may be None; [n] bool or None; fp32
    """fp32 p (what the update reads), m and the scaled g."""
    g = _load_fp32(grad, mask)
    m = _load_fp32(exp_avg, mask)
    if main is None:
        p = _load_fp32(param, mask)
    elif main.dtype.element_ty == tl.int16:
        remainder, word = tl.load(main, mask=mask).to(tl.int32), _from_bf16(tl.load(param, mask=mask))
        remainder = tl.where((word & 0x7FFFFFFF) == 0, tl.maximum(remainder, 0), remainder)  # reference.join_main
        p = (word + remainder.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        p = tl.load(main, mask=mask)
    return p, m, g * grad_scale


@triton.jit
def _have_same_sign(a, b):
    return ((a > 0) & (b > 0)) | ((a < 0) & (b < 0))


@triton.jit
def _step_param(p, c, lr, decay, CAUTIOUS_WD: tl.constexpr = False):  # lr: fp32 scalar, or [n]
    """The step is lr with the sign of c, and 0 where c is 0 or NaN."""
    signed_lr = (_bits(lr) | (_bits(c) & 0x80000000)).to(tl.float32, bitcast=True)
    step = tl.where(tl.abs(c) > 0, signed_lr, 0.0)
    decayed = p * decay
    if CAUTIOUS_WD:
        decayed = tl.where(_have_same_sign(step, p), decayed, p)
    return decayed - step


@triton.jit
def _step_block(p, m, g, scalars, cautious_lrs=None, CAUTIOUS_WD: tl.constexpr = False):  # [n] fp32, g scaled
    """New p and m, and where the gradient is finite. An element without a finite gradient keeps its values; rounding
    them again gives their old bits."""
    lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, _ = scalars
    finite = tl.abs(g) < float("inf")
    c = m * beta1 + g * one_minus_beta1
    if cautious_lrs is not None:  # a pointer to two
        lr = tl.where(_have_same_sign(c, g), tl.load(cautious_lrs), tl.load(cautious_lrs + 1))
    new_p = _step_param(p, c, lr, decay, CAUTIOUS_WD)
    new_m = m * beta2 + g * one_minus_beta2
    return tl.where(finite, new_p, p), tl.where(finite, new_m, m), finite


@triton.jit
def _store_exp_avg(exp_avg, new_m, mask, random, STOCHASTIC: tl.constexpr):
    if exp_avg.dtype.element_ty == tl.float32:
        tl.store(exp_avg, new_m, mask=mask)
    elif STOCHASTIC:
        tl.store(exp_avg, _upper_half(_quiet_bits(new_m) + (random >> 16)), mask=mask)
    else:
        tl.store(exp_avg, _round_nearest_even(new_m), mask=mask)


@triton.jit
def _store_param(param, main, new_p, finite, mask, random):
    """Returns what ``param`` holds now."""
    PARAM_DTYPE: tl.constexpr = param.dtype.element_ty
    if main is None:
        if PARAM_DTYPE == tl.float32:
            stored = new_p
        else:
            stored = _upper_half(_quiet_bits(new_p) + (random & 0xFFFF))
    elif main.dtype.element_ty == tl.int16:
        word = _quiet_bits(new_p)
        tl.store(main, word.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
        stored = _upper_half(word + 0x8000)
    else:
        if PARAM_DTYPE == tl.bfloat16:
            low_precision = _upper_half(_quiet_bits(new_p) + 0x8000)
        else:
            low_precision = new_p.to(tl.float16)
        # The param may differ from its main param's rounding, and is kept as it is where the gradient is not finite.
        # Everywhere else this load moves nothing.
        kept = (finite == 0) if mask is None else (finite == 0) & mask
        old_param = tl.load(param, mask=kept)
        tl.store(main, new_p, mask=mask)
        stored = tl.where(finite, low_precision, old_param)
    tl.store(param, stored, mask=mask)
    return stored


@triton.jit
def _store_average(average, a, w, finite, mask, random, ema_decay, one_minus_ema_decay):  # [n] pointers; old a, new w
    new_a = a * tl.cast(ema_decay, tl.float32) + w * tl.cast(one_minus_ema_decay, tl.float32)
    new_a = tl.where(finite, new_a, a)
    if average.dtype.element_ty == tl.float32:
        tl.store(average, new_a, mask=mask)
    else:
        own_random = _mix32(random ^ GOLDEN) & 0xFFFF  # reference.average_bits
        tl.store(average, _upper_half(_quiet_bits(new_a) + own_random), mask=mask)


@triton.jit
def _update_block(
    param,  # pointers to fp32 | bf16 | fp16
    main,  # fp32 | int16, or None
    exp_avg,  # fp32 | bf16
    grad,  # fp32 | bf16 | fp16
    average,  # fp32 | bf16, or None
    start,  # int64, the first element
    offsets,  # [BLOCK] int32, from there
    mask,  # [BLOCK] bool, or None: all
    random,  # [BLOCK] uint32, or None
    scalars,  # from _read_scalars
    cautious_lrs,  # pointer to the tensor's two, or None
    ema_decay,  # fp32, this and the next; None without an average
    one_minus_ema_decay,
    CAUTIOUS_WD: tl.constexpr,
    STOCHASTIC_MOMENTUM: tl.constexpr,
):
    ALIGNED: tl.constexpr = mask is None
    param = _pointers(param, start, offsets, ALIGNED)
    exp_avg = _pointers(exp_avg, start, offsets, ALIGNED)
    grad = _pointers(grad, start, offsets, ALIGNED)
    if main is not None:
        main = _pointers(main, start, offsets, ALIGNED)
    if average is not None:
        average = _pointers(average, start, offsets, ALIGNED)
        a = _load_fp32(average, mask)
    p, m, g = _read_block(param, main, exp_avg, grad, mask, scalars[6])
    new_p, new_m, finite = _step_block(p, m, g, scalars, cautious_lrs, CAUTIOUS_WD)
    _store_exp_avg(exp_avg, new_m, mask, random, STOCHASTIC_MOMENTUM)
    stored = _store_param(param, main, new_p, finite, mask, random)
    if average is not None:
        w = new_p
        if main is None and param.dtype.element_ty == tl.bfloat16:
            w = _from_bf16(stored).to(tl.float32, bitcast=True)
        _store_average(average, a, w, finite, mask, random, ema_decay, one_minus_ema_decay)


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


# ---------------------------------------------------------------------------------------------------------------
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
