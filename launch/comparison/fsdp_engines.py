"""Parameters sharded as well: FSDP2 and FSDP1, with Lion over the local shards."""

import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from comparison.plain_engine import PlainEngine, param_groups
from comparison.ranks import replicas_mesh
from lion_dist import Lion, PrecisionPolicy


class FSDP2Engine(PlainEngine):
    """fully_shard: each rank keeps its rows of every parameter, gradient and state (what would be ZeRO stage 3)."""

    def __init__(self, model: nn.Module, args: Namespace, policy: PrecisionPolicy, device: torch.device):
        mesh = replicas_mesh(args.replicate, device, timedelta(seconds=args.timeout))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        super().__init__(model, args, policy, device)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        return super().clip_grad_norm_(max_norm).full_tensor()

    @contextmanager
    def full_parameters(self) -> Iterator[None]:
        modules = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.unshard()
        yield
        for module in modules:
            module.reshard()


class FSDP1Engine(PlainEngine):
    """FullyShardedDataParallel: as FSDP2, in flat parameters that cross the boundaries of tensors."""

    def __init__(self, model: nn.Module, args: Namespace, policy: PrecisionPolicy, device: torch.device):
        groups = param_groups(model, args)  # FSDP1 keeps these parameters, but makes them 1-D
        policy_of_units = ModuleWrapPolicy({type(model.blocks[0])})
        self.model = self.forward = FullyShardedDataParallel(
            model, auto_wrap_policy=policy_of_units, use_orig_params=True, device_id=device
        )
        self.optimizer = Lion(groups, lr=args.lr, precision=policy, metrics_every=args.metrics_every)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        return self.model.clip_grad_norm_(max_norm or math.inf)

    def full_parameters(self) -> AbstractContextManager:
        return FullyShardedDataParallel.summon_full_params(self.model, writeback=False)

    def metrics(self) -> dict:
        return self.optimizer.metrics(dist.group.WORLD)  # which cannot be seen of its flat parameters
