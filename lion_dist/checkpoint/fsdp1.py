"""FSDP1's flat parameters (``FullyShardedDataParallel``), cut into boxes of the original parameters.

A flat parameter is the original ones one after another; each rank holds one range of it. torch keeps, in
``FlatParameter._shard_param_infos``, which range of each original lies where in this rank's part. Nothing is gathered.
With ``use_orig_params`` the optimizer sees the originals (1-D, what this rank has of them), else the flat parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.nn import Parameter

from lion_dist.boxes import BoxedTensor, boxes_over
from lion_dist.sharded_params import clean_name


@dataclass(frozen=True)
class FlatPiece:
    """What this rank has of one original parameter: ``[start, start + numel)`` of it, at ``offset`` of its shard.

    Attributes:
        optimized: what the optimizer holds, the original or the flat parameter.
        place: (module, parameter in it), the order of the unwrapped model.
    """

    name: str
    shape: torch.Size
    start: int
    offset: int
    numel: int
    optimized: Parameter
    place: tuple[int, int]

    def within(self, shard: Tensor) -> Tensor:
        """[numel] of this rank's part of the flat parameter."""
        return shard[self.offset : self.offset + self.numel]

    def boxed(self, own: Tensor) -> BoxedTensor:
        """Boxes of the full tensor, views of ``own`` [numel]."""
        return BoxedTensor(self.shape, boxes_over(self.shape, self.start, own), dtype=own.dtype, device=own.device)


@dataclass(frozen=True)
class FlatParam:
    """One FSDP unit.

    Attributes:
        local_shard: [n], this rank's part of the flat parameter, padding included.
        tied: {second name: first name}.
    """

    param: Parameter
    local_shard: Tensor
    pieces: list[FlatPiece]
    tied: dict[str, str]


def unwrapped_name(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def flat_params(model: nn.Module) -> list[FlatParam]:
    """All flat parameters of ``model``, in the order of its modules; none when it is not FSDP1's."""
    places = {id(module): i for i, module in enumerate(model.modules())}
    return [
        _flat_param(unwrapped_name(clean_name(prefix + "." if prefix else "")), module, places)
        for prefix, module in model.named_modules()
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None
    ]


def _flat_param(prefix: str, module: FullyShardedDataParallel, places: dict[int, int]) -> FlatParam:
    handle = module._handle
    flat = handle.flat_param
    is_initialized = hasattr(flat, "_local_shard")  # at the first forward; until then the flat parameter is the shard
    if is_initialized and handle.uses_sharded_strategy and not handle.needs_unshard():
        # A forward without backward left the gathered parameters in place: the next one would take those, not what is
        # loaded into the shard.
        _reshard(module, handle, True)
    pieces, names = [], {}
    for i, (where, fqn, shape, owned) in enumerate(
        zip(flat._param_infos, flat._fqns, flat._shapes, flat._shard_param_infos, strict=True)
    ):
        name = prefix + unwrapped_name(clean_name(fqn))
        names[id(where.module), where.param_name] = name
        pieces.append(
            FlatPiece(
                name,
                torch.Size(shape),
                start=owned.intra_param_start_idx or 0,
                offset=owned.offset_in_shard or 0,
                numel=owned.numel_in_shard or 0,
                optimized=flat if flat._params is None else flat._params[i],
                place=(places[id(where.module)], i),
            )
        )
    tied = {}
    for second in flat._shared_param_infos:
        fqn = f"{second.module_name}.{second.param_name}" if second.module_name else second.param_name
        tied[prefix + unwrapped_name(clean_name(fqn))] = names[id(second.prim_module), second.prim_param_name]
    return FlatParam(flat, (flat._local_shard if is_initialized else flat).detach(), pieces, tied)
