"""The same with ShardedLion, in the place of FSDP2 or of DDP (``replicate``)."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lion_dist import ShardedLion
from lion_dist.benchmarks.llama import SIZES, Llama

lr, betas, weight_decay = 1e-4, (0.9, 0.99), 1.0


class TrainSpec:
    """Model, optimizer and schedule, with what torch.distributed.checkpoint asks of them."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Llama(**SIZES["tiny"])
        params = self.model.parameters()
        self.optimizer = ShardedLion(params, lr=lr, betas=betas, weight_decay=weight_decay, module=self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def train(self, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
            self.model(torch.randint(256, (2, 17), generator=generator)).backward()
            self.optimizer.clip_grad_norm_(1.0)
            self.optimizer.step()
            self.scheduler.step()

    def save(self, path: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        states = {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
        dcp.save(states, checkpoint_id=path)

    def load(self, path: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        states = {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
        dcp.load(states, checkpoint_id=path)
        self.scheduler.load_state_dict(states["scheduler"])
        set_state_dict(
            self.model, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
