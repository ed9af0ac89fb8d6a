"""The same with ShardedLion."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from lion_dist import ShardedLion, ShardingConfig
from tests.models import make_batch, make_model

learning_rate, betas, grad_clip, accumulation_steps = 1e-4, (0.9, 0.99), 1.0, 2


def train(steps: int) -> torch.nn.Module:
    model = make_model()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    model = DDP(model, find_unused_parameters=True)
    sharding = ShardingConfig(zero_stage=1)
    optimizer = ShardedLion(groups, lr=learning_rate, betas=betas, module=model, sharding=sharding)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate / (1 + step)
        for micro_step in range(accumulation_steps):
            model.require_backward_grad_sync = micro_step == accumulation_steps - 1
            loss = make_batch(step, micro_step, dist.get_rank()).loss(model) / accumulation_steps
            loss.backward()
        optimizer.clip_grad_norm_(grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.module
