"""The reference, in place and cache-blocked: eager operations over chunks that stay in the L2 cache.

The same three stages as ``reference.py`` (read, update, store). A chunk with a gradient or a value that is not finite
goes through the reference itself, so that the common path needs no masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from lion_dist.kernels.chunked_reference import count_in_chunks
from lion_dist.kernels.reference import StepScalars, join_main, lion_step, random_bits, update_average

# Elements of a chunk for each of torch's threads, which share an operation's chunk. 5 fp32 streams of it are 1.25 MiB.
CHUNK = 1 << 16  # 2**15 and 2**17 were 10% slower on two Xeon cores
MAX_CHUNK = 1 << 20  # bounds the scratch to 16 MiB


@dataclass(frozen=True)
class _Factors:
    """The scalars of a step in the form in which an operation takes them fastest: 0-d fp32 tensors, but for lr."""

    lr: float
    decay: Tensor
    beta1: Tensor
    beta2: Tensor
    one_minus_beta1: Tensor
    one_minus_beta2: Tensor

    @classmethod
    def of(cls, scalars: StepScalars) -> _Factors:
        beta1, beta2 = scalars.beta1, scalars.beta2
        factors = (scalars.decay, beta1, beta2, 1.0 - beta1, 1.0 - beta2)
        return cls(float(scalars.lr), *(torch.as_tensor(x, dtype=torch.float32) for x in factors))


def update(
    tensors, grads, scalars: StepScalars, *, grad_scale, skip, active, seed, cautious_lrs=None, cautious_wd=False
) -> None:
    """Arguments as ``lion_update_``'s, on the CPU. A cautious step and averages are the reference's, chunk by chunk."""
    if skip is not None and skip.item() != 0:
        return
    scale = None if grad_scale is None else grad_scale.item()
    factors = _Factors.of(scalars)
    chunk = min(CHUNK * torch.get_num_threads(), MAX_CHUNK)
    scratch = [torch.empty(min(chunk, max(param.numel() for param in tensors.params))) for _ in range(4)]
    for i, param in enumerate(tensors.params):
        if active is not None and active[i].item() == 0:
            continue
        if param.numel() == 0:
            continue
        index = None if tensors.index_starts is None else tensors.index_starts[i]
        columns = [None if tensors.mains is None else tensors.mains[i], tensors.exp_avgs[i], grads[i].reshape(-1)]
        columns.append(None if tensors.averages is None else tensors.averages[i])
        chunks = [repeat(None) if column is None else column.split(chunk) for column in columns]
        rule = {"cautious_lrs": None if cautious_lrs is None else cautious_lrs[i], "cautious_wd": cautious_wd}
        for part, main, exp_avg, grad, average in zip(param.split(chunk), *chunks, strict=False):
            numel = part.numel()
            bits = None
            if tensors.is_stochastic:
                bits = random_bits(torch.arange(index, index + numel), seed, tensors.steps[i])
                index += numel
            if cautious_wd or cautious_lrs is not None:
                _update_by_reference(
                    part, main, exp_avg, grad, scalars, scale, bits, tensors.stochastic_momentum, **rule
                )
            else:
                views = scratch if scratch[0].numel() == numel else [buffer[:numel] for buffer in scratch]
                _update_chunk(
                    part, main, exp_avg, grad, scalars, factors, scale, bits, tensors.stochastic_momentum, views
                )
            if average is not None:
                scaled = grad if scale is None else grad.float() * scale
                average.copy_(update_average(average, part, main, scaled, tensors.ema_decay, bits=bits))


def count_aligned(tensors, grads, scalars: StepScalars, *, grad_scale: Tensor | None) -> Tensor:
    """Arguments as ``count_aligned_elements``'s."""
    return count_in_chunks(tensors, grads, scalars, grad_scale, CHUNK)


def _update_chunk(param, main, exp_avg, grad, scalars, factors, scale, bits, stochastic_momentum, scratch) -> None:
    update_c, product, new_p, new_m = scratch
    # Read: fp32 views of what is fp32 already, else copies in scratch.
    g = grad
    if grad.dtype != torch.float32 or scale is not None:
        g = grad.to(torch.float32, copy=True)
        if scale is not None:
            g.mul_(scale)
    p = param if param.dtype == torch.float32 else main if main is not None and main.dtype == torch.float32 else None
    in_place = p is not None
    if not in_place:
        p = new_p.copy_(param if main is None else join_main(param, main))
    m = exp_avg if exp_avg.dtype == torch.float32 else new_m.copy_(exp_avg)

    # A sum of squares is not finite when a term is not. (Finite terms may overflow it; then the reference is slow, not
    # wrong.) dot() reads at the speed of the cache; sum() took a ninth of the step.
    witness = g.dot(g).item()
    if param.dtype != torch.float32:
        witness += p.dot(p).item()
    if not math.isfinite(witness):
        _update_by_reference(param, main, exp_avg, grad, scalars, scale, bits, stochastic_momentum)
        return

    # Update. lr * sign is exact, so the fused multiply-add behind ``alpha`` rounds as the reference does.
    torch.mul(g, factors.one_minus_beta1, out=product)
    torch.mul(m, factors.beta1, out=update_c)
    update_c.add_(product).sign_()
    torch.mul(g, factors.one_minus_beta2, out=product)
    m.mul_(factors.beta2).add_(product)
    p.mul_(factors.decay).add_(update_c, alpha=-factors.lr)

    # Store: round what is kept in 16 bits, by its integer bits.
    if exp_avg.dtype == torch.bfloat16:
        if stochastic_momentum:
            _store_upper_bits(exp_avg, m, (bits >> 16) & 0xFFFF)
        else:
            exp_avg.copy_(m)  # torch rounds to nearest even
    if main is not None and main.dtype == torch.int16:
        main.copy_(p.view(torch.int32))  # the cast keeps the low 16 bits
        _store_upper_bits(param, p, 0x8000)
    elif param.dtype == torch.bfloat16:
        _store_upper_bits(param, p, 0x8000 if in_place else bits & 0xFFFF)
    elif param.dtype == torch.float16:
        param.copy_(p)


def _store_upper_bits(target: Tensor, value: Tensor, addend) -> None:
    """``target`` (bf16) = the upper half of (the fp32 bits of ``value``) + ``addend``. ``value`` is left as it was."""
    target.view(torch.int16).copy_((value.view(torch.int32) + addend).bitwise_right_shift_(16))


def _update_by_reference(param, main, exp_avg, grad, scalars, scale, bits, stochastic_momentum, **rule) -> None:
    new = lion_step(
        param,
        main,
        exp_avg,
        grad,
        scalars,
        grad_scale=None if scale is None else torch.tensor(scale),
        bits=bits,
        stochastic_momentum=stochastic_momentum,
        **rule,
    )
    for old, value in zip((param, main, exp_avg), new, strict=True):
        if old is not None:
            old.copy_(value)
