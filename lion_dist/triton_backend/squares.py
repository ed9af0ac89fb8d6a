"""The sum of squares of a list of tensors on a GPU: one launch, each byte read once, all arithmetic in fp64.

What the global gradient norm needs. ``torch._foreach_norm`` in fp64 has too few bytes in flight: over 676 M bf16
elements it takes 0.75 ms on an H100, this 0.53, the bytes 0.45.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_dist.triton_backend import launch
from lion_dist.triton_backend.blocks import INTERPRETED, _load_fp32, _pointers
from lion_dist.triton_backend.kernels import _find_tensor
from lion_dist.triton_backend.launch import (
    INTERPRETER_BLOCK,
    TL_DTYPES,
    addresses_in_capture,
    blocks_of,
    current_stream,
    launch_on,
    upload,
)

BLOCK, PIECE, NUM_WARPS = 8192, 2048, 4  # elements a program, of them at a time: 16 a thread


@triton.jit(do_not_specialize=["addresses", "numels", "first_blocks", "search_table", "sums_of_blocks"])
def _squares_kernel(
    addresses,  # [T] int64
    numels,  # [T] int64
    first_blocks,  # these two: as kernels._list_kernel's
    search_table,
    sums_of_blocks,  # [blocks] fp64
    DTYPE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    block = tl.program_id(0)
    i = _find_tensor(block, first_blocks, search_table, STRIDE)
    address = tl.load(addresses + i)
    tensor = address.to(tl.pointer_type(DTYPE))
    start = (block - tl.load(first_blocks + i)).to(tl.int64) * BLOCK
    count = tl.load(numels + i) - start
    offsets = tl.arange(0, PIECE)
    sums = tl.zeros([PIECE], tl.float64)
    if (count >= BLOCK) & ((address & 15) == 0):
        for first in tl.static_range(0, BLOCK, PIECE):  # unrolled: all loads are under way at once
            x = _load_fp32(_pointers(tensor, start + first, offsets, True), None).to(tl.float64)
            sums += x * x
    else:
        for first in range(0, BLOCK, PIECE):
            mask = first + offsets < count
            x = _load_fp32(_pointers(tensor, start + first, offsets, False), mask).to(tl.float64)
            sums += tl.where(mask, x * x, 0.0)
    tl.store(sums_of_blocks + block, tl.sum(sums, axis=0))


@dataclass(frozen=True)
class _Tables:
    """The kernel's first arguments. They are of one stream, in whose order the caching allocator recycles them."""

    stream: int | None
    where: list[int]
    addresses: Tensor
    sizes: tuple[Tensor, ...]
    num_blocks: int


class SumOfSquares:
    """A callable that remembers where the tensors of its last lists were, so that the same ones cost one launch."""

    LISTS = 16  # one for each group of ranks and each dtype; of gradients that come and go there is no end

    def __init__(self):
        self._tables: dict[tuple, _Tables] = {}  # by the tensors' dtype, device, block and sizes
        self._captured: list[Tensor] = []  # what captured graphs read

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """[] fp64 on the device, of contiguous fp32, bf16 or fp16 tensors on one device; the same from run to run."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        sums = [self._sums_of_blocks(alike) for alike in by_dtype.values()]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).sum()

    def _sums_of_blocks(self, tensors: list[Tensor]) -> Tensor:
        dtype, device = tensors[0].dtype, tensors[0].device
        block, piece = BLOCK, PIECE
        if INTERPRETED.value:  # which pays per block, not per element
            block = piece = min(INTERPRETER_BLOCK, triton.next_power_of_2(max(1, *(t.numel() for t in tensors))))
        tables = self._tables_of(tensors, block)
        sums = torch.empty(tables.num_blocks, dtype=torch.float64, device=device)
        if tables.num_blocks:
            with launch_on(device):
                _squares_kernel[(tables.num_blocks,)](
                    tables.addresses,
                    *tables.sizes,
                    sums,
                    DTYPE=TL_DTYPES[dtype],
                    STRIDE=launch.SEARCH_STRIDE,
                    BLOCK=block,
                    PIECE=piece,
                    num_warps=NUM_WARPS,  # (fused multiply-add changes nothing: the square of an fp32 is exact in fp64)
                )
        return sums

    def _tables_of(self, tensors: list[Tensor], block: int) -> _Tables:
        device, where = tensors[0].device, [tensor.data_ptr() for tensor in tensors]
        key = (tensors[0].dtype, device, block, numels := tuple(tensor.numel() for tensor in tensors))
        stream = current_stream(tensors[0]) if device.type == "cuda" else None
        known = self._tables.get(key)
        if stream is not None and torch.cuda.is_current_stream_capturing():
            return self._tables_for_capture(known, where, device)
        if known is None or known.stream != stream:
            first_blocks, search_table, num_blocks = blocks_of(torch.tensor(numels), block)
            sizes = [upload(column, device) for column in (torch.tensor(numels), first_blocks, search_table)]
            known = _Tables(stream, [], torch.empty(0), tuple(sizes), num_blocks)
        if known.where != where:
            table = torch.frombuffer(array("q", where), dtype=torch.int64)
            known = replace(known, where=where, addresses=upload(table, device))
            if key not in self._tables and len(self._tables) >= self.LISTS:
                self._tables.clear()
            self._tables[key] = known
        return known

    def _tables_for_capture(self, known: _Tables | None, where: list[int], device: torch.device) -> _Tables:
        if known is None:
            raise RuntimeError("a CUDA graph is captured over gradients of new sizes. Run a step before the capture.")
        addresses = addresses_in_capture(where, device)
        self._captured += [addresses, *known.sizes]
        return replace(known, where=where, addresses=addresses)
