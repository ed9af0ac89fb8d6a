"""THE definition of a Lion step. Every backend and every engine equals it bit for bit.

Lion is Algorithm 2 of Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675). With
gradient ``g``, momentum ``m`` and parameter ``p`` read as fp32, and the scalars rounded once from fp64 to fp32::

    g  = g * grad_scale                     (only when a grad_scale is given: unscaling, averaging, clipping)
    c  = m * beta1 + g * (1 - beta1)
    p  = p * (1 - lr * weight_decay) - lr * sign(c)
    m  = m * beta2 + g * (1 - beta2)

Every operation is rounded to fp32 (no fused multiply-add) and ``sign(0) = 0``. An element whose scaled gradient is
not finite is left exactly as it was, parameter and momentum: a NaN never becomes a step. Nor does a learning rate or
weight decay that is negative or not finite: as a number it is refused (``config.py``), and a step in which any tensor
on the device holds such a one is skipped as a whole (``skip_unusable``). Results are then rounded to
their storage by the integer arithmetic below. Bits are promised for numbers; a NaN equals any NaN.

The tensors, for one parameter of ``numel`` elements:

    ===========  ====================  =========================================================================
    param        fp32 | bf16 | fp16    what the model reads
    main         None | fp32 | int16   main params: none, the fp32 value, or the 16-bit remainder of a bf16 param
    exp_avg      fp32 | bf16           momentum
    grad         fp32 | bf16 | fp16
    ===========  ====================  =========================================================================

``main=None`` under an fp32 param: the param is its own main param. Under a bf16 param: it is rounded stochastically.

Cautious Lion (Liang et al., arXiv 2411.16085, Algorithm 2) steps only where ``c`` and ``g`` have the same sign, and
further there: with ``numel`` and ``count`` of such elements taken over the whole tensor, on all ranks::

    p  = p * (1 - lr * weight_decay) - lr * numel / (count + 1) * sign(c)   where c * g > 0
    p  = p * (1 - lr * weight_decay)                                        elsewhere

``factor``, lion-pytorch's ``cautious_factor``, is what a step elsewhere is multiplied by; above it is 0. The step then
counts for as much less, so that its mean over the tensor stays lr::

    weight = count + factor * (numel - count)
    p  = p * (1 - lr * weight_decay) - lr * numel / (weight + 1) * sign(c)            where c * g > 0
    p  = p * (1 - lr * weight_decay) - lr * numel / (weight + 1) * factor * sign(c)   elsewhere

Cautious weight decay (Chen et al., arXiv 2510.12402) decays only where the step goes against the parameter's own
sign, hence towards zero: where ``step``, which is what is subtracted above, has the sign of ``p``::

    p  = p * (1 - lr * weight_decay) - step   where step * p > 0
    p  = p - step                             elsewhere

(The paper writes ``>= 0``. The two differ where the step is 0: the paper decays there, this rule and lion-pytorch's
``cautious_wd`` do not, so that an element that no gradient has reached keeps its value.)

An average of the weights (``update_average``) begins as a copy of them and moves in the same launch, behind the step::

    a  = a * ema_decay + w * (1 - ema_decay)

``w`` is the new weight in fp32: the main param's value, or without main params the parameter as it is stored. ``a`` is
kept in fp32, or in bf16 by stochastic rounding. An element whose gradient is not finite keeps its average, as it keeps
its parameter and momentum; so does a step that is skipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BF16_NAN = 0x7FC0


@dataclass(frozen=True)
class StepScalars:
    """The scalars of one step, each rounded once from fp64 to fp32 where it is used.

    ``lr`` and ``decay`` = 1 - lr * weight_decay are Python floats, or 0-d fp32 tensors on the parameters' device
    when the learning rate or the weight decay is itself a tensor.
    """

    lr: float | Tensor
    decay: float | Tensor
    beta1: float
    beta2: float

    @classmethod
    def from_group(cls, lr, betas, weight_decay) -> StepScalars:
        """``1 - lr * weight_decay`` is computed in fp64 on the host, or on the device when either is a tensor."""
        if isinstance(lr, Tensor) or isinstance(weight_decay, Tensor):
            # Python numbers meet the tensors as fp64 scalars: nothing is copied to the device, so nothing waits.
            lr64, decay64 = (x.double().reshape(()) if isinstance(x, Tensor) else float(x) for x in (lr, weight_decay))
            decay = (1.0 - lr64 * decay64).float()
            lr = lr64.float() if isinstance(lr, Tensor) else torch.full_like(decay, lr64)
            return cls(lr, decay, *map(float, betas))
        return cls(float(lr), 1.0 - float(lr) * float(weight_decay), *map(float, betas))

    @property
    def is_unusable(self) -> Tensor | None:
        """[] bool on the device: lr or weight decay is negative or not finite in fp32. None when they are numbers."""
        if not isinstance(self.lr, Tensor):
            return None
        largest = torch.finfo(torch.float32).max
        is_usable = (self.lr.clamp(0, largest) == self.lr) & (self.decay.clamp(-largest, 1) == self.decay)
        return is_usable.logical_not()  # a NaN equals nothing


def skip_unusable(skip: Tensor | None, scalars: Iterable[StepScalars]) -> Tensor | None:
    """``skip`` ([] fp32, nonzero skips the step), nonzero also when ``scalars`` of any group cannot be used."""
    result = skip
    for unusable in (each.is_unusable for each in scalars):
        if unusable is None:
            continue
        result = unusable if result is None else unusable | (result.reshape(()).to(unusable.device) != 0)
    return result if result is skip else result.float()


# ---------------------------------------------------------------------------------------------------------------
# Rounding, on the integer bits of fp32.


def float_to_bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def bits_to_bf16(bits: Tensor, source: Tensor) -> Tensor:
    """The upper 16 of 32 ``bits`` as bf16; where the fp32 ``source`` was NaN, the quiet NaN."""
    upper = (bits >> 16).to(torch.int16)
    return torch.where(source.isnan(), BF16_NAN, upper).to(torch.int16).view(torch.bfloat16)


def round_nearest_even(x: Tensor) -> Tensor:
    """fp32 -> bf16, ties to even: the rounding of a bf16 momentum."""
    bits = float_to_bits(x)
    return bits_to_bf16(bits + 0x7FFF + ((bits >> 16) & 1), x)


def round_half_up(x: Tensor) -> Tensor:
    """fp32 -> bf16, ties up in the integer bits: the rounding of a low-precision parameter with main params.

    Ties to even could not be undone: 0x3F818000 and 0x3F828000 would both become (0x3F82, 0x8000).
    """
    return bits_to_bf16(float_to_bits(x) + 0x8000, x)


def round_stochastic(x: Tensor, random16: Tensor) -> Tensor:
    """fp32 -> bf16, up with a probability equal to the fraction cut off. ``random16``: int32 in [0, 2**16).

    Zero, infinities and values that bf16 holds exactly stay what they are.
    """
    return bits_to_bf16(float_to_bits(x) + random16, x)


def split_main(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 param, int16 remainder), from which :func:`join_main` gives the fp32 value back exactly."""
    remainder = ((float_to_bits(x) << 16) >> 16).to(torch.int16)
    return round_half_up(x), torch.where(x.isnan(), 0, remainder).to(torch.int16)


