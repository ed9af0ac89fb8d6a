"""A GradScaler whose verdict all ranks share, whatever keeps the gradients in shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lion_dist.engine_state import is_flat_param
from lion_dist.optimizer import Lion
from lion_dist.sharded_optimizer import ShardedLion


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that knows ``ShardedLion``, and ``Lion`` over the shards of FSDP1, FSDP2 and tensor
    parallel; for every other optimizer it is torch's own.

    Unscaling is a factor that the update applies; whether a gradient overflowed on any rank is known to all, so they
    skip the same steps and their scales stay equal. (torch's own asks the ranks that share the *first* gradient: under
    FSDP2 with tensor parallel, ranks would disagree about the others, and ``Lion`` refuses it there. FSDP1's
    ``ShardedGradScaler`` works too.)
    """

    def _unscale_grads_(self, optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool):
        if isinstance(optimizer, ShardedLion):
            return {found_inf.device: optimizer.unscale_and_check_(inv_scale, self._scale)}
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        if isinstance(optimizer, Lion):
            _agree_over_shards_(found, found_inf, [p for group in optimizer.param_groups for p in group["params"]])
            optimizer.shares_verdict = True
        return found


def _agree_over_shards_(found: dict[torch.device, Tensor], absent: Tensor, params: list[Tensor]) -> None:
    """Let every rank that holds a shard of ``params`` know of every other's overflow; in place.

    ``absent``: the verdict of a rank that has no gradient at all.
    """
    meshes = dict.fromkeys(p.device_mesh for p in params if hasattr(p, "device_mesh"))
    groups = [mesh.get_group(axis) for mesh in meshes for axis in range(mesh.ndim)]
    if any(map(is_flat_param, params)):
        groups.append(dist.group.WORLD)  # FSDP1's ShardedGradScaler asks these by default
    if groups and not found:
        found[absent.device] = absent
    for verdict in found.values():
        for group in groups:
            dist.all_reduce(verdict, dist.ReduceOp.MAX, group)
