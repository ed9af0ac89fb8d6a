"""The update codes, fused: one launch encodes a shard, one replays all others (and a short one writes the escapes).

The same bits as ``codes.py``. A program works on GROUPS x GROUP bytes of digits, which belong to as many elements in
each of three or five streams (``codes.DigitLayout``), so every access is contiguous. Which slice an element belongs to
is looked up once a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_dist.coded_sync import codes
from lion_dist.coded_sync.codes import INTEGER
from lion_dist.kernels.reference import as_int32, seed_key_int
from lion_dist.triton_backend.blocks import INTERPRETED, _quiet_bits, _random_bits, _random_keys
from lion_dist.triton_backend.launch import INTERPRETER_BLOCK, launch_on

GROUP = tl.constexpr(codes.GROUP)
FP32, BF16, FP16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KINDS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
GROUPS = {4: 8, 2: 16}  # of a program, by the widest element: with 4 warps, 16 bytes a thread
ESCAPE_BLOCK = 1024
# numel, num_bytes and strides are: they are multiples of 16 always, which makes accesses wide.
NOT_SPECIALIZED = ["rows_a_shard", "own_shard", "seed_key", "capacity", "num_escapes"]


# ---------------------------------------------------------------------------------------------------------------
# Parameters are integers in memory, and 32-bit words in registers.


@triton.jit
def _widen(word, KIND: tl.constexpr):
    """16 bits in an int32 -> fp32."""
    if KIND == BF16:
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _narrow(x, KIND: tl.constexpr):
    """fp32 -> 16 bits of the low-precision copy of a main param, sign-extended to int32."""
    if KIND == BF16:
        return ((_quiet_bits(x) + 0x8000).to(tl.int32, bitcast=True)) >> 16
    else:
        return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _swap_order(word):
    """int32 that holds 16 bits, sign-extended <-> its place in the order of the values."""
    return word ^ ((word >> 15) & 0x7FFF)


@triton.jit
def _least_main(magnitude, KIND: tl.constexpr):
    half_ulp: tl.constexpr = 0x8000 if KIND == BF16 else 0x1000
    return tl.maximum(magnitude.to(tl.int32, bitcast=True) - half_ulp, 0).to(tl.float32, bitcast=True)


@triton.jit
def _round_three(x, random, KIND: tl.constexpr):
    """fp32 -> the bits of an fp32 parameter, or those of a bf16 one rounded stochastically, sign-extended."""
    if KIND == FP32:
        return x.to(tl.int32, bitcast=True)
    else:
        return (_quiet_bits(x) + (random & 0xFFFF)).to(tl.int32, bitcast=True) >> 16


@triton.jit
def _is_nan(word, KIND: tl.constexpr):
    if KIND == FP32:
        return (word & 0x7FFFFFFF) > 0x7F800000
    elif KIND == BF16:
        return (word & 0x7FFF) > 0x7F80
    else:
        return (word & 0x7FFF) > 0x7C00


@triton.jit
def _value_of(word, KIND: tl.constexpr):
    if KIND == FP32:
        return word.to(tl.float32, bitcast=True)
    else:
        return _widen(word, KIND)


# ---------------------------------------------------------------------------------------------------------------
# Elements of one stream of a block.


@triton.jit
def _decay_before(sign, x, decay):
    """Of a step with that sign, under cautious weight decay."""
    return tl.where(((sign > 0) & (x > 0)) | ((sign < 0) & (x < 0)), decay, 1.0)


@triton.jit
def _replay(old, digit, lr, decay, random, KIND: tl.constexpr, RADIX: tl.constexpr, CAUTIOUS_WD: tl.constexpr):
    """int32 words -> int32 words."""
    if RADIX == 3:
        x, sign = _value_of(old, KIND), (digit - 1).to(tl.float32)
        if CAUTIOUS_WD:
            decay = _decay_before(sign, x, decay)
        return _round_three(x * decay - sign * lr, random, KIND)
    else:
        if CAUTIOUS_WD:
            decay = tl.where((digit >= 2) & (digit < 5), decay, 1.0)
        magnitude = _widen(old & 0x7FFF, KIND)
        start = tl.where(digit == 5, magnitude, _least_main(magnitude, KIND))
        step = tl.where(digit < 2, -lr, tl.where(digit < 5, lr, 0.0))
        above = digit - tl.where(digit < 2, 0, tl.where(digit < 5, 2, 5))
        new = _swap_order(_swap_order(_narrow(start * decay - step, KIND)) + above)
        return new ^ (old & 0x8000)


@triton.jit
def _encode(old, new, lr, decay, random, KIND: tl.constexpr, RADIX: tl.constexpr, CAUTIOUS_WD: tl.constexpr):
    """int32 words -> int32 digits, RADIX for an escape."""
    digit = tl.full(old.shape, RADIX, tl.int32)
    if RADIX == 3:
        x = _value_of(old, KIND)
        down, stay, up = x * decay, x * decay, x * decay
        if CAUTIOUS_WD:
            down, stay, up = x * _decay_before(1, x, decay), x, x * _decay_before(-1, x, decay)
        digit = tl.where(_round_three(down - lr, random, KIND) == new, 2, digit)
        digit = tl.where(_round_three(stay - 0.0 * lr, random, KIND) == new, 1, digit)
        digit = tl.where(_round_three(up + lr, random, KIND) == new, 0, digit)
    else:
        magnitude = _widen(old & 0x7FFF, KIND)
        low = _least_main(magnitude, KIND)
        kept = decay
        if CAUTIOUS_WD:
            kept = 1.0
        now = _swap_order(((new ^ (old & 0x8000)) << 16) >> 16)
        away = now - _swap_order(_narrow(low * kept + lr, KIND))
        towards = now - _swap_order(_narrow(low * decay - lr, KIND))
        stay = now - _swap_order(_narrow(magnitude * kept, KIND))
        digit = tl.where(stay == 0, 5, digit)
        digit = tl.where((towards >= 0) & (towards <= 2), 2 + towards, digit)
        digit = tl.where((away >= 0) & (away <= 1), away, digit)
    return tl.where(_is_nan(new, KIND) | _is_nan(old, KIND), RADIX, digit)


@triton.jit
def _write_escapes(escapes, element, word, escape_index, escape_bits, count, capacity):
    """Counted beyond the capacity too. The order is the GPU's, and of no consequence."""
    place = tl.atomic_add(count + tl.zeros_like(element), 1, mask=escapes)
    stored = escapes & (place < capacity)
    tl.store(escape_index + place, element, mask=stored)
    tl.store(escape_bits + place, word.to(escape_bits.dtype.element_ty), mask=stored)


