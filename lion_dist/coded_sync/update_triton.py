"""The fused update that also writes its codes: every byte of the shard read once and written once, and the digits.

The update of ``triton_backend/kernels.py`` in the order of ``codes_triton.py``: a program works on GROUPS x GROUP bytes
of digits and on as many elements in each of their streams. Where the encoder runs by itself, after the update, a shard
is copied before, and its old and new parameters are read again: 8 bytes a bf16 parameter beside the 14 of the update.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lion_dist.coded_sync import codes_triton
from lion_dist.coded_sync.codes_triton import GROUP, _encode, _rates_and_bits, _write_escapes
from lion_dist.kernels.reference import StepScalars
from lion_dist.triton_backend.blocks import _read_block, _step_block, _store_exp_avg, _store_param
from lion_dist.triton_backend.kernels import _read_scalars
from lion_dist.triton_backend.launch import launch_on


@triton.jit
def _word(x):
    """The bits of a parameter in an int32; 16 of them sign-extended."""
    if x.dtype == tl.float32:
        return x.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit(do_not_specialize=["capacity"])
def _update_and_encode_kernel(
    param,  # [numel] fp32 | bf16 | fp16
    main,  # [numel] fp32 | int16, or None
    exp_avg,  # [numel] fp32 | bf16
    grad,  # [numel] fp32 | bf16 | fp16
    moves,  # [slices] uint8, 0: the slice keeps its values
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    grad_scale,  # [] fp32
    packed,  # and what follows, as in codes_triton._encode_kernel
    group_rows,
    rates,
    keys,
    index_bases,
    stops,
    escape_index,
    escape_bits,
    count,
    numel: tl.int32,
    num_bytes: tl.int32,
    capacity: tl.int32,
    STOCHASTIC_MOMENTUM: tl.constexpr,
    KIND: tl.constexpr,
    RADIX: tl.constexpr,
    PER_BYTE: tl.constexpr,
    CAUTIOUS_WD: tl.constexpr,
    GROUPS: tl.constexpr,
):
    _, _, b1, one_minus_b1, b2, one_minus_b2, scale = _read_scalars(
        0.0, 1.0, beta1, one_minus_beta1, beta2, one_minus_beta2, grad_scale, False
    )
    first = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    byte = first * GROUP + tl.arange(0, GROUP)[None, :]
    in_bytes = first < num_bytes // GROUP
    total = tl.zeros([GROUPS, GROUP], tl.int32)
    for reverse in tl.static_range(PER_BYTE):
        group = first + (PER_BYTE - 1 - reverse) * (num_bytes // GROUP)
        exists = in_bytes & (group < numel // GROUP)
        element, mask, inside, lr, decay, random = _rates_and_bits(
            group_rows, rates, keys, index_bases, stops, group, exists
        )
        row = tl.load(group_rows + group, mask=exists, other=-1)
        moving = mask & (tl.load(moves + row, mask=row >= 0, other=0) != 0)
        old = _word(tl.load(param + element, mask=mask, other=0.0))
        main_at = None
        if main is not None:
            main_at = main + element
        p, m, g = _read_block(param + element, main_at, exp_avg + element, grad + element, moving, scale)
        scalars = (lr, decay, b1, one_minus_b1, b2, one_minus_b2, scale)
        new_p, new_m, finite = _step_block(p, m, g, scalars, None, CAUTIOUS_WD)
        _store_exp_avg(exp_avg + element, new_m, moving, random, STOCHASTIC_MOMENTUM)
        stored = _store_param(param + element, main_at, new_p, finite, moving, random)
        new = tl.where(moving, _word(stored), old)
        digit = _encode(old, new, lr, decay, random, KIND, RADIX, CAUTIOUS_WD)
        _write_escapes(inside & (digit == RADIX), element, new, escape_index, escape_bits, count, capacity)
        total = total * RADIX + tl.where(inside & (digit < RADIX), digit, 0)
    tl.store(packed + byte, total.to(tl.uint8), mask=in_bytes & (byte >= 0))


def update_and_encode(
    codec,
    param: Tensor,
    main: Tensor | None,
    exp_avg: Tensor,
    grad: Tensor,
    scalars: StepScalars,
    *,
    grad_scale: Tensor,
    moves: Tensor,
    steps: Tensor | None,
    stochastic_momentum: bool,
) -> None:
    """See ``shard_codec.ShardCodec.update_and_encode``."""
    widest = max(tensor.element_size() for tensor in (param, exp_avg, grad, main) if tensor is not None)
    arguments = codes_triton.message_arguments(codec, codec.count, widest)
    with launch_on(codec.device):
        _update_and_encode_kernel[(codes_triton.programs(arguments),)](
            param,
            main,
            exp_avg,
            grad,
            moves,
            scalars.beta1,
            1.0 - scalars.beta1,
            scalars.beta2,
            1.0 - scalars.beta2,
            grad_scale,
            keys=None if steps is None else codes_triton.keys_from(codec, steps, codec.fixed[None]),
            STOCHASTIC_MOMENTUM=stochastic_momentum,
            **arguments,
        )
