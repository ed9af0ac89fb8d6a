"""The sum of every rank's addend, in fp32 and in rank order, on a GPU; and on the way what the gradient norm needs.

This rank's own addend is read where it lies, piece by piece, by a table of addresses; the others' have been received
one after another. A program sums a block of one piece; padding between pieces is neither read nor written.

Sums of squares are taken here of what is stored, in fp64 as everywhere (``triton_backend/squares.py``): to read the
shards again for them would take 0.45 ms of a step (676 M bf16 elements, H100) that nothing else can hide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 2048, 4  # 16 elements a thread

# Columns of the table of pieces: one row of int64 a piece.
FIRST_BLOCK, START, NUMEL = (tl.constexpr(column) for column in range(3))
ROW = tl.constexpr(4)


@triton.jit
def _aligned(base, start):
    """``base + start``, of which Triton is told here what it cannot know: that it is a multiple of 16 bytes."""
    return tl.multiple_of(base + start, 16)


@triton.jit
def _sum_block(
    output,
    own,
    others,
    row_numel,  # elements from one rank's addend to the next, in ``others``
    start,  # of the block, in a shard
    own_start,  # of the block, in the own piece
    mask,  # [BLOCK] bool, or None: all
    own_mask,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ADDS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the sum and returns the sum of its squares, [] fp64."""
    offsets = tl.arange(0, BLOCK)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            pointers = _aligned(own, own_start) + offsets
            if own_mask is None:
                addend = tl.load(pointers)
            else:
                addend = tl.load(pointers, mask=own_mask, other=0.0)
        else:
            row = rank - 1 if rank > RANK else rank
            addend = tl.load(_aligned(others, row * row_numel + start) + offsets, mask=mask)
        if rank == 0:
            total = addend.to(tl.float32)  # not 0 + it, which would turn -0 into 0
        else:
            total += addend.to(tl.float32)
    pointers = _aligned(output, start) + offsets
    if ADDS_UP:
        total = tl.load(pointers, mask=mask) + total
    stored = total.to(output.dtype.element_ty)
    tl.store(pointers, stored, mask=mask)
    x = stored.to(tl.float64)
    if mask is not None:
        x = tl.where(mask, x, 0.0)
    return tl.sum(x * x, axis=0)


@triton.jit(do_not_specialize=["pieces", "piece_of_block", "addresses", "squares", "row_numel"])
def _ordered_sum_kernel(
    output,  # [shard_numel]
    others,  # [RANKS - 1, row_numel]
    squares,  # [blocks] fp64
    pieces,  # [pieces, ROW] int64
    piece_of_block,  # [blocks] int32
    addresses,  # [pieces] int64: where the own addend's pieces lie; 0: it is zeros
    row_numel: tl.int64,
    RANK: tl.constexpr,  # this one's place among the addends
    RANKS: tl.constexpr,
    ADDS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    i = tl.load(piece_of_block + block)
    row = pieces + i * ROW
    done = (block - tl.load(row + FIRST_BLOCK)) * BLOCK
    left = tl.load(row + NUMEL) - done
    start = tl.load(row + START) + done
    address = tl.load(addresses + i)
    own = address.to(tl.pointer_type(others.dtype.element_ty))
    if (left >= BLOCK) & (address != 0):
        total = _sum_block(output, own, others, row_numel, start, done, None, None, RANK, RANKS, ADDS_UP, BLOCK)
    else:
        mask = tl.arange(0, BLOCK) < left
        has_own = tl.arange(0, BLOCK) < tl.where(address != 0, left, 0)  # (Triton 3.9 interprets no mask & scalar)
        total = _sum_block(output, own, others, row_numel, start, done, mask, has_own, RANK, RANKS, ADDS_UP, BLOCK)
    tl.store(squares + block, total)


class OrderedSum:
    """The sums of one shard.

    Args:
        pieces: (start in the shard, numel) of each piece of it; starts are multiples of 16 bytes.
    """

    def __init__(self, pieces: Sequence[tuple[int, int]], device: torch.device):
        starts, numels = torch.tensor(pieces, dtype=torch.int64).view(-1, 2).unbind(1)
        blocks = (numels + BLOCK - 1) // BLOCK
        table = torch.zeros(len(pieces), ROW.value, dtype=torch.int64)
        table[:, FIRST_BLOCK.value] = blocks.cumsum(0) - blocks
        table[:, START.value], table[:, NUMEL.value] = starts, numels
        self._pieces = table.to(device)
        self._piece_of_block = torch.repeat_interleave(blocks).int().to(device)
        self._captured: list[Tensor] = []  # tables that graphs of the program read at every replay

    def squares(self) -> Tensor:
        """[blocks] fp64: room for sums of squares, zeros."""
        return torch.zeros(len(self._piece_of_block), dtype=torch.float64, device=self._pieces.device)

    def table(self, addresses: list[int]) -> Tensor:
        """[pieces] int64, where the own addend's pieces lie: multiples of 16; 0: it is zeros. On the current stream."""
        device = self._pieces.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # no copy from the host, which may move
            table = torch.empty(len(addresses), dtype=torch.int64, device=device)
            for row, address in zip(table.unbind(), addresses, strict=True):
                row.fill_(address)
            self._captured.append(table)
            return table
        return torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)  # taken along by the command

    def __call__(
        self,
        output: Tensor,  # [shard_numel], fp32 or of the addends' dtype, to which it is rounded to nearest even
        squares: Tensor,  # squares(): of each block of what output holds in the end
        others: Tensor,  # [ranks - 1, shard_numel], fp32 or bf16: the other ranks' addends
        own: Tensor,  # table()
        rank: int,  # the own addend's place among them
        *,
        adds_up: bool = False,  # to what fp32 output holds, last
    ) -> None:
        if not len(squares):
            return
        with torch.cuda.device(output.device if output.is_cuda else -1):
            _ordered_sum_kernel[(len(squares),)](
                output,
                others,
                squares,
                self._pieces,
                self._piece_of_block,
                own,
                others.shape[1],
                RANK=rank,
                RANKS=len(others) + 1,
                ADDS_UP=adds_up,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )


def load_kernels(dtype: torch.dtype, rank: int, ranks: int, device: torch.device) -> None:
    """Load all that reductions of ``dtype`` launch, while no barrier waits.

    The first launch of a kernel may wait for all that runs on the device (CUDA's guide, "Lazy Loading"). Behind a
    barrier it would wait for other ranks. They may wait for this one, where two optimizers reduce in one backward, or
    the model has collectives of its own there, and ranks come to these in different order.
    """
    sum_of_one = OrderedSum([(0, 16)], device)
    others, own = torch.zeros(ranks - 1, 16, dtype=dtype, device=device), sum_of_one.table([0])
    for output, adds_up in {(torch.float32, False), (torch.float32, True), (dtype, False)}:
        result = torch.zeros(16, dtype=output, device=device)
        sum_of_one(result, sum_of_one.squares(), others, own, rank, adds_up=adds_up)
