"""``skip_spikes`` of ``Lion``: the norm of gradients whose shards may lie on many ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_dist.cautious import sum_over_shards_
from lion_dist.local_shard import LocalShard
from lion_dist.spike_guard import SpikeWatch
from lion_dist.update_batch import UpdateBatch


def refuse_hidden_ranks(param: Tensor, name: str) -> None:
    """Raise ValueError where the engine does not tell among which ranks a tensor is cut."""
    if LocalShard.of(param).is_flat:
        raise ValueError(
            f"skip_spikes needs the norm over all ranks' gradients, but {name} is part of FSDP1's flat parameter, "
            "which does not say among which ranks it is cut. Use fully_shard (FSDP2), or skip_spikes=None."
        )


def judge_spikes(
    watch: SpikeWatch,
    found: Sequence[tuple[dict, UpdateBatch, Sequence[Tensor]]],  # param group, batch, its gradients
    grad_scale: Tensor | None,
    skip: Tensor | None,
) -> Tensor | None:
    """``skip`` ([] or None), not 0 also where the gradients or a given loss are a spike."""
    rates = [group["lr"] for group, _, _ in found]
    if not any(isinstance(lr, Tensor) or lr for lr in rates):
        return skip  # torch.distributed.checkpoint makes state by a step of lr 0, with gradients of its own
    norm, loss = watch.take_given()
    if norm is None:
        squares = []
        for _, batch, grads in found:
            of_batch = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)).square()
            sum_over_shards_(of_batch, batch.params)
            squares.append(of_batch.sum().to(watch.state.device, non_blocking=True))
        norm = torch.stack(squares).sum().sqrt()
        norm = norm if grad_scale is None else norm * grad_scale.to(norm.device)
    return watch.verdict(norm, loss, skip)
