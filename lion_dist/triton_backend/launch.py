"""Launching the fused update of ``kernels.py``: its shapes, and the table of addresses that a list is found by.

Never autotune these kernels: autotuning runs a kernel several times, and each run would be a step on live state.
The launch shapes were chosen by a sweep (``python -m lion_dist.benchmarks.update --sweep``).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from lion_dist.kernels import reference
from lion_dist.kernels.reference import StepScalars
from lion_dist.triton_backend.blocks import INTERPRETED
from lion_dist.triton_backend.kernels import (
    AVERAGE,
    EXP_AVG,
    INDEX_START,
    MAIN,
    NUMEL,
    PARAM,
    ROW,
    STEP,
    _flat_kernel,
    _list_kernel,
)

INTERPRETER_BLOCK = 1 << 16  # the interpreter pays per block, not per element
SEARCH_STRIDE = 64  # blocks per entry of the coarse search table
IN_COMMAND = 2**16  # bytes
CAPTURES = 8  # captured calls over gradients that no eager call has seen, per warm-up
TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
}


@dataclass(frozen=True)
class LaunchShape:
    block: int  # elements per program, a power of two
    num_warps: int
    vector: int  # consecutive elements per thread


# By the widest element that the kernel touches, and whether it draws random bits. With 8 fp32 elements a thread, stores
# would go through shared memory and a barrier: Triton stores at most 16 bytes a thread at once. Random bits take
# registers: with 16 elements a thread, rounding the momentum stochastically takes 2.5% longer on an H100. The last two
# are for memory as fast as an H200's, where arithmetic shows: a bf16 average of one bf16 tensor takes 1.42 times the
# plain step instead of 1.48, cautious decay of a list 0.99 instead of 1.04; on an H100 they change 0.6% at most. All
# that was measured is in docs/step-notebook.md.
LAUNCH_SHAPES = {
    "32 bit": LaunchShape(block=1024, num_warps=4, vector=4),
    "16 bit": LaunchShape(block=2048, num_warps=4, vector=8),
    "16 bit, random": LaunchShape(block=1024, num_warps=4, vector=8),
    "16 bit, random, one tensor with an average": LaunchShape(block=512, num_warps=4, vector=8),
    "16 bit, random, a list with cautious decay": LaunchShape(block=2048, num_warps=4, vector=8),
}


def shape_for(widest: int, *, random: bool, average: bool, is_list: bool, cautious_wd: bool) -> LaunchShape:
    """``widest``: bytes of the widest element, 2 or 4."""
    kind = "16 bit, random" if random else "16 bit"
    if random and average and not is_list:
        kind += ", one tensor with an average"
    elif random and cautious_wd and is_list and not average:
        kind += ", a list with cautious decay"
    return LAUNCH_SHAPES[kind if widest == 2 else "32 bit"]


def upload(values: Tensor, device: torch.device) -> Tensor:
    """To ``device`` without waiting for it.

    CUDA takes up to 64 KiB of pageable memory along with the command. More goes through pinned memory, which the
    caching host allocator keeps until it has been read.
    """
    if device.type == "cuda" and values.nbytes > IN_COMMAND:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def addresses_in_capture(addresses: list[int], device: torch.device) -> Tensor:
    """[n] int64, written by each replay of the CUDA graph that is being captured: nothing is copied from the host.

    The graph does not keep it: hold it as long as the graph.
    """
    table = torch.empty(len(addresses), dtype=torch.int64, device=device)
    for row, address in zip(table.unbind(), addresses, strict=True):
        row.fill_(address)
    return table


def current_stream(tensor: Tensor) -> int:
    """On the GPU of ``tensor``. As Triton asks for it: torch.cuda.current_stream() takes 10 us to make an object."""
    return driver.active.get_current_stream(tensor.get_device())


def blocks_of(numels: Tensor, block: int) -> tuple[Tensor, Tensor, int]:
    """What ``_find_tensor`` looks up: the first block of each tensor [T] int32, the coarse search table int32; and how
    many blocks of ``block`` elements tensors of ``numels`` [T] int64 have together."""
    last_blocks = ((numels + block - 1) // block).cumsum(0)
    num_blocks = int(last_blocks[-1])
    first_blocks = torch.cat([last_blocks.new_zeros(1), last_blocks[:-1]])
    searched = torch.arange(0, num_blocks, SEARCH_STRIDE)
    search_table = torch.searchsorted(first_blocks, searched, right=True) - 1
    search_table = torch.cat([search_table, torch.tensor([len(numels) - 1])])
    return first_blocks.int(), search_table.int(), num_blocks


@dataclass
class AddressTable:
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
    def build(cls, tensors, block: int) -> AddressTable:
        numels = torch.tensor([param.numel() for param in tensors.params])
        first_blocks, search_table, num_blocks = blocks_of(numels, block)
        rows = torch.zeros(len(numels), ROW.value, dtype=torch.int64)
        columns = {PARAM: tensors.params, MAIN: tensors.mains, EXP_AVG: tensors.exp_avgs, STEP: tensors.steps}
        columns[AVERAGE] = tensors.averages
        for column, values in columns.items():
            if values is not None:
                rows[:, column.value] = torch.tensor([tensor.data_ptr() for tensor in values])
        rows[:, NUMEL.value] = numels
        if tensors.index_starts is not None:
            rows[:, INDEX_START.value] = torch.tensor(list(tensors.index_starts))
        tables = (rows, first_blocks, search_table)
        return cls(*(upload(table, tensors.device) for table in tables), num_blocks)

    def arguments(self, grads) -> dict[str, Tensor]:
        """Of a kernel that looks up tensors here."""
        return {
            "rows": self.rows,
            "grads": self.grads_on_device(grads),
            "first_blocks": self.first_blocks,
            "search_table": self.search_table,
        }

    def grads_on_device(self, grads) -> Tensor:
        addresses = list(map(Tensor.data_ptr, grads))
        if not self.rows.is_cuda:
            return torch.tensor(addresses)
        if torch.cuda.is_current_stream_capturing():
            return self._grads_for_capture(addresses)
        key = (current_stream(self.rows), addresses)
        if key != self.grad_key:
            table = torch.frombuffer(array("q", addresses), dtype=torch.int64)  # a quarter of torch.tensor()'s time
            self.grads, self.grad_key = upload(table, self.rows.device), key
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
                "left for their table. Run a step over these gradients before the capture, as a warm-up does."
            )
        staging = self.capture_staging.pop().copy_(torch.tensor(addresses))
        table = staging.to(self.rows.device, non_blocking=True)
        self.captured += [staging, table]
        return table


def launch_shape(tensors, grads, cautious_wd: bool = False) -> LaunchShape:
    if INTERPRETED.value:
        largest = max(param.numel() for param in tensors.params)
        return LaunchShape(min(INTERPRETER_BLOCK, triton.next_power_of_2(largest)), num_warps=4, vector=1)
    columns = (tensors.params, tensors.exp_avgs, grads, tensors.mains, tensors.averages)
    widest = max(column[0].element_size() for column in columns if column is not None)
    average, is_list = tensors.averages is not None, len(tensors.params) > 1
    return shape_for(widest, random=tensors.is_stochastic, average=average, is_list=is_list, cautious_wd=cautious_wd)


def masked_block(shape: LaunchShape) -> int:
    """Elements of a masked piece: four per thread, which needs no more registers than the fast path. Less than a block:
    of pieces as long as a block Triton makes one layout with those, and stores go through shared memory."""
    return shape.block if INTERPRETED.value else min(shape.block // 2, 4 * 32 * shape.num_warps)


def launch_on(device: torch.device) -> torch.cuda.device:
    """A context in which kernels start on ``device``; on the CPU, for the interpreter, it does nothing."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def update(
    tensors, grads, scalars: StepScalars, *, grad_scale, skip, active, seed, cautious_lrs=None, cautious_wd=False
) -> None:
    """Arguments as ``lion_update_``'s, on one GPU (or, in Triton's interpreter, on the CPU)."""
    if not any(tensors.numels):
        return
    shape = launch_shape(tensors, grads, cautious_wd)
    on_device = isinstance(scalars.lr, Tensor)
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
        "cautious_lrs": cautious_lrs,
        "ema_decay": tensors.ema_decay,
        "one_minus_ema_decay": None if tensors.ema_decay is None else 1.0 - tensors.ema_decay,
        "seed_key": reference.as_int32(reference.seed_key_int(seed)),
        "SCALARS_ON_DEVICE": on_device,
        "CAUTIOUS_WD": cautious_wd,
        "STOCHASTIC_MOMENTUM": tensors.stochastic_momentum,
        "STOCHASTIC_AVERAGE": tensors.stochastic_average,
        "BLOCK": shape.block,
        "MASKED_BLOCK": masked_block(shape),
        "VECTOR": shape.vector,
    }
    # All that the binary depends on besides ``tensors``; of numbers nothing but their types, which are always the same.
    variant = shape, grads[0].dtype, on_device, *[t if t is None else t.dtype for t in (grad_scale, skip, active)]
    variant += (cautious_lrs is not None, cautious_wd)
    with launch_on(tensors.device):
        if len(tensors.params) == 1:
            kernel, num_blocks, own_arguments = _flat_kernel, *_flat_arguments(tensors, grads[0], shape)
        else:
            kernel, num_blocks, own_arguments = _list_kernel, *_list_arguments(tensors, grads, shape)
        arguments |= own_arguments
        compiled = tensors.launch_cache.get(variant)
        if compiled is None:
            options = {"num_warps": shape.num_warps, "enable_fp_fusion": False}
            tensors.launch_cache[variant] = kernel[(num_blocks,)](**arguments, **options)  # None in the interpreter
        else:  # as above, in a tenth of the host's time: Triton does not look for the binary once more
            compiled[(num_blocks, 1, 1)](*map(arguments.get, kernel.arg_names))