@triton.jit
def _rates_and_bits(
    group_rows,
    rates,
    keys,
    index_bases,
    stops,
    group,  # [GROUPS, 1] int32, in the shard
    exists,  # [GROUPS, 1] bool
):
    """The elements [GROUPS, GROUP] of some groups: (which, in a group that has a slice, in it, lr, decay, bits).

    Padding is read and written like the elements of its group, so that accesses stay wide; it keeps its values.
    """
    row = tl.load(group_rows + group, mask=exists, other=-1)
    exists = row >= 0
    lr = tl.load(rates + 2 * row, mask=exists, other=0.0)
    decay = tl.load(rates + 2 * row + 1, mask=exists, other=0.0)
    element = group * GROUP + tl.arange(0, GROUP)[None, :]
    mask = exists & (element >= 0)
    random = row  # not read; Triton returns no None in a tuple
    if keys is not None:
        index = tl.load(index_bases + row, mask=exists, other=0) + element
        key_1 = tl.load(keys + 2 * row, mask=exists, other=0).to(tl.uint32, bitcast=True)
        key_2 = tl.load(keys + 2 * row + 1, mask=exists, other=0).to(tl.uint32, bitcast=True)
        random = _random_bits(index, index >> 32, (key_1, key_2))
    inside = element < tl.load(stops + row, mask=exists, other=0)
    return element, mask, inside, lr, decay, random


