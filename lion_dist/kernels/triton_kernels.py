"""The fused update: one launch for a whole shard, or for a whole list of tensors.

Each byte is read once and written once. The same three stages as ``reference.py`` (read, update, store), and the same
bits: no fused multiply-add (``enable_fp_fusion=False``), rounding and random bits by integer arithmetic.

Two kernels share one body. ``_flat_kernel`` takes one tensor's pointers as arguments, so that nothing has to be on
the device before it starts. ``_list_kernel`` takes T tensors by a table of their addresses; a program finds its tensor
by a binary search over the tensors' first blocks. A block of BLOCK elements takes the fast path (no masks, 128-bit
accesses) when it is full and its tensors are aligned to 16 bytes; what is left, tails and unaligned views, takes masks.

Never autotune these kernels: autotuning runs a kernel several times, and each run would be a step on live state.
The launch constants below were chosen by a sweep (``python -m lion_dist.benchmarks.update --sweep``).
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_dist.kernels import reference
from lion_dist.kernels.reference import StepScalars

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
INTERPRETER_BLOCK = 1 << 16  # the interpreter pays per block, not per element


@dataclass(frozen=True)
class LaunchShape:
    block: int  # elements per program, a power of two
    num_warps: int
    vector: int  # consecutive elements per thread


# By the widest element that the kernel touches, in bytes, and whether it draws random bits. With 8 fp32 elements a
# thread, stores would go through shared memory and a barrier: Triton stores at most 16 bytes a thread at once. Random
# bits take registers: with 16 elements a thread the kernel needs up to 80 and reached 88 to 94% of the copy.
LAUNCH_SHAPES = {
    (2, False): LaunchShape(block=2048, num_warps=4, vector=8),
    (2, True): LaunchShape(block=1024, num_warps=4, vector=8),
    (4, False): LaunchShape(block=1024, num_warps=4, vector=4),
    (4, True): LaunchShape(block=1024, num_warps=4, vector=4),
}

# Columns of the address table: one row of int64 a tensor.
PARAM, MAIN, EXP_AVG, NUMEL, INDEX_START, STEP = (tl.constexpr(column) for column in range(6))
ROW = tl.constexpr(8)  # padded to 64 bytes, so that a row lies in one cache line
SEARCH_STRIDE = 64  # blocks per entry of the coarse search table
IN_COMMAND = 2**16  # bytes
CAPTURES = 8  # captured calls over gradients that no eager call has seen, per warm-up

MIX_1, MIX_2, MIX_3 = (tl.constexpr(c) for c in (reference.MIX_1, reference.MIX_2, reference.MIX_3))
GOLDEN = tl.constexpr(reference.GOLDEN)
QUIET_NAN = tl.constexpr(reference.BF16_NAN << 16)
TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
}


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
        remainder = tl.load(main, mask=mask).to(tl.int32).to(tl.uint32, bitcast=True)
        p = (_from_bf16(tl.load(param, mask=mask)) + remainder).to(tl.float32, bitcast=True)
    else:
        p = tl.load(main, mask=mask)
    return p, m, g * grad_scale


@triton.jit
def _step_param(p, c, lr, decay):
    """The step is lr with the sign of c, and 0 where c is 0 or NaN."""
    signed_lr = (_bits(lr) | (_bits(c) & 0x80000000)).to(tl.float32, bitcast=True)
    return p * decay - tl.where(tl.abs(c) > 0, signed_lr, 0.0)


@triton.jit
def _step_block(p, m, g, scalars):  # [n] fp32, g scaled
    """New p and m, and where the gradient is finite. An element without a finite gradient keeps its values; rounding
    them again gives their old bits."""
    lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, _ = scalars
    finite = tl.abs(g) < float("inf")
    c = m * beta1 + g * one_minus_beta1
    new_p = _step_param(p, c, lr, decay)
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
def _update_block(
    param,  # pointers to fp32 | bf16 | fp16
    main,  # fp32 | int16, or None
    exp_avg,  # fp32 | bf16
    grad,  # fp32 | bf16 | fp16
    start,  # int64, the first element
    offsets,  # [BLOCK] int32, from there
    mask,  # [BLOCK] bool, or None: all
    random,  # [BLOCK] uint32, or None
    scalars,  # from _read_scalars
    STOCHASTIC_MOMENTUM: tl.constexpr,
):
    ALIGNED: tl.constexpr = mask is None
    param = _pointers(param, start, offsets, ALIGNED)
    exp_avg = _pointers(exp_avg, start, offsets, ALIGNED)
    grad = _pointers(grad, start, offsets, ALIGNED)
    if main is not None:
        main = _pointers(main, start, offsets, ALIGNED)
    p, m, g = _read_block(param, main, exp_avg, grad, mask, scalars[6])
    new_p, new_m, finite = _step_block(p, m, g, scalars)
    _store_exp_avg(exp_avg, new_m, mask, random, STOCHASTIC_MOMENTUM)
    _store_param(param, main, new_p, finite, mask, random)


@triton.jit
def _update_tensor(
    block,  # which block of the tensor this program updates
    param,  # pointers, as in _update_block
    main,
    exp_avg,
    grad,
    numel,  # int64
    index_start,  # int64, canonical index of the first element
    step,  # pointer to int64, completed steps; or None
    seed_key,  # int32, reference.seed_key_int()
    scalars,
    STOCHASTIC_MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    STOCHASTIC: tl.constexpr = STOCHASTIC_MOMENTUM or (main is None and param.dtype.element_ty == tl.bfloat16)
    start = block.to(tl.int64) * BLOCK
    index = index_start + start
    addresses = param.to(tl.int64) | exp_avg.to(tl.int64) | grad.to(tl.int64)
    if main is not None:
        addresses |= main.to(tl.int64)
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
        _update_block(param, main, exp_avg, grad, start, offsets, None, random, scalars, STOCHASTIC_MOMENTUM)
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
                start,
                piece,
                piece < numel - start,
                masked_random,
                scalars,
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
    *("search_table", "lr", "decay", "grad_scale", "skip", "active", "seed_key"),
]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _flat_kernel(
    param,
    main,
    exp_avg,
    grad,
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
    seed_key: tl.int32,
    SCALARS_ON_DEVICE: tl.constexpr,
    STOCHASTIC_MOMENTUM: tl.constexpr,
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
            numel,
            index_start,
            step,
            seed_key,
            scalars,
            STOCHASTIC_MOMENTUM,
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
    seed_key: tl.int32,
    PARAM_DTYPE: tl.constexpr,
    MAIN_DTYPE: tl.constexpr,
    EXP_AVG_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    SCALARS_ON_DEVICE: tl.constexpr,
    STOCHASTIC_MOMENTUM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    scalars = _read_scalars(lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, grad_scale, SCALARS_ON_DEVICE)
    i = _find_tensor(tl.program_id(0), first_blocks, search_table, STRIDE)
    if _takes_part(skip, active, i):
        row = rows + i * ROW
        main = None
        if MAIN_DTYPE is not None:
            main = tl.load(row + MAIN).to(tl.pointer_type(MAIN_DTYPE))
        step = None
        if STOCHASTIC_MOMENTUM or (MAIN_DTYPE is None and PARAM_DTYPE == tl.bfloat16):
            step = tl.load(row + STEP).to(tl.pointer_type(tl.int64))
        _update_tensor(
            tl.program_id(0) - tl.load(first_blocks + i),
            tl.load(row + PARAM).to(tl.pointer_type(PARAM_DTYPE)),
            main,
            tl.load(row + EXP_AVG).to(tl.pointer_type(EXP_AVG_DTYPE)),
            tl.load(grads + i).to(tl.pointer_type(GRAD_DTYPE)),
            tl.load(row + NUMEL),
            tl.load(row + INDEX_START),
            step,
            seed_key,
            scalars,
            STOCHASTIC_MOMENTUM,
            BLOCK,
            MASKED_BLOCK,
            VECTOR,
        )


# ---------------------------------------------------------------------------------------------------------------
# The host's side.


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """To ``device`` without waiting for it.

    CUDA takes up to 64 KiB of pageable memory along with the command. More goes through pinned memory, which the
    caching host allocator keeps until it has been read.
    """
    if device.type == "cuda" and values.nbytes > IN_COMMAND:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass
class _AddressTable:
    """What ``_list_kernel`` looks up, on the device. Built once per (LionTensors, block).

    The table of gradients is made anew when an address changes: T * 8 bytes, copied without waiting. It is never
    overwritten, because a captured CUDA graph goes on reading the one it was captured with; and it belongs to one
    stream, so that the caching allocators recycle it in that stream's order.
    """

    rows: Tensor  # [T, ROW] int64
    first_blocks: Tensor  # [T] int32
    search_table: Tensor  # int32
    num_blocks: int
    grad_key: tuple | None = None  # (stream, addresses) of ``grads``
    grads: Tensor | None = None  # [T] int64
    capture_staging: list[Tensor] = field(default_factory=list)  # pinned [T] int64, one per captured call
    captured: list[Tensor] = field(default_factory=list)  # what captured graphs read: alive as long as this

    @classmethod
    def build(cls, tensors, block: int) -> _AddressTable:
        numels = torch.tensor([param.numel() for param in tensors.params])
        last_blocks = ((numels + block - 1) // block).cumsum(0)
        num_blocks = int(last_blocks[-1])
        first_blocks = torch.cat([last_blocks.new_zeros(1), last_blocks[:-1]])
        searched = torch.arange(0, num_blocks, SEARCH_STRIDE)
        search_table = torch.searchsorted(first_blocks, searched, right=True) - 1
        search_table = torch.cat([search_table, torch.tensor([len(numels) - 1])])

        rows = torch.zeros(len(numels), ROW.value, dtype=torch.int64)
        columns = {PARAM: tensors.params, MAIN: tensors.mains, EXP_AVG: tensors.exp_avgs, STEP: tensors.steps}
        for column, values in columns.items():
            if values is not None:
                rows[:, column.value] = torch.tensor([tensor.data_ptr() for tensor in values])
        rows[:, NUMEL.value] = numels
        if tensors.index_starts is not None:
            rows[:, INDEX_START.value] = torch.tensor(list(tensors.index_starts))
        tables = (rows, first_blocks.int(), search_table.int())
        return cls(*(_upload(table, tensors.device) for table in tables), num_blocks)

    def grads_on_device(self, grads) -> Tensor:
        addresses = [grad.data_ptr() for grad in grads]
        if not self.rows.is_cuda:
            return torch.tensor(addresses)
        if torch.cuda.is_current_stream_capturing():
            return self._grads_for_capture(addresses)
        key = (torch.cuda.current_stream().cuda_stream, addresses)
        if key != self.grad_key:
            table = torch.frombuffer(array("q", addresses), dtype=torch.int64)  # a quarter of torch.tensor()'s time
            self.grads, self.grad_key = _upload(table, self.rows.device), key
        if not self.capture_staging:
            self.capture_staging = list(torch.empty(CAPTURES, len(addresses), dtype=torch.int64, pin_memory=True))
        return self.grads

    def _grads_for_capture(self, addresses: list[int]) -> Tensor:
        """The eager table when it fits; else one that each replay fills itself, from pinned memory kept for it."""
        if self.grad_key is not None and self.grad_key[1] == addresses:
            self.captured.append(self.grads)
            return self.grads
        if not self.capture_staging:
            raise RuntimeError(
                "a CUDA graph is captured over gradients at addresses that no step has seen, and no pinned memory is "
                "left for their table. Run a step over these gradients before the capture, as torch.cuda.graph's "
                "warm-up does anyway."
            )
        staging = self.capture_staging.pop().copy_(torch.tensor(addresses))
        table = staging.to(self.rows.device, non_blocking=True)
        self.captured += [staging, table]
        return table


def _launch_shape(tensors, grads) -> LaunchShape:
    if INTERPRETED.value:
        largest = max(param.numel() for param in tensors.params)
        return LaunchShape(min(INTERPRETER_BLOCK, triton.next_power_of_2(largest)), num_warps=4, vector=1)
    columns = (tensors.params, tensors.exp_avgs, grads, tensors.mains)
    widest = max(column[0].element_size() for column in columns if column is not None)
    return LAUNCH_SHAPES[widest, tensors.is_stochastic]


def masked_block(shape: LaunchShape) -> int:
    """Elements of a masked piece: four per thread, which needs no more registers than the fast path."""
    return shape.block if INTERPRETED.value else min(shape.block, 4 * 32 * shape.num_warps)


def launch_on(device: torch.device) -> torch.cuda.device:
    """A context in which kernels start on ``device``; on the CPU, for the interpreter, it does nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def update(tensors, grads, scalars: StepScalars, *, grad_scale, skip, active, seed) -> None:
    """Arguments as ``lion_update_``'s, on one GPU (or, in Triton's interpreter, on the CPU)."""
    if all(param.numel() == 0 for param in tensors.params):
        return
    shape = _launch_shape(tensors, grads)
    arguments = {
        "lr": scalars.lr,
        "decay": scalars.decay,
        "beta1": scalars.beta1,
        "one_minus_beta1": 1.0 - scalars.beta1,
        "beta2": scalars.beta2,
        "one_minus_beta2": 1.0 - scalars.beta2,
        "grad_scale": grad_scale,
        "skip": skip,
        "active": active,
        "seed_key": reference.as_int32(reference.seed_key_int(seed)),
        "SCALARS_ON_DEVICE": isinstance(scalars.lr, Tensor),
        "STOCHASTIC_MOMENTUM": tensors.stochastic_momentum,
        "BLOCK": shape.block,
        "MASKED_BLOCK": masked_block(shape),
        "VECTOR": shape.vector,
        "num_warps": shape.num_warps,
        "enable_fp_fusion": False,
    }
    with launch_on(tensors.device):
        if len(tensors.params) == 1:
            _launch_flat(tensors, grads[0], shape, arguments)
        else:
            _launch_list(tensors, grads, shape, arguments)