def address_table(tensors, block: int) -> AddressTable:
    """By which programs of ``block`` elements find their tensors; made at the first launch."""
    table = tensors.launch_cache.get(block)
    if table is None:
        if tensors.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is captured over parameters that no step has seen. Run a step before the capture."
            )
        table = tensors.launch_cache[block] = AddressTable.build(tensors, block)
    return table


def _flat_arguments(tensors, grad, shape: LaunchShape) -> tuple[int, dict]:
    """How many blocks there are, and the arguments of ``_flat_kernel`` alone."""
    param = tensors.params[0]
    return triton.cdiv(param.numel(), shape.block), {
        "param": param,
        "main": None if tensors.mains is None else tensors.mains[0],
        "exp_avg": tensors.exp_avgs[0],
        "grad": grad,
        "average": None if tensors.averages is None else tensors.averages[0],
        "numel": param.numel(),
        "index_start": 0 if tensors.index_starts is None else tensors.index_starts[0],
        "step": tensors.steps if tensors.is_stochastic else None,
    }


def _list_arguments(tensors, grads, shape: LaunchShape) -> tuple[int, dict]:
    """How many blocks there are, and the arguments of ``_list_kernel`` alone."""
    table = address_table(tensors, shape.block)
    return table.num_blocks, table.arguments(grads) | {
        "PARAM_DTYPE": TL_DTYPES[tensors.params[0].dtype],
        "MAIN_DTYPE": None if tensors.mains is None else TL_DTYPES[tensors.mains[0].dtype],
        "EXP_AVG_DTYPE": TL_DTYPES[tensors.exp_avgs[0].dtype],
        "GRAD_DTYPE": TL_DTYPES[grads[0].dtype],
        "AVERAGE_DTYPE": None if tensors.averages is None else TL_DTYPES[tensors.averages[0].dtype],
        "STRIDE": SEARCH_STRIDE,
    }
