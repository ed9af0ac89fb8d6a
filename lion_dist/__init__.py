"""lion_dist: the Lion optimizer, sharded, for large-scale training in PyTorch."""

from lion_dist.captured_step import CapturedStep
from lion_dist.config import PrecisionPolicy, ShardingConfig
from lion_dist.grad_scaler import GradScaler
from lion_dist.optimizer import Lion
from lion_dist.sharded_optimizer import ShardedLion
from lion_dist.sharding.boxes import this_ranks_part
from lion_dist.sharding.replicas import ReplicaError

__version__ = "0.1.0"
__all__ = [
    "CapturedStep",
    "GradScaler",
    "Lion",
    "PrecisionPolicy",
    "ReplicaError",
    "ShardedLion",
    "ShardingConfig",
    "this_ranks_part",
]
