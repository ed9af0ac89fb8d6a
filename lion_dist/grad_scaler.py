"""A GradScaler whose verdict all ranks share, whatever keeps the gradients in shards."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from lion_dist.grad_placement import placed_like
from lion_dist.lion import Lion
from lion_dist.local_shard import LocalShard
from lion_dist.sharded_lion import ShardedLion
from lion_dist.sharding import collectives


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
        if not isinstance(optimizer, Lion):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for param in params:
            if param.grad is not None and LocalShard.of(param.grad).is_dtensor:
                # Before it is checked: addends that are finite may have a sum that is not.
                param.grad = placed_like(param.grad, param)
        found: dict[torch.device, Tensor] = {}
        for alike in _by_mesh(params):
            part = super()._unscale_grads_(alike, inv_scale, found_inf, allow_fp16)
            for device, verdict in part.items():
                found[device] = torch.maximum(found[device], verdict) if device in found else verdict
        _agree_over_shards_(found, found_inf, params)
        optimizer.shares_verdict = True
        return found


def _by_mesh(params: list[Tensor]) -> list[SimpleNamespace]:
    """Param groups of plain tensors, and of the DTensors of each mesh: torch's unscaling takes one kind at a time."""
    kinds: dict = {}
    for param in params:
        kinds.setdefault(LocalShard.of(param).mesh, []).append(param)
    return [SimpleNamespace(param_groups=[{"params": alike}]) for alike in kinds.values()]


def _agree_over_shards_(found: dict[torch.device, Tensor], absent: Tensor, params: list[Tensor]) -> None:
    """Let every rank that holds a shard of ``params`` know of every other's overflow; in place.

    ``absent``: the verdict of a rank that has no gradient at all.
    """
    shards = list(map(LocalShard.of, params))
    meshes = dict.fromkeys(shard.mesh for shard in shards if shard.is_dtensor)
    groups = [group for mesh in meshes for group in mesh.get_all_groups()]
    if any(shard.is_flat for shard in shards):
        groups.append(torch.distributed.group.WORLD)  # FSDP1's ShardedGradScaler asks these by default
    if groups and not found:
        found[absent.device] = absent
    for verdict in found.values():
        for group in groups:
            collectives.all_reduce_max(verdict, group)
