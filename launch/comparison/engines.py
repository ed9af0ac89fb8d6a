"""One class per --engine: the wrapped model, the optimizer over it, and what differs around a step."""

from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from comparison.deepspeed_engine import DeepSpeedEngine
from comparison.fsdp_engines import FSDP1Engine, FSDP2Engine
from comparison.plain_engine import PlainEngine, param_groups
from comparison.ranks import replicas_mesh
from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig


class DDPEngine(PlainEngine):
    """Gradients are all-reduced; every rank keeps the whole state."""

    def __init__(self, model: nn.Module, args: Namespace, policy: PrecisionPolicy, device: torch.device):
        super().__init__(model, args, policy, device)
        device_ids = [device.index] if device.type == "cuda" else None
        self.forward = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    def accumulate(self) -> AbstractContextManager:
        return self.forward.no_sync()


class ShardedEngine(PlainEngine):
    """ZeRO stage 1 or 2: each rank keeps and updates its shard of the state."""

    def __init__(self, model: nn.Module, args: Namespace, policy: PrecisionPolicy, device: torch.device):
        self.model = self.forward = model
        self.zero_stage = args.zero_stage
        self.optimizer = ShardedLion(
            param_groups(model, args),
            lr=args.lr,
            module=model,  # the all-gather of parameters overlaps the next forward
            process_group=replicas_mesh(args.replicate, device, timedelta(seconds=args.timeout)),
            sharding=ShardingConfig(zero_stage=args.zero_stage, param_sync=args.param_sync),
            precision=policy,
            metrics_every=args.metrics_every,
        )

    def accumulate(self) -> AbstractContextManager:
        # Stage 2 reduces every micro-batch into the grad shard, so that no rank keeps a full gradient.
        return self.optimizer.no_sync() if self.zero_stage == 1 else nullcontext()

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        # The gradients are in shards: torch's own function would see none.
        return self.optimizer.clip_grad_norm_(max_norm) if max_norm else self.optimizer.grad_norm()

    def memory_bytes(self) -> dict[str, int]:
        return self.optimizer.memory_bytes()

    def finish_param_sync(self) -> None:
        self.optimizer.finish_param_sync()

    def skipped_steps(self) -> int:
        return self.optimizer.skipped_steps()


ENGINES = {
    "plain": PlainEngine,
    "ddp": DDPEngine,
    "sharded": ShardedEngine,
    "fsdp2": FSDP2Engine,
    "fsdp1": FSDP1Engine,
    "deepspeed": DeepSpeedEngine,
}
