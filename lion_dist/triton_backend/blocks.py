"""What Triton programs do with one block of one tensor: the arithmetic of ``reference.py``, with the same bits.

The same three stages (read, update, store), no fused multiply-add (``enable_fp_fusion=False``), and rounding and random
bits by integer arithmetic. ``kernels.py`` brings blocks and tensors together.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from lion_dist.kernels import reference

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

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