# ---------------------------------------------------------------------------------------------------------------
# The kernels.


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _keys_kernel(
    steps,  # [shards, ...] int64, each shard's first ``rows_a_shard`` of STRIDE
    keys,  # [shards, rows_a_shard, 2] int32
    rows_a_shard: tl.int32,
    seed_key: tl.int32,
    stride: tl.int64,  # int64 a message
    BLOCK: tl.constexpr,
):
    shard = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows_a_shard
    step = tl.load(steps + shard * stride + row, mask=mask, other=0)
    key_1, key_2 = _random_keys(seed_key, step)
    at = keys + 2 * (shard * rows_a_shard + row)
    tl.store(at, key_1.to(tl.int32, bitcast=True), mask=mask)
    tl.store(at + 1, key_2.to(tl.int32, bitcast=True), mask=mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _encode_kernel(
    old,  # [numel] int16 | int32
    new,  # [numel]
    packed,  # [num_bytes] uint8
    group_rows,  # [numel / GROUP] int32
    rates,  # [rows, 2] fp32
    keys,  # [rows, 2] int32, or None
    index_bases,  # [rows] int64
    stops,  # [rows] int32
    escape_index,  # [capacity] int32
    escape_bits,  # [capacity]
    count,  # [] int32
    numel: tl.int32,
    num_bytes: tl.int32,
    capacity: tl.int32,
    KIND: tl.constexpr,
    RADIX: tl.constexpr,
    PER_BYTE: tl.constexpr,
    CAUTIOUS_WD: tl.constexpr,
    GROUPS: tl.constexpr,
):
    first = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    byte = first * GROUP + tl.arange(0, GROUP)[None, :]
    in_bytes = first < num_bytes // GROUP
    total = tl.zeros([GROUPS, GROUP], tl.int32)
    for reverse in tl.static_range(PER_BYTE):
        group = first + (PER_BYTE - 1 - reverse) * (num_bytes // GROUP)
        element, mask, inside, lr, decay, random = _rates_and_bits(
            group_rows, rates, keys, index_bases, stops, group, in_bytes & (group < numel // GROUP)
        )
        now = tl.load(new + element, mask=mask, other=0).to(tl.int32)
        before = tl.load(old + element, mask=mask, other=0).to(tl.int32)
        digit = _encode(before, now, lr, decay, random, KIND, RADIX, CAUTIOUS_WD)
        _write_escapes(inside & (digit == RADIX), element, now, escape_index, escape_bits, count, capacity)
        total = total * RADIX + tl.where(inside & (digit < RADIX), digit, 0)
    tl.store(packed + byte, total.to(tl.uint8), mask=in_bytes & (byte >= 0))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _replay_kernel(
    flat,  # [shards, numel] int16 | int32
    packed,  # each shard's [num_bytes] uint8
    group_rows,  # [shards, numel / GROUP] int32
    rates,  # each shard's [rows, 2] fp32
    keys,  # [shards, rows, 2] int32, or None
    index_bases,  # [shards, rows] int64
    stops,  # [shards, rows] int32
    numel: tl.int32,
    num_bytes: tl.int32,
    rows_a_shard: tl.int32,
    own_shard: tl.int32,
    stride: tl.int64,  # bytes a message
    KIND: tl.constexpr,
    RADIX: tl.constexpr,
    PER_BYTE: tl.constexpr,
    CAUTIOUS_WD: tl.constexpr,
    GROUPS: tl.constexpr,
):
    shard = tl.program_id(1).to(tl.int64)
    if shard != own_shard:
        flat += shard * numel
        packed += shard * stride
        group_rows += shard * (numel // GROUP)
        rates += shard * (stride // 4)
        if keys is not None:
            keys += shard * 2 * rows_a_shard
        index_bases += shard * rows_a_shard
        stops += shard * rows_a_shard
        first = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
        byte = first * GROUP + tl.arange(0, GROUP)[None, :]
        in_bytes = first < num_bytes // GROUP
        rest = tl.load(packed + byte, mask=in_bytes & (byte >= 0), other=0).to(tl.int32)
        for stream in tl.static_range(PER_BYTE):
            digit = rest % RADIX
            rest = rest // RADIX
            group = first + stream * (num_bytes // GROUP)
            element, mask, inside, lr, decay, random = _rates_and_bits(
                group_rows, rates, keys, index_bases, stops, group, in_bytes & (group < numel // GROUP)
            )
            old = tl.load(flat + element, mask=mask, other=0).to(tl.int32)
            new = _replay(old, digit, lr, decay, random, KIND, RADIX, CAUTIOUS_WD)
            new = tl.where(inside, new, old)
            tl.store(flat + element, new.to(flat.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _escape_kernel(
    flat,  # [shards, numel]
    escape_index,  # each shard's [num_escapes] int32
    escape_bits,  # each shard's [num_escapes]
    numel: tl.int32,
    num_escapes: tl.int32,
    own_shard: tl.int32,
    stride: tl.int64,  # bytes a message
    BLOCK: tl.constexpr,
):
    shard = tl.program_id(1).to(tl.int64)
    if shard != own_shard:
        escape = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = escape < num_escapes
        element = tl.load(escape_index + shard * (stride // 4) + escape, mask=here, other=numel)
        bits_stride = stride // (escape_bits.dtype.element_ty.primitive_bitwidth // 8)
        bits = tl.load(escape_bits + shard * bits_stride + escape, mask=here, other=0)
        tl.store(flat + shard * numel + element, bits, mask=here & (element < numel))


# ---------------------------------------------------------------------------------------------------------------
# The host's side.


@dataclass
class _Tables:
    """Which slice each group of elements belongs to, on the device."""

    group_rows: Tensor  # [shards, numel / GROUP] int32; -1 outside of slices
    index_bases: Tensor  # [shards, rows] int64: global index of a slice's element, less its place in the shard
    stops: Tensor  # [shards, rows] int32: where slices end in their shard; padding follows

    @classmethod
    def build(cls, codec) -> _Tables:
        group_rows = torch.full((len(codec.slices), codec.shard_numel // codes.GROUP), -1, dtype=torch.int32)
        index_bases = torch.zeros(len(codec.slices), codec.rows, dtype=torch.int64)
        stops = torch.zeros(len(codec.slices), codec.rows, dtype=torch.int32)
        for shard, slices in enumerate(codec.slices):
            for s in slices:
                group_rows[shard, s.start // codes.GROUP : -(-s.stop // codes.GROUP)] = s.row
                index_bases[shard, s.row] = s.index_start - s.start
                stops[shard, s.row] = s.stop
        return cls(*(table.to(codec.device) for table in (group_rows, index_bases, stops)))


def tables_of(codec) -> _Tables:
    if codec.tables is None:
        codec.tables = _Tables.build(codec)
    return codec.tables


def shape_of(codec, widest: int) -> dict:
    """``widest``: bytes of the largest element that the kernel reads or writes."""
    num_bytes = codec.layout.num_bytes(codec.shard_numel)
    groups = GROUPS[widest]
    if INTERPRETED.value:
        groups = min(triton.next_power_of_2(num_bytes // codes.GROUP), INTERPRETER_BLOCK // codes.GROUP)
    return {
        "numel": codec.shard_numel,
        "num_bytes": num_bytes,
        "KIND": KINDS[codec.dtype].value,
        "RADIX": codec.layout.radix,
        "PER_BYTE": codec.layout.per_byte,
        "CAUTIOUS_WD": codec.cautious_wd,
        "GROUPS": groups,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }


def programs(shape: dict) -> int:
    return triton.cdiv(shape["num_bytes"], shape["GROUPS"] * codes.GROUP)


def keys_of(codec, messages: Tensor) -> Tensor | None:
    """[shards, rows, 2] int32 of ``messages`` [shards, bytes], where replaying them draws random bits."""
    return keys_from(codec, codec.steps_of(messages[0]), messages) if codec.draws_bits else None


def keys_from(codec, steps: Tensor, messages: Tensor) -> Tensor:
    """[shards, rows, 2] int32; ``steps``: [rows] int64 of the first of ``messages``, the others' a message further."""
    keys = torch.empty(len(messages), codec.rows, 2, dtype=torch.int32, device=codec.device)
    _keys_kernel[(triton.cdiv(codec.rows, 128), len(messages))](
        steps, keys, len(steps), as_int32(seed_key_int(codec.seed)), messages.stride(0) // 8, BLOCK=128
    )
    return keys


def message_arguments(codec, count: Tensor, widest: int) -> dict:
    """Of a kernel that writes this step's message; ``widest`` as for :func:`shape_of`."""
    tables = tables_of(codec)
    return shape_of(codec, widest) | {
        "packed": codec.packed_of(codec.fixed),
        "group_rows": tables.group_rows[codec.shard],
        "rates": codec.rates_of(codec.fixed),
        "index_bases": tables.index_bases[codec.shard],
        "stops": tables.stops[codec.shard],
        "escape_index": codec.escape_index,
        "escape_bits": codec.escape_bits,
        "count": count,
        "capacity": codec.capacity,
    }


def encode(codec, params: Tensor, count: Tensor) -> None:
    """See ``shard_codec.ShardCodec.encode``."""
    arguments, integer = message_arguments(codec, count, codec.dtype.itemsize), INTEGER[codec.dtype]
    with launch_on(codec.device):
        arguments["keys"] = keys_of(codec, codec.fixed[None])
        _encode_kernel[(programs(arguments),)](codec.old.view(integer), params.view(integer), **arguments)


def replay(codec, params: Tensor, messages: Tensor) -> None:
    """See ``shard_codec.ShardCodec.replay``."""
    tables, shape, integer = tables_of(codec), shape_of(codec, codec.dtype.itemsize), INTEGER[codec.dtype]
    first, stride = messages[0], messages.stride(0)
    escape_index, escape_bits = codec.escapes_of(first)
    common = {"own_shard": codec.shard, "stride": stride}
    with launch_on(codec.device):
        _replay_kernel[(programs(shape), len(messages))](
            params.view(integer),
            codec.packed_of(first),
            tables.group_rows,
            codec.rates_of(first),
            keys_of(codec, messages),
            tables.index_bases,
            tables.stops,
            rows_a_shard=codec.rows,
            **common,
            **shape,
        )
        if len(escape_index):
            _escape_kernel[(triton.cdiv(len(escape_index), ESCAPE_BLOCK), len(messages))](
                params.view(integer),
                escape_index,
                escape_bits,
                codec.shard_numel,
                len(escape_index),
                BLOCK=ESCAPE_BLOCK,
                **common,
            )
