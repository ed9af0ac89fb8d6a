"""The reference, in place and cache-blocked: eager operations over chunks that stay in the L2 cache.

The same three stages as ``reference.py`` (read, update, store). A chunk with a gradient or a value that is not finite
goes through the reference itself, so that the common path needs no masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lion_dist.kernels.reference import StepScalars, join_main, lion_step, random_bits

CHUNK = 1 << 16  # elements; 5 fp32 streams of it are 1.25 MiB. 2**15 and 2**17 were 10% slower on two Xeon cores.


class _Scratch:
    """Four fp32 buffers of one chunk, reused by all chunks of a call."""

    def __init__(self, numel: int):
        self.buffers = [torch.empty(numel) for _ in range(4)]

    def views(self, numel: int) -> list[Tensor]:
        return [buffer[:numel] for buffer in self.buffers]


def update(tensors, grads, scalars: StepScalars, *, grad_scale, skip, active, seed) -> None:
    """Arguments as ``lion_update_``'s, on the CPU."""
    if skip is not None and skip.item() != 0:
        return
    scale = None if grad_scale is None else grad_scale.item()
    scratch = _Scratch(min(CHUNK, max(param.numel() for param in tensors.params)))
    for i, param in enumerate(tensors.params):
        if active is not None and active[i].item() == 0:
            continue
        main = None if tensors.mains is None else tensors.mains[i]
        grad, exp_avg = grads[i].reshape(-1), tensors.exp_avgs[i]
        for start in range(0, param.numel(), CHUNK):
            part = slice(start, min(start + CHUNK, param.numel()))
            bits = None
            if tensors.is_stochastic:
                first = tensors.index_starts[i]
                bits = random_bits(torch.arange(first + part.start, first + part.stop), seed, tensors.steps[i])
            _update_chunk(
                param[part],
                None if main is None else main[part],
                exp_avg[part],
                grad[part],
                scalars,
                scale,
                bits,
                tensors.stochastic_momentum,
                scratch.views(part.stop - part.start),
            )


def _update_chunk(param, main, exp_avg, grad, scalars, scale, bits, stochastic_momentum, scratch) -> None:
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

    # A sum is not finite when a term is not. (Finite terms may overflow it; then the reference is slow, not wrong.)
    witness = g.sum().item()
    if param.dtype != torch.float32:
        witness += p.sum().item()
    if not math.isfinite(witness):
        _update_by_reference(param, main, exp_avg, grad, scalars, scale, bits, stochastic_momentum)
        return

    # Update.
    torch.mul(m, scalars.beta1, out=update_c)
    torch.mul(g, 1.0 - scalars.beta1, out=product)
    update_c.add_(product).sign_().mul_(scalars.lr)
    p.mul_(scalars.decay).sub_(update_c)
    m.mul_(scalars.beta2)
    torch.mul(g, 1.0 - scalars.beta2, out=product)
    m.add_(product)

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
    """``target`` (bf16) = the upper 16 bits of (the fp32 bits of ``value``) + ``addend``. ``value`` is left as it was."""
    target.view(torch.int16).copy_((value.view(torch.int32) + addend).bitwise_right_shift_(16))


def _update_by_reference(param, main, exp_avg, grad, scalars, scale, bits, stochastic_momentum) -> None:
    new = lion_step(
        param,
        main,
        exp_avg,
        grad,
        scalars,
        grad_scale=None if scale is None else torch.tensor(scale),
        bits=bits,
        stochastic_momentum=stochastic_momentum,
    )
    for old, value in zip((param, main, exp_avg), new, strict=True):
        if old is not None:
            old.copy_(value)