def join_main(param: Tensor, remainder: Tensor) -> Tensor:
    """(bf16 param, int16 remainder) -> fp32: ``bits = (param << 16) + remainder``, the remainder signed.

    A zero has no numbers below it, and no remainder below 0 unless somebody has set the parameter to zero (a pruning
    mask, a fresh layer): it then counts as 0, where the sum would be a NaN.
    """
    upper, remainder = param.view(torch.int16).to(torch.int32) << 16, remainder.to(torch.int32)
    remainder = torch.where(param == 0, remainder.clamp(min=0), remainder)
    return (upper + remainder).view(torch.float32)


# ---------------------------------------------------------------------------------------------------------------
# Random bits: a counter-based hash keyed by (seed, step); the counter is the global element index.
#
# Three multiply-xorshift rounds (constants: "triple32" of Wellons' search, github.com/skeeto/hash-prospector), with a
# key before each of the first two. Two rounds were not enough: elements whose indices differ in one middle bit
# correlated by up to 3% within a step. Philox was considered: 76 instructions an element, or one call shared by 4 to 8
# neighbours, which ties the bits to an alignment that shards, slices and views do not share. This costs about 15 and
# needs none.

MIX_1, MIX_2, MIX_3, GOLDEN = 0xED5AD4BB, 0xAC4C1B51, 0x31848BAB, 0x9E3779B9


