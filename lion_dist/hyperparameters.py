"""lr, betas and weight decay of param groups: what can be used, checked at every step, and what becomes of it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from lion_dist import values
from lion_dist.step_rule import check_max_lr


def check_betas(betas: object, name: str = "betas") -> tuple[float, float]:
    """``betas`` as two floats; ValueError unless they are two numbers in [0, 1)."""
    pair = values.plain_list(betas)
    found = [values.as_number(beta) for beta in pair] if isinstance(pair, Sequence) and len(pair) == 2 else [None]
    if not all(beta is not None and 0.0 <= beta < 1.0 for beta in found):
        raise ValueError(
            f"{name} must be two numbers in [0, 1), got {values.shown(betas)}. The paper's are (0.9, 0.99); Lion has "
            "no third."
        )
    return found[0], found[1]  # pyrefly: ignore[bad-return] # checked above


def check_hyperparameters(group: Mapping, decoupled_from: float | None = None) -> None:
    """Raise ValueError unless ``lr``, ``betas`` and ``weight_decay`` of a param group are usable.

    A tensor (a learning rate on the device) is taken as it is: looking at its value would wait for the device. A step
    whose value then cannot be used is skipped (``StepScalars.is_unusable``).

    Args:
        decoupled_from: what ``decoupled_weight_decay`` divides the weight decay by.
    """
    for name in ("lr", "betas", "weight_decay"):
        if name not in group:
            raise ValueError(f"a param group has no {name}. Put it back, or make the optimizer anew.")
    lr, weight_decay = group["lr"], group["weight_decay"]
    values.rate("lr", lr)
    values.rate("weight_decay", weight_decay)
    check_betas(group["betas"])
    if not isinstance(lr, Tensor) and not isinstance(weight_decay, Tensor):
        product = float(lr) * (float(weight_decay) / (decoupled_from or 1.0))
        if not product <= values.FP32_MAX:
            raise ValueError(
                f"weight_decay={values.shown(weight_decay)} with lr={values.shown(lr)} is a decay of {product:.1e} a "
                "step, beyond fp32. Pass a smaller one, such as 0.1."
            )


class HyperparameterWatch:
    """Checks the param groups at every step, where a scheduler or a program may have put anything.

    It costs four comparisons a group unless something has been replaced since the last step.

    Args:
        corrected: the weight decay is divided by the group's ``max_lr``, which is checked then.
    """

    def __init__(self, decoupled_from: float | None, corrected: bool = False):
        self._decoupled_from, self._corrected = decoupled_from, corrected
        self._checked: list[tuple] = []

    def check(self, groups: Sequence[Mapping]) -> None:
        """Raise ValueError, before a step changes anything, when a group cannot be used."""
        keys = ("lr", "weight_decay", "max_lr", "betas")
        found = [tuple(map(group.get, keys)) for group in groups]
        if len(found) == len(self._checked):
            pairs = zip(found, self._checked, strict=True)
            # By identity: a NaN differs from itself, and comparing tensors would wait. A list may change in place.
            if all(all(map(operator.is_, now, before)) and type(now[-1]) is tuple for now, before in pairs):
                return
        for group in groups:
            check_hyperparameters(group, self._decoupled_from)
            if self._corrected:
                check_max_lr(group)
        self._checked = found


# ---- weight decay


def effective_weight_decay(group: dict, decoupled_from: float | None, corrected: bool = False):
    """What a step multiplies by lr to have its decay.

    lion-pytorch's ``decoupled_weight_decay``: the decay is divided by the constructor's learning rate. ``corrected``
    (arXiv 2512.08217): it is multiplied by lr / max_lr, in fp64 on the host or, for tensors, on the device.
    """
    weight_decay, lr = group["weight_decay"], group["lr"]
    if decoupled_from is not None:
        weight_decay = (weight_decay if isinstance(weight_decay, Tensor) else float(weight_decay)) / decoupled_from
    if corrected:
        lr, max_lr, weight_decay = map(_as_fp64, (lr, group["max_lr"], weight_decay))
        weight_decay = weight_decay * (lr / max_lr)
    return weight_decay


def _as_fp64(value):
    return value.double().reshape(()) if isinstance(value, Tensor) else float(value)


def decoupling_lr(lr, decoupled_weight_decay: bool) -> float | None:
    if not values.flag("decoupled_weight_decay", decoupled_weight_decay):
        return None
    if not float(lr) > 0:
        raise ValueError(
            f"decoupled_weight_decay divides by the initial lr, which must be above 0, got {values.shown(lr)}. Let a "
            "schedule begin above 0, or pass decoupled_weight_decay=False."
        )
    return float(lr)


_warned_of_decay: set[float] = set()


def warn_if_decay_vanishes(lr, weight_decay) -> None:
    """``1 - lr * weight_decay`` is 1 in fp32 below about 6e-8: say so, once; a schedule passes many such products."""
    if isinstance(lr, Tensor) or isinstance(weight_decay, Tensor):
        return
    product = float(lr) * float(weight_decay)
    if 0 < product < 2**-24 and not _warned_of_decay:
        _warned_of_decay.add(product)
        warnings.warn(
            f"lr * weight_decay = {product:.1e} is below 6e-8: 1 - lr * weight_decay rounds to 1 in fp32 and weights "
            "do not decay. Raise weight_decay, or ignore this during warm-up.",
            stacklevel=3,
        )
