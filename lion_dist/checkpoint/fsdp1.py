"""FSDP1's flat parameters (``FullyShardedDataParallel``) by the names of the original parameters.

Which ranges of the originals this rank has, ``lion_dist.local_shard`` knows. With ``use_orig_params`` the optimizer
sees the originals (1-D, what this rank has of them), else the flat parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.nn import Parameter

from lion_dist.local_shard import LocalShard, OriginalRange, local_part_of_flat, original_ranges
from lion_dist.sharded_params import clean_name


@dataclass(frozen=True)
class Original:
    """One original parameter.

    Attributes:
        range: what this rank has of it.
        place: (module, parameter in it), the order of the unwrapped model.
    """

    name: str
    range: OriginalRange
    place: tuple[int, int]


@dataclass(frozen=True)
class FlatParam:
    """One FSDP unit.

    Attributes:
        tied: {second name: first name}.
    """

    param: Parameter
    originals: list[Original]
    tied: dict[str, str]

    @property
    def optimized(self) -> list[Parameter]:
        """What the optimizer holds for each of the originals."""
        return [original.range.optimized for original in self.originals]

    def shard_of_value(self, original: Original) -> LocalShard:
        return original.range.shard_in(local_part_of_flat(self.param))

    def shard_of_state(self, original: Original, tensor: Tensor) -> LocalShard:
        """``tensor``: state of what the optimizer holds for ``original``."""
        if original.range.optimized is self.param:
            return original.range.shard_in(tensor)
        return original.range.shard_over(tensor)


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
    is_initialized = hasattr(flat, "_local_shard")
    if is_initialized and handle.uses_sharded_strategy and not handle.needs_unshard():
        # A forward without backward left the gathered parameters in place: the next one would take those, not what is
        # loaded into the shard.
        _reshard(module, handle, True)
    originals, names = [], {}
    infos = zip(flat._param_infos, flat._fqns, original_ranges(flat), strict=True)
    for i, (where, fqn, held) in enumerate(infos):
        name = prefix + unwrapped_name(clean_name(fqn))
        names[id(where.module), where.param_name] = name
        originals.append(Original(name, held, place=(places[id(where.module)], i)))
    tied = {}
    for second in flat._shared_param_infos:
        fqn = f"{second.module_name}.{second.param_name}" if second.module_name else second.param_name
        tied[prefix + unwrapped_name(clean_name(fqn))] = names[id(second.prim_module), second.prim_param_name]
    return FlatParam(flat, originals, tied)
