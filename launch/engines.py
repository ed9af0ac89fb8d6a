"""One class per --engine: the wrapped model, the optimizer over it, and what differs around a step."""

import math
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from report import MEMORY_KINDS


class PlainEngine:
    """One process and Lion."""

    def __init__(self, model: nn.Module, args: Namespace, policy: PrecisionPolicy, device: torch.device):
        self.model = model  # names its parameters for checkpoints and checks
        self.forward = model  # what the training loop calls
        self.optimizer = Lion(param_groups(model, args), lr=args.lr, precision=policy)

    def accumulate(self) -> AbstractContextManager:
        """Around every micro-batch but the last: gradients stay on this rank."""
        return nullcontext()

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """The norm before clipping, 0-d; max_norm 0 only measures it."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm or math.inf)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes on this rank by kind, from the tensors themselves, after a backward."""
        size = dict.fromkeys(MEMORY_KINDS, 0)
        for parameter in self.model.parameters():
            size["params"] += parameter.nbytes
            size["grads"] += parameter.grad.nbytes
            for name, state in self.optimizer.state[parameter].items():
                if torch.is_tensor(state) and state.numel() == parameter.numel():
                    size["exp_avg" if name == "exp_avg" else "main_params"] += state.nbytes
        return size

    def finish_param_sync(self) -> None:
        """Before parameters are read outside the training loop."""


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
            sharding=ShardingConfig(zero_stage=args.zero_stage),
            precision=policy,
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


ENGINES = {"plain": PlainEngine, "ddp": DDPEngine, "sharded": ShardedEngine}


def param_groups(model: nn.Module, args: Namespace) -> list[dict]:
    """Matrices decay; the gains of the norms do not."""
    return [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
