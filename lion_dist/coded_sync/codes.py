"""Update codes, THE definition: an owner sends how a parameter moved, and every replica replays it bit for bit.

Owner and replicas hold the same old bits of a parameter. The owner also knows the new ones. It sends the lowest *digit*
whose replay gives the new bits, and the new bits themselves (an *escape*) where none does: exact by construction,
whatever the kernels rounded, kept or skipped. Owner and replica run the same arithmetic: fp32, every operation rounded
(no fused multiply-add), ``lr`` and ``decay`` = 1 - lr * weight_decay rounded once.

**Three digits**, five to a byte, where the replica holds all that the owner's update read: fp32 parameters, and bf16
parameters without main params, whose random bits are a function of the element and the step::

    sign = digit - 1                                        new = round(old * decay - sign * lr)

**Six digits**, three to a byte, where the owner's main param is hidden: it is known to round to ``old``, so it lies in
an interval one old ulp wide, ``[low, ...)``. The update maps the interval to one as wide (or, by the decay, narrower).
On the magnitude of ``old``, and with k steps up in the order of the 16-bit values::

    digit 0, 1     away from zero    new = round(low * decay + lr) + k,  k = digit           two values at most
    digit 2, 3, 4  towards zero      new = round(low * decay - lr) + k,  k = digit - 2       three when an ulp halves
    digit 5        not at all        new = round(old * decay)

Under cautious weight decay (``reference.py``) the sign of the step says whether an element decays, and the digit says
the sign: ``decay`` is 1 unless the step goes towards zero, which is digit 2, 3 or 4 of six, and of three the digit
whose sign is that of ``old``. (A hidden main param has the sign of ``old``, or is next to zero: an escape.)

An element that comes closer to zero than that, where ulps are many times smaller, is an escape. What is or was a NaN
always is: machines differ in the bits of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lion_dist.kernels.reference import float_to_bits, have_same_sign, round_half_up, round_stochastic

# Everything is laid out in groups of so many elements: slices begin with one, and digits share a byte only with those
# of whole groups away.
GROUP = 64

INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True)
class DigitLayout:
    """Digits packed into bytes: byte ``b`` of ``n`` holds the digits of the elements b, b + n, b + 2n, ...

    ``n`` is a multiple of GROUP, so that a byte's elements lie at one place of their groups.
    """

    radix: int  # values of a digit
    per_byte: int  # digits of a byte

    def num_bytes(self, numel: int) -> int:
        return -(-numel // (self.per_byte * GROUP)) * GROUP


TERNARY = DigitLayout(radix=3, per_byte=5)
SENARY = DigitLayout(radix=6, per_byte=3)


def digits_for(param_dtype: torch.dtype, has_main: bool) -> DigitLayout:
    """Three digits when parameters are their own main params, six when the update reads more than the replicas have."""
    return SENARY if has_main else TERNARY


def ordered(x: Tensor) -> Tensor:
    """bf16 | fp16 -> int32 in the order of the values; -0 comes right below +0."""
    bits = x.view(torch.int16).to(torch.int32)
    return bits ^ ((bits >> 15) & 0x7FFF)


def from_ordered(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`ordered`."""
    return (order ^ ((order >> 15) & 0x7FFF)).to(torch.int16).view(dtype)


def round_main(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 -> the low-precision copy of main params."""
    return round_half_up(x) if dtype == torch.bfloat16 else x.to(dtype)


def least_main(magnitude: Tensor) -> Tensor:
    """The least fp32 magnitude that rounds to ``magnitude`` (bf16 | fp16, not negative): half an ulp below it."""
    half_ulp = 0x8000 if magnitude.dtype == torch.bfloat16 else 0x1000
    return (float_to_bits(magnitude.float()) - half_ulp).clamp(min=0).view(torch.float32)


def replay(
    old: Tensor,  # [n] fp32 | bf16 | fp16
    digit: Tensor | int,  # [n] uint8
    lr: Tensor,  # [] or [n] fp32
    decay: Tensor,  # [] or [n] fp32
    layout: DigitLayout,
    bits: Tensor | None = None,  # [n] int32, random_bits(); for bf16 parameters without main params
    cautious_wd: bool = False,
) -> Tensor:
    """The new parameters [n], in the dtype of the old ones."""
    digit = torch.as_tensor(digit, device=old.device).to(torch.int32)
    if layout is TERNARY:
        sign = (digit - 1).float()
        if cautious_wd:
            decay = torch.where(have_same_sign(sign, old), decay, 1.0)
        new = old.float() * decay - sign * lr
        return new if old.dtype == torch.float32 else round_stochastic(new, bits & 0xFFFF)
    is_negative = old.view(torch.int16) < 0
    magnitude = (old.view(torch.int16) & 0x7FFF).view(old.dtype)
    start = torch.where(digit == 5, magnitude.float(), least_main(magnitude))
    if cautious_wd:
        decay = torch.where((digit >= 2) & (digit < 5), decay, 1.0)
    step = torch.where(digit < 2, -lr, torch.where(digit < 5, lr, 0.0))
    base = torch.where(digit < 2, 0, torch.where(digit < 5, 2, 5))
    new = from_ordered(ordered(round_main(start * decay - step, old.dtype)) + (digit - base), old.dtype)
    return (new.view(torch.int16) ^ (is_negative.to(torch.int16) << 15)).view(old.dtype)


def encode(
    old: Tensor,
    new: Tensor,
    lr: Tensor,
    decay: Tensor,
    layout: DigitLayout,
    bits: Tensor | None = None,
    cautious_wd: bool = False,
) -> tuple[Tensor, Tensor]:
    """([n] uint8 digits, [n] bool escapes): arguments as :func:`replay`'s. An escape's digit is 0."""
    integer = INTEGER[old.dtype]
    digits = torch.zeros(old.shape, dtype=torch.uint8, device=old.device)
    escapes = torch.ones(old.shape, dtype=torch.bool, device=old.device)
    is_nan = old.isnan() | new.isnan()
    for digit in range(layout.radix):
        replayed = replay(old, digit, lr, decay, layout, bits, cautious_wd)
        hit = escapes & (replayed.view(integer) == new.view(integer)) & ~is_nan
        digits.masked_fill_(hit, digit)
        escapes &= ~hit
    return digits, escapes
