"""The average of the weights (``ema_decay``): where it begins, and how it takes the place of the weights for a while.

What a step makes of it, ``kernels/reference.py`` says.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lion_dist import values
from lion_dist.config import PrecisionPolicy
from lion_dist.local_shard import LocalShard, local_tensor

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


def refuse_flat_params(param: Tensor, name: str) -> None:
    """Raise ValueError for FSDP1's flat parameters."""
    if LocalShard.of(param).is_flat:
        raise ValueError(
            f"ema_decay keeps an average of the weights, but {name} is part of FSDP1's flat parameter, of which forward"
            " passes leave gathered copies that cannot be seen here. Use fully_shard (FSDP2), or ema_decay=None."
        )


class WeightSwap:
    """Puts averages in the place of weights. Attributes: ``is_in``: they are there now."""

    def __init__(self):
        self.is_in = False

    def refuse(self, what: str) -> None:
        """Raise RuntimeError while the parameters hold averages."""
        if self.is_in:
            raise RuntimeError(
                f"{what} inside averaged_parameters(), where the parameters are averages of the weights and not the "
                "weights. Leave the context first."
            )

    @contextlib.contextmanager
    def of_local_shards(self, averages: Mapping[Tensor, Tensor], module: nn.Module | None) -> Iterator[None]:
        """``averages`` by parameter, for ``Lion``. ``module``: FSDP2's, whose gathered parameters are given up before
        and after: a forward pass without backward leaves some of them in place."""
        remedy = "Pass the model whose parameters the optimizer was given."
        values.instance("module", module, nn.Module, remedy, optional=True)
        sharded = [param for param in averages if LocalShard.of(param).is_dtensor]
        if sharded and module is None:
            raise ValueError(
                f"averaged_parameters() needs the model where parameters are DTensors (the first has shape "
                f"{tuple(sharded[0].shape)}): FSDP2 may hold gathered copies of them. Pass averaged_parameters(model)."
            )
        pairs = [(local_tensor(param.detach()), local_tensor(average)) for param, average in averages.items()]

        def put() -> None:
            for weight, average in pairs:
                weight.copy_(average)

        gathering = module if sharded else None
        _reshard(gathering)
        try:
            with self.swapped(list(averages), [weight for weight, _ in pairs], put):
                yield
        finally:
            _reshard(gathering)

    @contextlib.contextmanager
    def swapped(self, params: Sequence[Tensor], weights: Sequence[Tensor], put: Callable[[], None]) -> Iterator[None]:
        """Inside, ``weights`` (the memory of ``params``) hold what ``put`` writes; afterwards, the bits that they had.

        They are kept in a copy. Version counters move inside, so that autograd notices graphs that are used across
        the border, and are afterwards what they were, so that nobody takes this for a write of weights.
        """
        self.refuse("averaged_parameters()")
        kept = [weight.clone() for weight in weights]
        with torch.autograd._unsafe_preserve_version_counter(tuple(params)):
            self.is_in = True
            try:
                torch.autograd.graph.increment_version(list(params))
                with torch.no_grad():
                    put()
                yield
            finally:
                self.is_in = False
                with torch.no_grad():
                    for weight, old in zip(weights, kept, strict=True):
                        weight.copy_(old)


def _reshard(module: nn.Module | None) -> None:
    if module is None:
        return
    from torch.distributed.fsdp import FSDPModule  # 0.7 s, which the others do without

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def not_averaged() -> RuntimeError:
    """What averaged_parameters() of an optimizer without an average raises."""
    return RuntimeError("averaged_parameters() is for ema_decay: construct the optimizer with ema_decay=0.999.")
