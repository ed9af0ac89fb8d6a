"""The sum of every rank's addend, in fp32 and in rank order, by PyTorch: bit-identical to ``ordered_sum_triton.py``.

It allocates, so it is enqueued anew in every step where the Triton kernel is replayed from a recording.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class OrderedSum:
    """The sums of one shard. Arguments and attributes are those of the Triton one, but for this rank's own addend."""

    def __init__(self, pieces: Sequence[tuple[int, int]], device: torch.device):
        self._pieces, self._device = list(pieces), device

    def squares(self) -> Tensor:
        """[pieces] fp64: room for sums of squares, zeros."""
        return torch.zeros(len(self._pieces), dtype=torch.float64, device=self._device)

    @torch.no_grad()
    def __call__(
        self,
        output: Tensor,  # [shard_numel], fp32 or of the addends' dtype
        squares: Tensor,  # squares(): of each piece of what output holds in the end
        others: Tensor,  # [ranks - 1, shard_numel]: the other ranks' addends
        own: Sequence[Tensor | None],  # [numel] of each piece; None: zeros
        rank: int,  # the own addend's place among them
        *,
        adds_up: bool = False,  # to what fp32 output holds, last
    ) -> None:
        for i, ((start, numel), mine) in enumerate(zip(self._pieces, own, strict=True)):
            addends = list(others[:, start : start + numel])
            addends.insert(rank, torch.zeros_like(addends[0]) if mine is None else mine)
            total = addends[0].to(torch.float32, copy=True)
            for addend in addends[1:]:
                total.add_(addend)
            place = output[start : start + numel]
            if adds_up:
                place.add_(total)
            else:
                place.copy_(total)
            squares[i] = place.double().square().sum()
