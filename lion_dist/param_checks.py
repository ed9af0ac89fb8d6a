"""What ``Lion`` and ``ShardedLion`` accept as a parameter, and ``Lion`` as its gradient; checked where it comes in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lion_dist.config import PARAM_DTYPES
from lion_dist.local_shard import LocalShard, local_tensor
from lion_dist.sharding.memory_format import overlaps_itself

_DTYPES = ", ".join(map(str, PARAM_DTYPES))


def check_param(param: object, name: str) -> None:
    """Raise TypeError or ValueError unless Lion can update ``param``."""
    if not isinstance(param, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(param).__name__}")
    if param.layout != torch.strided:
        raise TypeError(
            f"{name} has the layout {param.layout}; Lion updates dense parameters (torch.strided). "
            "Keep the parameter dense, or leave it out of the optimizer."
        )
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(
            f"{name} has dtype {param.dtype}; Lion updates {_DTYPES}. "
            "Leave it out of the optimizer, or keep it as a buffer of its module."
        )
    shard = LocalShard.of(param)
    if param.is_meta and not shard.is_dtensor:
        # A DTensor passes: to_empty() materializes it in place, as FSDP2's deferred initialization wants.
        raise ValueError(
            f"{name} is on the meta device, and to_empty() puts another parameter in its place, which this optimizer "
            "would never train. Materialize the model first: model.to_empty(device=...), then its initialization, "
            "then the optimizer."
        )
    if shard.is_partial:
        raise ValueError(
            f"{name} is a DTensor with the placements {shard.placements}: each rank holds an addend of its values, and "
            "the sign of an update cannot be split into addends. Redistribute it to Shard or Replicate placements."
        )
    if param.requires_grad and not is_lazy(param):  # a lazy module's has no memory yet, and gets it in place
        check_no_overlap(param, name)


def check_no_overlap(param: Tensor, name: str) -> None:
    """Raise ValueError if two elements of the local ``param`` share memory."""
    if overlaps_itself(local_tensor(param)):
        raise ValueError(
            f"{name} has elements that share memory: shape {tuple(param.shape)}, stride {param.stride()} (it was made "
            "by expand() or as_strided()). An update would be applied to them more than once. "
            "Make the parameter from its clone(), or optimize the tensor that it is a view of."
        )


def check_grad(param: Tensor, grad: Tensor) -> None:
    """Raise unless the local ``grad`` can be a gradient of ``param``."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"Lion has no sparse update, and a parameter of shape {tuple(param.shape)} has a sparse gradient. "
            "Use nn.Embedding(sparse=False): untouched rows stay where they are without it too."
        )
    local = local_tensor(param)
    if grad.shape != local.shape:  # .grad.data takes any shape
        raise ValueError(
            f"a gradient has shape {tuple(grad.shape)}, its parameter {tuple(local.shape)}. "
            "Call zero_grad() and run backward again; do not assign to .grad.data."
        )
    if grad.dtype not in PARAM_DTYPES:
        raise TypeError(
            f"a gradient has dtype {grad.dtype}, its parameter of shape {tuple(param.shape)} {param.dtype}; Lion reads "
            f"gradients in {_DTYPES}. Cast the gradient."
        )
    if grad.device != local.device:
        raise ValueError(
            f"a gradient is on {grad.device}, its parameter of shape {tuple(param.shape)} on {local.device}. "
            "Call zero_grad() after moving a model, and run backward again."
        )
