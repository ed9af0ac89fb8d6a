"""``averaged_parameters()`` of both optimizers: averages take the place of the weights for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from lion_dist import values
from lion_dist.averages import WeightSwap
from lion_dist.local_shard import LocalShard, local_tensor


@contextlib.contextmanager
def swap_local_shards(swap: WeightSwap, averages: Mapping[Tensor, Tensor], module: nn.Module | None) -> Iterator[None]:
    """``averages`` by parameter, for ``Lion``. ``module``: FSDP2's, whose gathered parameters are given up before and
    after: a forward pass without backward leaves some of them in place."""
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
    before = _grads(sharded)
    try:
        with swapped(swap, list(averages), [weight for weight, _ in pairs], put):
            yield
    finally:
        _reshard(gathering)
    # FSDP2 reduces gradients of its gathered copies, and puts them into .grad itself.
    for (old, written), (grad, now) in zip(before, _grads(sharded), strict=True):
        if grad is not None and (grad is not old or now != written):
            _refuse_backward()


@contextlib.contextmanager
def swapped(
    swap: WeightSwap, params: Sequence[Tensor], weights: Sequence[Tensor], put: Callable[[], None]
) -> Iterator[None]:
    """Inside, ``weights`` (the memory of ``params``) hold what ``put`` writes; afterwards, the bits that they had.

    They are kept in a copy. Version counters move inside, so that autograd notices graphs that are used across the
    border, and are afterwards what they were, so that nobody takes this for a write of weights.
    """
    swap.refuse("averaged_parameters()")
    kept = [weight.clone() for weight in weights]
    with torch.autograd._unsafe_preserve_version_counter(tuple(params)), _no_backward_into(params):
        swap.is_in = True
        try:
            torch.autograd.graph.increment_version(list(params))
            with torch.no_grad():
                put()
            yield
        finally:
            swap.is_in = False
            with torch.no_grad():
                for weight, old in zip(weights, kept, strict=True):
                    weight.copy_(old)


@contextlib.contextmanager
def _no_backward_into(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, a backward pass that would accumulate a gradient of one of ``params`` raises RuntimeError before that.

    ``torch.autograd.grad`` does not accumulate, and is free to ask for gradients of averages or of inputs.
    """
    trained = [param for param in params if param.requires_grad]
    with torch.inference_mode(False):
        nodes = [torch.autograd.graph.get_gradient_edge(param).node for param in trained]
    handles = [node.register_prehook(_refuse_backward) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_backward(*_grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "a backward pass inside averaged_parameters(), where the parameters are averages of the weights: their "
        "gradients are not those of the weights. Leave the context first, or call zero_grad() if a pass has left some; "
        "torch.autograd.grad() may be used inside."
    )


def _grads(params: Sequence[Tensor]) -> list[tuple[Tensor | None, int]]:
    """Of each its gradient, and how often that was written."""
    grads = [param.grad for param in params]
    return [(grad, 0 if grad is None else local_tensor(grad)._version) for grad in grads]


def _reshard(module: nn.Module | None) -> None:
    if module is None:
        return
    from torch.distributed.fsdp import FSDPModule  # 0.7 s, which the others do without

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
