"""What ranks of a pool run under Lightning's Trainer: a small module, trained by DDP and Lion or by ShardedLion."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lion_dist import Lion, ShardedLion, ShardingConfig
from lion_dist.integrations.lightning import GradNorm, ShardedLionStrategy


class Pool(LightningEnvironment):
    """The ranks are there already."""

    creates_processes_externally = True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()

    def set_world_size(self, size: int) -> None:
        assert size == self.world_size()

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.global_rank()


class Regression(pl.LightningModule):
    """Calls its layers one by one in ``training_step``.

    Args:
        optimizer: "Lion", "ShardedLion", or another class's name of torch.optim.
    """

    sharding = ShardingConfig()

    def __init__(self, optimizer: str, manual: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 1)
        self.kind, self.automatic_optimization = optimizer, not manual
        self.norms: list[float] = []
        self.kept: list[bool] = []  # after each backward, whether gradients stay on this rank

    def loss(self, batch: Tensor) -> Tensor:
        return (self.head(torch.tanh(self.body(batch))).float() - batch.float().sum(-1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        batch = batch.to(self.body.weight.dtype)
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(opt, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        opt.step()
        self.lr_schedulers().step()
        return None

    def configure_optimizers(self):
        if self.kind == "ShardedLion":
            opt = ShardedLion(self.parameters(), lr=1e-2, weight_decay=0.1, module=self, sharding=self.sharding)
        elif self.kind == "Lion":
            opt = Lion(self.parameters(), lr=1e-2, weight_decay=0.1)
        else:
            opt = getattr(torch.optim, self.kind)(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
        return [opt], [{"scheduler": schedule, "interval": "step"}]

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if self.kind == "Lion" and gradient_clip_val:  # which Lightning refuses to clip under autocast
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_after_backward(self) -> None:
        self.kept.append(self.body.weight.grad is not None)

    def on_before_optimizer_step(self, optimizer) -> None:
        if isinstance(optimizer, ShardedLion):
            self.norms.append(float(optimizer.grad_norm()))
        else:
            self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters()])))


class Forwarding(Regression):
    """Has a forward, which its ``training_step`` calls."""

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(batch)))

    def loss(self, batch: Tensor) -> Tensor:
        return (self(batch).float() - batch.float().sum(-1, keepdim=True)).square().mean()


class StageOne(Regression):
    """Keeps the gradients of a micro-batch on its rank."""

    sharding = ShardingConfig(zero_stage=1)


class Watching(Regression):
    """Notes in each step whether the head's parameters were whole when the body had computed."""

    sharding = ShardingConfig(bucket_numel=144)  # a bucket for each layer

    def configure_optimizers(self):
        optimizers, schedules = super().configure_optimizers()
        head = next(b for b in optimizers[0].buckets if any(p is self.head.weight for p in b.params))
        self.body.register_forward_hook(lambda *_: self.kept.append(head.param_state.name == "FULL"))
        return optimizers, schedules

    def on_after_backward(self) -> None:
        """Only the body is watched."""


class WatchingForward(Watching, Forwarding):
    """The same with a forward of its own."""


def batches(count: int, of_ranks: int) -> DataLoader:
    """This rank's; the same examples altogether whatever the number of ranks."""
    generator = torch.Generator().manual_seed(5)
    every = [torch.randn(4, 8, generator=generator) for _ in range(count)]
    return DataLoader([batch.chunk(of_ranks)[dist.get_rank()] for batch in every], batch_size=None)


def trainer_for(strategy: pl.strategies.Strategy, steps: int, scaler=None, **settings) -> pl.Trainer:
    """``scaler``: of fp16 under autocast, which Lightning does not choose on a CPU by itself."""
    precision = [] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler)]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        plugins=[Pool(), *precision],
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **settings,
    )


def fit(
    sharded: bool,
    steps: int = 4,
    module: type[Regression] = Regression,
    *,
    manual: bool = False,
    save: Path | None = None,
    resume: Path | None = None,
    backend: str | None = None,
    **settings,
) -> dict:
    """Parameters, what the progress bar was told, and the norms that a hook has seen.

    ``backend``: of torch.compile; None: the module is not compiled. ``scaler``, of ``settings``: arguments of torch's
    GradScaler.
    """
    model = module("ShardedLion" if sharded else "Lion", manual)
    if "scaler" in settings:
        settings["scaler"] = torch.amp.GradScaler("cpu", **settings["scaler"])
    trainer = trainer_for(
        ShardedLionStrategy() if sharded else DDPStrategy(),
        steps,
        callbacks=[GradNorm()] if sharded else [],
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = model if backend is None else torch.compile(model, backend=backend)
        trainer.fit(fitted, batches(8, dist.get_world_size()), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    shown = {name: float(value) for name, value in trainer.progress_bar_metrics.items() if name != "v_num"}
    return {
        "params": {name: param.detach().clone() for name, param in model.named_parameters()},
        "shown": shown,
        "norms": model.norms,
        "kept": model.kept,
    }