def _launch_flat(tensors, grad, shape: LaunchShape, arguments: dict) -> None:
    param = tensors.params[0]
    _flat_kernel[(triton.cdiv(param.numel(), shape.block),)](
        param,
        None if tensors.mains is None else tensors.mains[0],
        tensors.exp_avgs[0],
        grad,
        param.numel(),
        0 if tensors.index_starts is None else tensors.index_starts[0],
        tensors.steps if tensors.is_stochastic else None,
        **arguments,
    )


def _launch_list(tensors, grads, shape: LaunchShape, arguments: dict) -> None:
    table = tensors.launch_cache.get(shape.block)
    if table is None:
        if tensors.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is captured over parameters that no step has seen: their table of addresses cannot be "
                "uploaded now. Run a step before the capture, as torch.cuda.graph's warm-up does anyway."
            )
        table = tensors.launch_cache[shape.block] = _AddressTable.build(tensors, shape.block)
    _list_kernel[(table.num_blocks,)](
        table.rows,
        table.grads_on_device(grads),
        table.first_blocks,
        table.search_table,
        PARAM_DTYPE=TL_DTYPES[tensors.params[0].dtype],
        MAIN_DTYPE=None if tensors.mains is None else TL_DTYPES[tensors.mains[0].dtype],
        EXP_AVG_DTYPE=TL_DTYPES[tensors.exp_avgs[0].dtype],
        GRAD_DTYPE=TL_DTYPES[grads[0].dtype],
        STRIDE=SEARCH_STRIDE,
        **arguments,
    )
