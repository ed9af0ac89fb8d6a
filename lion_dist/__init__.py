"""lion_dist: the Lion optimizer, sharded, for large-scale training in PyTorch."""

import importlib
from typing import TYPE_CHECKING

from lion_dist.boxed_tensor import this_ranks_part
from lion_dist.config import PrecisionPolicy, ShardingConfig
from lion_dist.lion import Lion
from lion_dist.sharded_lion import ShardedLion
from lion_dist.step_rule import SpikeGuard

if TYPE_CHECKING:
    from lion_dist.captured_step import CapturedStep
    from lion_dist.composed.clip import clip_grad_norm_
    from lion_dist.composed.model_parallel import ModelParallel
    from lion_dist.grad_scaler import GradScaler
    from lion_dist.replica_check import ReplicaError
    from lion_dist.two_levels.levels import TwoLevels

__version__ = "0.1.0"
__all__ = [
    "CapturedStep",
    "GradScaler",
    "Lion",
    "ModelParallel",
    "PrecisionPolicy",
    "ReplicaError",
    "ShardedLion",
    "ShardingConfig",
    "SpikeGuard",
    "TwoLevels",
    "clip_grad_norm_",
    "this_ranks_part",
]

_IN_ROOMS = {
    "CapturedStep": "lion_dist.captured_step",
    "GradScaler": "lion_dist.grad_scaler",
    "ModelParallel": "lion_dist.composed.model_parallel",
    "ReplicaError": "lion_dist.replica_check",
    "TwoLevels": "lion_dist.two_levels.levels",
    "clip_grad_norm_": "lion_dist.composed.clip",
}


def __getattr__(name: str) -> object:
    """Names from rooms, which are imported when they are asked for."""
    if name in _IN_ROOMS:
        return getattr(importlib.import_module(_IN_ROOMS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
