"""Hugging Face ``Trainer`` with :class:`~lion_dist.ShardedLion`.

A script changes by one import:

    from lion_dist.integrations.transformers import ShardedTrainer as Trainer

Any other trainer (TRL's, or one of your own) becomes sharded by a base class that stands before it:

    class MySFTTrainer(ShardedTraining, SFTTrainer): ...

The learning rate, weight decay and schedule come from ``TrainingArguments`` as always, and the Trainer's own groups
keep biases and norms from decaying. Other settings of the optimizer are given by
``optimizer_cls_and_kwargs=(ShardedLion, {"betas": ..., "sharding": ..., "precision": ...})``.

Checkpoints are the Trainer's own files, with the whole optimizer state in ``optimizer.pt``: ``accelerate.py`` says why.
"""

from __future__ import annotations

import os

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from lion_dist.integrations.accelerate import ShardedAccelerator
from lion_dist.sharded_lion import ShardedLion

BETAS = (0.9, 0.99)
BETAS_OF_ADAM = (0.9, 0.999)  # TrainingArguments' defaults, which are no choice of the user's
DEFAULT_OPTIMS = ("adamw_torch", "adamw_torch_fused")  # "optim" of TrainingArguments that nobody has set


class ShardedTraining:
    """Makes the trainer that follows it among the base classes train with ShardedLion instead of DDP.

    Refused by name: ``fsdp``, ``deepspeed`` and ``parallelism_config`` (use ``lion_dist.Lion``), another optimizer,
    several GPUs in one process, ``save_on_each_node``, a ``weight_decay`` beside the optimizer's class.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _refuse_other_optimizers(self)

    def create_accelerator_and_postprocess(self) -> None:
        _refuse_engines(self.args)
        super().create_accelerator_and_postprocess()
        ShardedAccelerator.adopt(self.accelerator)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's own, which makes the param groups, with ShardedLion over the model."""
        given = self.optimizer_cls_and_kwargs
        kind, options = given or (ShardedLion, {})
        defaults = {"lr": self.args.learning_rate, "betas": _betas(self.args)}
        module = self.model if model is None else model
        self.optimizer_cls_and_kwargs = (kind, {**defaults, **options, "module": module})
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given  # a search for hyperparameters comes again with other ones

    # ---- saving and loading: all ranks come here, and rank 0 writes

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.accelerator.consolidate()
        super()._save_optimizer_and_scheduler(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        for optimizer in self.accelerator.sharded_lions:
            optimizer.finish_param_sync()
        super().save_model(output_dir, _internal_call)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer would put the whole state on every GPU; here each rank reads its part of the file."""
        files = [os.path.join(checkpoint, name) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)] if checkpoint else []
        if files and all(map(os.path.isfile, files)):
            optimizer, scheduler = (torch.load(f, map_location="cpu", weights_only=True, mmap=True) for f in files)
            self.optimizer.load_state_dict(optimizer)
            self.lr_scheduler.load_state_dict(scheduler)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        for optimizer in self.accelerator.sharded_lions:
            optimizer.broadcast_buffers()  # as DistributedDataParallel does before every forward
        return super().evaluate(*args, **kwargs)


class ShardedTrainer(ShardedTraining, Trainer):
    """``transformers.Trainer`` that trains with ShardedLion; it takes the same arguments."""


def _betas(args: TrainingArguments) -> tuple[float, float]:
    given = (args.adam_beta1, args.adam_beta2)
    return BETAS if given == BETAS_OF_ADAM else given


def _refuse_engines(args: TrainingArguments) -> None:
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name):
            raise ValueError(
                f"TrainingArguments({name}=...) shards the model itself, and ShardedLion needs a replicated one. Leave "
                f"it out, or use transformers.Trainer with lion_dist.Lion (docs/{name}.md)."
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"this process has {args.n_gpu} GPUs, for which the Trainer takes nn.DataParallel. Start one process for "
            "each GPU: torchrun --nproc-per-node N script.py."
        )
    if args.save_on_each_node:
        raise ValueError(
            "save_on_each_node=True would save optimizer state on ranks that hold a part of it. Set output_dir to a "
            "folder that all nodes share."
        )


def _refuse_other_optimizers(trainer: Trainer) -> None:
    args, given = trainer.args, trainer.optimizer
    if given is not None and not isinstance(given, ShardedLion):
        raise ValueError(
            f"optimizers=({type(given).__name__}, ...): a sharded trainer trains with ShardedLion. Leave it out, or "
            "pass optimizer_cls_and_kwargs=(ShardedLion, {...})."
        )
    kind, options = trainer.optimizer_cls_and_kwargs or (ShardedLion, {})
    if not (isinstance(kind, type) and issubclass(kind, ShardedLion)):
        raise ValueError(
            f"optimizer_cls_and_kwargs=({getattr(kind, '__name__', kind)}, ...): a sharded trainer trains with "
            "ShardedLion. Pass that class, or use transformers.Trainer."
        )
    if "weight_decay" in options:
        raise ValueError(
            f"weight_decay={options['weight_decay']} beside ShardedLion would be ignored: the Trainer writes its own "
            "into the param groups. Set TrainingArguments(weight_decay=...)."
        )
    if args.optim not in DEFAULT_OPTIMS:
        raise ValueError(
            f"TrainingArguments(optim={args.optim.value!r}) asks for another optimizer; a sharded trainer trains with "
            "ShardedLion. Leave optim out."
        )
