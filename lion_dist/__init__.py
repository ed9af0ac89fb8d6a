"""lion_dist: the Lion optimizer, sharded, for large-scale training in PyTorch."""

from lion_dist.boxes import this_ranks_part
from lion_dist.captured_step import CapturedStep
from lion_dist.config import PrecisionPolicy, ShardingConfig
from lion_dist.grad_scaler import GradScaler
from lion_dist.lion import Lion
from lion_dist.replica_check import ReplicaError
from lion_dist.sharded_lion import ShardedLion
from lion_dist.spike_guard import SpikeGuard

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
