"""Gradients as this rank's part of them, placed as their parameters are.

Where a parameter is a DTensor so is its gradient, and DTensor promises nothing about the gradient's placements: the
weight of a sequence-parallel LayerNorm is replicated, its gradient an unsummed ``Partial``. Torch's own optimizers
leave it to DTensor's dispatch; ``Lion`` works on local tensors, so it redistributes such a gradient itself.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence, Set

import torch
from torch import Tensor

from lion_dist.local_shard import PLAIN, check_memory, local_tensor

_spec_and_local = operator.attrgetter("_spec", "_local_tensor")


class GradPlacements:
    """Whether gradients are placed as their ``params``, found out once for gradients that stay alike.

    DTensor keeps one spec object for all gradients of a kind, so that later steps compare identities only.
    """

    def __init__(self, params: Sequence[Tensor]):
        self._params = list(params)
        sharded = [local_tensor(p) is not p for p in params]
        self._none_sharded, self._all_sharded = not any(sharded), all(sharded)
        self._specs: list | None = None  # of the gradients that were looked at last
        self._misplaced: list[int] = []  # positions of those that have to be redistributed

    def local_grads(self, grads: Sequence[Tensor], types: Set[type]) -> Sequence[Tensor]:
        """The local part of each gradient; redistributed where its placements are not the parameter's.

        All ranks of a mesh call it with gradients of the same placements. ``grads`` themselves stay as they are.

        Args:
            types: of the ``grads``.

        Raises:
            TypeError: one of parameter and gradient is a DTensor and the other is not.
            ValueError: they are DTensors of different meshes.
        """
        if self._none_sharded and types <= PLAIN:
            return grads
        if self._all_sharded and all(hasattr(kind, "placements") for kind in types):
            specs, local = map(list, zip(*map(_spec_and_local, grads), strict=True))
        else:
            specs, local = [getattr(g, "_spec", None) for g in grads], list(map(local_tensor, grads))
        if self._specs is None or not all(map(operator.is_, specs, self._specs)):
            pairs = enumerate(zip(self._params, grads, strict=True))
            self._misplaced = [i for i, (param, grad) in pairs if not is_placed_like(grad, param)]
            self._specs = specs
        for i in self._misplaced:
            local[i] = local_tensor(placed_like(grads[i], self._params[i]))
        return local if set(map(type, local)) <= PLAIN else list(map(wait_for, local))


def local_grads_like(grads: list[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """The local part of each gradient there is, placed as its parameter; ``grads`` itself where all are plain."""
    if PLAIN.issuperset(map(type, params)):
        return grads
    pairs = zip(grads, params, strict=True)
    return [None if grad is None else wait_for(local_tensor(placed_like(grad, param))) for grad, param in pairs]


def is_placed_like(grad: Tensor, param: Tensor) -> bool:
    """Whether the local part of ``grad`` belongs to the local part of ``param``; raises where none can."""
    is_sharded = local_tensor(param) is not param
    if is_sharded != hasattr(grad, "placements"):
        kinds = ("a DTensor", "a plain tensor") if is_sharded else ("a plain tensor", "a DTensor")
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} is {kinds[0]}, its gradient {kinds[1]}: which part of the "
            "gradient belongs to this rank is unknown. Give it a gradient of its own kind, by "
            "distribute_tensor(grad, param.device_mesh, param.placements) or grad.full_tensor()."
        )
    if is_sharded and grad.device_mesh != param.device_mesh:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} lies on {param.device_mesh}, its gradient on "
            f"{grad.device_mesh}. Bring the gradient to the parameter's mesh before step()."
        )
    return not is_sharded or grad.placements == param.placements


def placed_like(grad: Tensor, param: Tensor) -> Tensor:
    """``grad`` with the placements of ``param``; all ranks of their mesh call it together where they differ."""
    return grad if is_placed_like(grad, param) else grad.redistribute(placements=param.placements)


def wait_for(tensor: Tensor) -> Tensor:
    """The result of a functional collective, once it is written; any other tensor as it is.

    Until somebody uses it, such a result is an AsyncCollectiveTensor without memory of its own.
    """
    if type(tensor) in PLAIN:
        return tensor
    if torch.distributed.is_available():
        from torch.distributed._functional_collectives import AsyncCollectiveTensor

        if isinstance(tensor, AsyncCollectiveTensor):
            return tensor.wait()
    check_memory(tensor, "a gradient")
    return tensor
