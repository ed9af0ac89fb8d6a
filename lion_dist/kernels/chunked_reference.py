"""The reference implementation in place, in chunks that bound its temporaries; on any device, without waiting for it.

It updates GPUs without Triton, and everything in a copy of the package that has no other backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lion_dist.kernels import reference
from lion_dist.kernels.reference import StepScalars

CHUNK = 1 << 24  # elements: about 0.5 GB of temporaries


def update(
    tensors, grads, scalars: StepScalars, *, grad_scale, skip, active, seed, cautious_lrs=None, cautious_wd=False
) -> None:
    """Arguments as ``update.lion_update_``'s."""
    for i, (param, exp_avg) in enumerate(zip(tensors.params, tensors.exp_avgs, strict=True)):
        main = None if tensors.mains is None else tensors.mains[i]
        takes_part = torch.ones((), dtype=torch.bool, device=param.device)
        if skip is not None:
            takes_part &= (skip == 0).reshape(())
        if active is not None:
            takes_part &= active[i] != 0
        for start in range(0, param.numel(), CHUNK):
            part = slice(start, min(start + CHUNK, param.numel()))
            old = param[part], None if main is None else main[part], exp_avg[part]
            bits = None
            if tensors.is_stochastic:
                first = tensors.index_starts[i]
                index = torch.arange(first + part.start, first + part.stop, device=param.device)
                bits = reference.random_bits(index, seed, tensors.steps[i])
            new = reference.lion_step(
                *old,
                grads[i].reshape(-1)[part],
                scalars,
                grad_scale=grad_scale,
                bits=bits,
                stochastic_momentum=tensors.stochastic_momentum,
                cautious_lrs=None if cautious_lrs is None else cautious_lrs[i],
                cautious_wd=cautious_wd,
            )
            if tensors.averages is not None:
                average, grad = tensors.averages[i][part], grads[i].reshape(-1)[part]
                new_average = reference.update_average(
                    average, *new[:2], grad, tensors.ema_decay, grad_scale=grad_scale, bits=bits
                )
                old, new = (*old, average), (*new, new_average)
            for old_tensor, new_tensor in zip(old, new, strict=True):
                if old_tensor is not None:
                    old_tensor.copy_(torch.where(takes_part, new_tensor, old_tensor))


def count_aligned(tensors, grads, scalars: StepScalars, *, grad_scale: Tensor | None) -> Tensor:
    """Arguments as ``update.count_aligned_elements``'s."""
    return count_in_chunks(tensors, grads, scalars, grad_scale, CHUNK)


def count_in_chunks(tensors, grads, scalars: StepScalars, grad_scale: Tensor | None, chunk: int) -> Tensor:
    """[T] int64, of ``chunk`` elements at a time."""
    counts = []
    for exp_avg, grad in zip(tensors.exp_avgs, grads, strict=True):
        parts = zip(exp_avg.split(chunk), grad.reshape(-1).split(chunk), strict=True)
        counts.append(sum(reference.count_aligned(m, g, scalars, grad_scale) for m, g in parts))
    return torch.stack(counts)
