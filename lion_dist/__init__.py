"""lion_dist: the Lion optimizer, sharded, for large-scale training in PyTorch."""

from typing import TYPE_CHECKING

from lion_dist.boxes import this_ranks_part
from lion_dist.captured_step import CapturedStep
from lion_dist.config import PrecisionPolicy, ShardingConfig
from lion_dist.grad_scaler import GradScaler
from lion_dist.lion import Lion
from lion_dist.sharded_lion import ShardedLion
from lion_dist.step_rule import SpikeGuard

if TYPE_CHECKING:
    from lion_dist.replica_check import ReplicaError

__version__ = "0.1.0"
__all__ = [
    "CapturedStep",
    "GradScaler",
    "Lion",
    "PrecisionPolicy",
    "ReplicaError",
    "ShardedLion",
    "ShardingConfig",
    "SpikeGuard",
    "this_ranks_part",
]


def __getattr__(name: str) -> object:
    """``ReplicaError`` comes from a room that is imported when it is asked for."""
    if name == "ReplicaError":
        from lion_dist.replica_check import ReplicaError

        return ReplicaError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