def as_int32(constant: int) -> int:
    """The signed integer of the same 32 bits."""
    return constant - 2**32 if constant >= 2**31 else constant


def _shift_right(x: Tensor, by: int) -> Tensor:
    return (x >> by) & (0xFFFFFFFF >> by)  # logical, on int32


def mix32(x: Tensor) -> Tensor:
    """A bijection on 32 bits (int32 tensors, wrapping) that spreads every input bit over all output bits."""
    x = (x ^ _shift_right(x, 17)) * as_int32(MIX_1)
    x = (x ^ _shift_right(x, 11)) * as_int32(MIX_2)
    x = (x ^ _shift_right(x, 15)) * as_int32(MIX_3)
    return x ^ _shift_right(x, 14)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """int64 -> its (low, high) 32 bits as int32."""
    pair = x.reshape(-1, 1).contiguous().view(torch.int32)
    return pair[:, 0].reshape(x.shape), pair[:, 1].reshape(x.shape)


def random_keys(seed: int, step: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit keys for one step. ``step``: [] int64, the steps that the tensor has completed before this one."""
    seed_low, seed_high = _halves(torch.full_like(step, seed))
    step_low, step_high = _halves(step)
    key = mix32(seed_low ^ as_int32(GOLDEN))
    for word in (seed_high, step_low, step_high):
        key = mix32(key ^ word)
    return key, mix32(key ^ as_int32(GOLDEN))


def mix32_int(x: int) -> int:
    """:func:`mix32` of one unsigned integer, on the host."""
    x = ((x ^ (x >> 17)) * MIX_1) & 0xFFFFFFFF
    x = ((x ^ (x >> 11)) * MIX_2) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * MIX_3) & 0xFFFFFFFF
    return x ^ (x >> 14)


def seed_key_int(seed: int) -> int:
    """What :func:`random_keys` makes of the seed before it comes to the step, unsigned, on the host."""
    return mix32_int(mix32_int((seed & 0xFFFFFFFF) ^ GOLDEN) ^ (seed >> 32 & 0xFFFFFFFF))


def random_keys_int(seed: int, step: int) -> tuple[int, int]:
    """:func:`random_keys`, unsigned, on the host."""
    key = seed_key_int(seed)
    for word in (step & 0xFFFFFFFF, step >> 32 & 0xFFFFFFFF):
        key = mix32_int(key ^ word)
    return key, mix32_int(key ^ GOLDEN)


def random_bits(index: Tensor, seed: int, step: Tensor) -> Tensor:
    """32 random bits an element, as int32. ``index``: [n] int64, global element indices.

    The low 16 bits round the parameter, the high 16 the momentum. :func:`average_bits` are the average's.
    """
    key_1, key_2 = random_keys(seed, step)
    low, high = _halves(index)
    x = low ^ key_1
    x = (x ^ _shift_right(x, 17)) * as_int32(MIX_1)
    x = x + key_2 + high * as_int32(GOLDEN)
    x = (x ^ _shift_right(x, 11)) * as_int32(MIX_2)
    x = (x ^ _shift_right(x, 15)) * as_int32(MIX_3)
    return x ^ _shift_right(x, 14)


def average_bits(bits: Tensor) -> Tensor:
    """16 random bits an element, in [0, 2**16): a second hash of its :func:`random_bits`, all of which are in use."""
    return mix32(bits ^ as_int32(GOLDEN)) & 0xFFFF


# ---------------------------------------------------------------------------------------------------------------
# Cautious Lion's statistic. Counts are integers, so their sums over chunks and ranks have no order.


def have_same_sign(a: Tensor, b: Tensor) -> Tensor:
    """Where both are above 0 or both below. (Their product may underflow.)"""
    return ((a > 0) & (b > 0)) | ((a < 0) & (b < 0))


def count_aligned(exp_avg: Tensor, grad: Tensor, scalars: StepScalars, grad_scale: Tensor | None) -> Tensor:
    """[] int64: how many elements of a (part of a) tensor the cautious step moves."""
    g = grad.float() if grad_scale is None else grad.float() * grad_scale
    c = exp_avg.float() * scalars.beta1 + g * (1.0 - scalars.beta1)
    return (have_same_sign(c, g) & (g.abs() < torch.inf)).sum()


def cautious_lrs(lr: float | Tensor, count: Tensor, numel: Tensor, factor: float = 0.0) -> Tensor:
    """[..., 2] fp32: the step where update and gradient agree in sign, and the step elsewhere; computed in fp64.

    ``count`` and ``numel``: int64 of one shape [...]. A step beyond fp32 is fp32's largest number.
    """
    lr64 = lr.double() if isinstance(lr, Tensor) else lr
    weight = count.double()
    if factor:
        weight = weight + factor * (numel - count).double()
    agreeing = lr64 * (numel.double() / (weight + 1.0))
    return torch.stack([agreeing, agreeing * factor], dim=-1).clamp(max=torch.finfo(torch.float32).max).float()


# ---------------------------------------------------------------------------------------------------------------
# The step.


def read_main(param: Tensor, main: Tensor | None) -> Tensor:
    """The fp32 value that the update reads."""
    if main is None:
        return param.float()
    return join_main(param, main) if main.dtype == torch.int16 else main


def lion_step(
    param: Tensor,  # [numel]
    main: Tensor | None,  # [numel]
    exp_avg: Tensor,  # [numel]
    grad: Tensor,  # [numel]
    scalars: StepScalars,
    *,
    grad_scale: Tensor | None = None,  # [] fp32
    bits: Tensor | None = None,  # [numel] int32, random_bits(); needed by stochastic rounding
    stochastic_momentum: bool = False,
    cautious_lrs: Tensor | None = None,  # [2] fp32, cautious_lrs(); None: every element steps by lr
    cautious_wd: bool = False,  # decay only where step and parameter have the same sign
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One Lion step on one tensor, out of place.

    Returns:
        The new ``(param, main, exp_avg)``, in the dtypes of the old ones.
    """
    p, m, g = read_main(param, main), exp_avg.float(), grad.float()
    if grad_scale is not None:
        g = g * grad_scale
    finite = g.abs() < torch.inf

    c = m * scalars.beta1 + g * (1.0 - scalars.beta1)
    sign = (c > 0).float() - (c < 0).float()
    step = sign * scalars.lr
    if cautious_lrs is not None:
        step = sign * torch.where(have_same_sign(c, g), *cautious_lrs)
    decayed = p * scalars.decay
    if cautious_wd:
        decayed = torch.where(have_same_sign(step, p), decayed, p)
    new_p = decayed - step
    new_m = m * scalars.beta2 + g * (1.0 - scalars.beta2)

    if exp_avg.dtype == torch.bfloat16:
        new_m = round_stochastic(new_m, _shift_right(bits, 16)) if stochastic_momentum else round_nearest_even(new_m)
    new_main = None
    if main is not None and main.dtype == torch.int16:
        new_param, new_main = split_main(torch.where(finite, new_p, p))
        main = new_main  # the same value in either case
    elif param.dtype == torch.float32:
        new_param = new_p
    elif main is None:
        new_param = round_stochastic(new_p, bits & 0xFFFF)
    else:
        new_main = new_p
        new_param = round_half_up(new_p) if param.dtype == torch.bfloat16 else new_p.to(param.dtype)

    keep = lambda new, old: new if old is None else torch.where(finite, new, old)  # noqa: E731
    return keep(new_param, param), keep(new_main, main), keep(new_m, exp_avg)


def update_average(
    average: Tensor,  # [numel] fp32 | bf16
    param: Tensor,  # [numel], this and main: after the step
    main: Tensor | None,  # [numel]
    grad: Tensor,  # [numel], of the step
    ema_decay: float,
    *,
    grad_scale: Tensor | None = None,  # [] fp32
    bits: Tensor | None = None,  # [numel] int32, random_bits() of the step; needed by a bf16 average
) -> Tensor:
    """The average of the weights after a step, in the dtype of the old one, out of place."""
    g = grad.float() if grad_scale is None else grad.float() * grad_scale
    new = average.float() * ema_decay + read_main(param, main) * (1.0 - ema_decay)
    if average.dtype == torch.bfloat16:
        new = round_stochastic(new, average_bits(bits))
    return torch.where(g.abs() < torch.inf, new, average)
