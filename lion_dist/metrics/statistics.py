"""What one Lion step is about to do, in numbers: their reference implementation, and ``measure()`` for lists.

Measured before the update, from what the update reads: the step is computed as in ``reference.py``, bits of stochastic
rounding included, and thrown away. With ``p`` the fp32 value of the parameter, ``m`` the momentum and ``g`` the scaled
gradient before the step, ``u`` = sign(c) the update (0 where the gradient is not finite, and where cautious Lion does
not step) and ``new p`` after the step:

    ==============  ===============================================================================================
    numel           elements
    grad_squares    sum of g^2
    param_squares   sum of p^2
    update_squares  sum of (new p - p)^2 in fp32, decay included, before rounding to storage
    exp_avg_squares sum of m^2
    flipped         u * m < 0: the update goes against the old momentum
    agreement       u * g > 0: the update has the gradient's sign
    zero            u = 0
    lost            u != 0, and the stored value (the main param, or the param without one) did not change
    ==============  ===============================================================================================

Sums are in fp64, over squares that are exact there. Counts are in fp64 as well, exact up to 2^53, so that one vector
carries both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_dist.kernels.reference import StepScalars, have_same_sign, random_bits, read_main, round_stochastic
from lion_dist.kernels.update import LionTensors

COLUMNS = (
    *("numel", "grad_squares", "param_squares", "update_squares", "exp_avg_squares"),
    *("flipped", "agreement", "zero", "lost"),
)
GPU_CHUNK = 1 << 24  # elements; bounds the temporaries to about 1 GB
CPU_CHUNK = 1 << 16  # they stay in the cache


def statistics(
    param: Tensor,  # [numel], as in reference.lion_step
    main: Tensor | None,  # [numel]
    exp_avg: Tensor,  # [numel]
    grad: Tensor,  # [numel]
    scalars: StepScalars,
    *,
    grad_scale: Tensor | None = None,  # [] fp32
    bits: Tensor | None = None,  # [numel] int32, needed where the param is rounded stochastically
    cautious_lrs: Tensor | None = None,  # [2] fp32
    cautious_wd: bool = False,
) -> Tensor:
    """[COLUMNS] fp64 of one step on one tensor."""
    # Read and update as reference.lion_step does, on what it keeps of an element without a finite gradient.
    p, m, g = read_main(param, main), exp_avg.float(), grad.float()
    if grad_scale is not None:
        g = g * grad_scale
    finite = g.abs() < torch.inf
    c = m * scalars.beta1 + g * (1.0 - scalars.beta1)
    up, down, step_size = c > 0, c < 0, scalars.lr
    agreement = have_same_sign(c, g)
    if cautious_lrs is not None:
        moving = agreement | (cautious_lrs[1] > 0)
        up, down, step_size = up & moving, down & moving, torch.where(agreement, *cautious_lrs)
    step, decayed = (up.float() - down.float()) * step_size, p * scalars.decay
    if cautious_wd:
        decayed = torch.where(have_same_sign(step, p), decayed, p)
    new_p = torch.where(finite, decayed - step, p)
    stored = new_p
    if main is None and param.dtype == torch.bfloat16:
        stored = round_stochastic(new_p, bits & 0xFFFF).float()

    p64 = p.double()
    squares = [_sum_of_squares(x) for x in (g.double(), p64, new_p.double().sub_(p64), m.double())]
    moves = (up | down) & finite
    flipped = moves & ((up & (m < 0)) | (down & (m > 0)))
    masks = (flipped, moves & agreement, ~moves, moves & (stored == p))
    counts = [mask.count_nonzero().double() for mask in masks]
    return torch.stack([torch.full_like(squares[0], param.numel()), *squares, *counts])


def _sum_of_squares(x: Tensor) -> Tensor:  # fp64
    return x.dot(x)


@torch.no_grad()
def measure(
    tensors: LionTensors,
    grads: Sequence[Tensor],  # these and what follows: as lion_update_'s
    scalars: StepScalars,
    *,
    grad_scale: Tensor | None = None,
    active: Tensor | None = None,
    seed: int = 0,
    cautious_lrs: Tensor | None = None,
    cautious_wd: bool = False,
    backend: str = "cpu",
) -> Tensor:
    """[COLUMNS] fp64 on the device: the sum over the group's tensors that are ``active``. Call it before the update.

    It changes nothing and waits for nothing. It reads params, main params, momentum and gradients once.
    """
    if backend == "triton" and cautious_lrs is None and not cautious_wd:
        from lion_dist.metrics import statistics_triton

        return statistics_triton.measure(tensors, grads, scalars, grad_scale=grad_scale, active=active, seed=seed)
    chunk = CPU_CHUNK if tensors.device.type == "cpu" else GPU_CHUNK
    total = torch.zeros(len(COLUMNS), dtype=torch.float64, device=tensors.device)
    for i, param in enumerate(tensors.params):
        of_tensor = torch.zeros_like(total)
        for start in range(0, param.numel(), chunk):
            part = slice(start, min(start + chunk, param.numel()))
            of_tensor += statistics(
                param[part],
                None if tensors.mains is None else tensors.mains[i][part],
                tensors.exp_avgs[i][part],
                grads[i].reshape(-1)[part],
                scalars,
                grad_scale=grad_scale,
                bits=_bits_of(tensors, i, part, seed) if tensors.stochastic_param else None,
                cautious_lrs=None if cautious_lrs is None else cautious_lrs[i],
                cautious_wd=cautious_wd,
            )
        # Not a product: an inactive tensor may hold numbers that are not finite.
        total += of_tensor if active is None else torch.where(active[i] != 0, of_tensor, 0.0)
    return total


def _bits_of(tensors: LionTensors, i: int, part: slice, seed: int) -> Tensor:
    first = tensors.index_starts[i]
    index = torch.arange(first + part.start, first + part.stop, device=tensors.device)
    return random_bits(index, seed, tensors.steps[i])
