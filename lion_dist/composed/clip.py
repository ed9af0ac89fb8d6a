"""``clip_grad_norm_`` for ``Lion`` over DTensors of several meshes: FSDP2, tensor and expert parallel together.

torch's own dispatches every operation through DTensor and refuses gradients of several meshes. Here norms of local
tensors are added up: those that are cut along the same mesh axes together, and along each axis in one message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from lion_dist import values
from lion_dist.grad_placement import local_grads_like, wait_for
from lion_dist.local_shard import LocalShard, local_tensor
from lion_dist.sharding import collectives
from lion_dist.sharding.process_groups import resolve_groups

Axes = tuple[tuple[DeviceMesh, int], ...]  # along which a tensor is cut


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pipeline: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """Clip the global norm of the parameters' gradients, in place, as ``torch.nn.utils.clip_grad_norm_`` does.

    All ranks call it together, with parameters that are placed alike. The host does not wait for the device, unless
    ``error_if_nonfinite``.

    Args:
        parameters: plain tensors, which every rank holds whole, and DTensors of any meshes.
        norm_type: 1.0 or more, or infinity.
        foreach: torch's; one call takes all tensors in any case.
        pipeline: the ranks that hold other layers; the norm is that of all stages then.

    Returns:
        [] fp32 on the device of the gradients: the norm before clipping, of the whole model, an ordinary tensor.

    Raises:
        RuntimeError: the norm is not finite, with ``error_if_nonfinite``.
    """
    remedy = "Pass the largest norm that a step may have, such as 1.0."
    max_norm = values.number("max_norm", max_norm, "above 0", above=0.0, remedy=remedy)
    order = values.number("norm_type", norm_type, "1.0 or more", above=0.0, remedy="Pass 2.0, or float('inf').")
    if order < 1:
        raise ValueError(f"norm_type must be 1.0 or more, got {order}. Pass 2.0, or float('inf').")
    values.flag("foreach", foreach, optional=True)
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [param.grad for param in params]
    if not params:
        return torch.zeros(())
    norm = _global_norm(params, local_grads_like(grads, params), order, pipeline).float()
    if values.flag("error_if_nonfinite", error_if_nonfinite) and not norm.isfinite():
        raise RuntimeError(
            f"the norm of order {order} of the gradients is {norm.item()}, so they cannot be clipped. Look for what "
            "overflows, or pass error_if_nonfinite=False."
        )
    _scale([wait_for(local_tensor(grad)) for grad in grads if grad is not None], max_norm / (norm + 1e-6))
    return norm


def _global_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], order: float, pipeline: ProcessGroup | DeviceMesh | None
) -> Tensor:
    """[] fp64. ``grads``: local, placed as the parameters."""
    device = local_tensor(params[0]).device
    by_axes: dict[Axes, list[Tensor]] = {}
    for param, grad in zip(params, grads, strict=True):
        alike = by_axes.setdefault(LocalShard.of(param).axes, [])  # also without a gradient: other ranks may have one
        if grad is not None and grad.numel():
            alike.append(grad)
    totals = torch.stack([_power_sum(alike, order, device) for alike in by_axes.values()])
    combine = collectives.all_reduce_max if math.isinf(order) else collectives.all_reduce
    for group, rows in _rows_by_group(by_axes).items():
        message = totals[rows]
        combine(message, group)
        totals[rows] = message
    total = (totals.amax() if math.isinf(order) else totals.sum()).reshape(1)
    if pipeline is not None:
        combine(total, resolve_groups(pipeline).shard_group)
    return total[0] if math.isinf(order) else total[0] ** (1 / order)


def _rows_by_group(by_axes: Iterable[Axes]) -> dict[ProcessGroup, list[int]]:
    """For the ranks along each mesh axis, which of ``by_axes`` are cut along it; in one order on all ranks."""
    rows: dict[ProcessGroup, list[int]] = {}
    for row, axes in enumerate(by_axes):
        for mesh, axis in axes:
            rows.setdefault(mesh.get_group(axis), []).append(row)
    return rows


def _power_sum(grads: list[Tensor], order: float, device: torch.device) -> Tensor:
    """[] fp64: the sum of ``|x| ** order``, or the greatest ``|x|``."""
    parts = []
    for alike in _by_device(grads).values():
        norms = torch.stack(torch._foreach_norm(alike, order, dtype=torch.float64))
        part = norms.amax() if math.isinf(order) else (norms**order).sum()
        parts.append(part.to(device, non_blocking=True))
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(parts).amax() if math.isinf(order) else torch.stack(parts).sum()


def _scale(grads: list[Tensor], coefficient: Tensor) -> None:
    """Multiply in place by ``coefficient``, where that is below 1."""
    coefficient = coefficient.clamp(max=1.0)
    for device, alike in _by_device(grads).items():
        torch._foreach_mul_(alike, coefficient.to(device, non_blocking=True))


def _by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    result: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        result.setdefault(tensor.device, []).append(tensor)
    return result
