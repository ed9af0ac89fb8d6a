"""A GradScaler that finds the gradients of ShardedLion, which are not in ``p.grad``."""

from __future__ import annotations

import torch
from torch import Tensor

from lion_dist.sharded_optimizer import ShardedLion


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that knows ShardedLion; for every other optimizer it is torch's own.

    Unscaling is a factor that the update applies; whether a gradient overflowed anywhere is in the verdict that all
    ranks share, so the scales of all ranks stay equal.
    """

    def _unscale_grads_(self, optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool):
        if not isinstance(optimizer, ShardedLion):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        return {found_inf.device: optimizer.unscale_and_check_(inv_scale)}
