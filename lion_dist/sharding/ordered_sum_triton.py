"""The sum of every rank's addend, in fp32 and in rank order, on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, NUM_WARPS = 2048, 4  # 16 elements a thread


@triton.jit
def _ordered_sum_kernel(
    output,  # [numel]
    own,  # [numel]
    others,  # [RANKS - 1, numel]
    numel,
    RANK: tl.constexpr,  # this one's place among the addends
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            addend = tl.load(own + offsets, mask=mask).to(tl.float32)
        else:
            row = rank - 1 if rank > RANK else rank
            addend = tl.load(others + row * numel + offsets, mask=mask).to(tl.float32)
        if rank == 0:
            total = addend  # not 0 + it, which would turn -0 into 0
        else:
            total += addend
    tl.store(output + offsets, total.to(output.dtype.element_ty), mask=mask)


def ordered_sum(output: Tensor, own: Tensor, others: Tensor, rank: int) -> None:
    """``output`` [numel] = the sum of ``own`` [numel] as addend number ``rank`` and of ``others`` [ranks - 1, numel].

    Addends are alike in dtype, fp32 or bf16; ``output`` is fp32 or of theirs, and rounded to nearest even.
    """
    numel = output.numel()
    with torch.cuda.device(output.device if output.is_cuda else -1):
        _ordered_sum_kernel[(triton.cdiv(numel, BLOCK),)](
            output, own, others, numel, RANK=rank, RANKS=len(others) + 1, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
