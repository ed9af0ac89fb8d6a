"""The average of the weights (``ema_decay``): where it begins, and what is refused while it is in their place.

What a step makes of it, ``kernels/reference.py`` says; how it takes the place of the weights, ``weight_swap.py``.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lion_dist.config import PrecisionPolicy
from lion_dist.local_shard import local_tensor

KIND = "weight_avg"  # in optimizer state and checkpoints


def with_average(precision: PrecisionPolicy, ema_decay: float | None) -> PrecisionPolicy:
    """``precision`` with a dtype for the average where ``ema_decay`` asks for one.

    Raises:
        ValueError: a dtype without an average.
    """
    if ema_decay is not None:
        return dataclasses.replace(precision, ema_dtype=precision.ema_dtype or torch.float32)
    if precision.ema_dtype is not None:
        raise ValueError(
            f"precision has ema_dtype={precision.ema_dtype}, but no average of the weights is kept. Pass "
            "ema_decay=0.999 to the optimizer, or leave ema_dtype out."
        )
    return precision


def init_average(param: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """The first average, a copy of ``param``; None without a ``dtype``."""
    if dtype is None:
        return None
    average = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False)
    local_tensor(average).copy_(local_tensor(param.detach()))
    return average


class WeightSwap:
    """Attributes: ``is_in``: averages are in the place of weights now, which ``weight_swap.py`` has put there."""

    def __init__(self):
        self.is_in = False

    def refuse(self, what: str) -> None:
        """Raise RuntimeError while the parameters hold averages."""
        if self.is_in:
            raise RuntimeError(
                f"{what} inside averaged_parameters(), where the parameters are averages of the weights and not the "
                "weights. Leave the context first."
            )


def not_averaged() -> RuntimeError:
    """What averaged_parameters() of an optimizer without an average raises."""
    return RuntimeError("averaged_parameters() is for ema_decay: construct the optimizer with ema_decay=0.999.")
