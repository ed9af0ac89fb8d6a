"""``skip_spikes`` of ``Lion``: the norm of gradients whose shards may lie on many ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_dist.cautious import sum_over_shards_
from lion_dist.spike_guard.watch import SpikeWatch
from lion_dist.update_batch import UpdateBatch


def judge_spikes(
    watch: SpikeWatch,
    found: Sequence[tuple[dict, UpdateBatch, Sequence[Tensor]]],  # param group, batch, its gradients
    grad_scale: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """``grad_scale``, which clips a spike where the guard asks for that; and ``skip`` ([] or None), not 0 also where
    the gradients or a given loss are a spike."""
    rates = [group["lr"] for group, _, _ in found]
    if not any(isinstance(lr, Tensor) or lr for lr in rates):
        return grad_scale, skip  # torch.distributed.checkpoint makes state by a step of lr 0, with gradients of its own
    norm, loss = watch.take_given()
    if norm is None:
        squares = []
        for _, batch, grads in found:
            of_batch = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)).square()
            sum_over_shards_(of_batch, batch.params)
            squares.append(of_batch.sum().to(watch.state.device, non_blocking=True))
        norm = torch.stack(squares).sum().sqrt()
        norm = norm if grad_scale is None else norm * grad_scale.to(norm.device)
    skip = watch.verdict(norm, loss, skip)
    if watch.clip_coefficient is not None:
        clips = watch.clip_coefficient
        grad_scale = clips if grad_scale is None else grad_scale * clips.to(grad_scale.device)
    return grad_scale, skip
