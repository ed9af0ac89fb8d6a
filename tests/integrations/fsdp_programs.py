"""A user's script: ``fsdp_programs.py FRAMEWORK OUT`` trains a tiny bf16 Llama with ``Lion`` on the ranks it is given.

Accelerate takes its FSDP plugin only on accelerators; on CPUs it drops it without a word and runs DDP, also under the
Trainer. So the program tells Accelerate's state that this is FSDP, and reports how the model was really wrapped. (For
FSDP1 that does not help: its plugin refuses to be made without an accelerator.)
"""

import sys
from functools import partial
from pathlib import Path

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from lion_dist import Lion
from lion_dist.local_shard import local_tensor
from tests.integrations.trainer_programs import counting_sequences, leave, tiny_llama

SETTINGS = {"lr": 3e-3, "weight_decay": 0.01}
STEPS, SAVED_AT = 24, 12


def let_accelerate_shard_on_cpus() -> None:
    original = accelerate.state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")  # every instance shares one __dict__
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    accelerate.state.AcceleratorState.__init__ = init


def by_accelerate(out: Path, resume: bool):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=True)
    model = tiny_llama().bfloat16()
    loader = torch.utils.data.DataLoader(counting_sequences(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, Lion(model.parameters(), **SETTINGS), loader)
    if resume:
        accelerator.load_state(str(out / "state"))
    losses = []
    for step, batch in enumerate(batch for _ in range(3) for batch in loader):
        if resume and step < SAVED_AT:
            continue
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not resume and step == SAVED_AT - 1:
            accelerator.save_state(str(out / "state"))
    return model, optimizer.optimizer, losses


def by_trainer(out: Path, resume: bool, fsdp: bool):
    """Without FSDP the optimizer is the user's own; with it the Trainer makes it, and refuses another."""
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        use_cpu=True,
        fsdp=fsdp,
        per_device_train_batch_size=4,
        max_steps=STEPS,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=SAVED_AT,
        report_to=[],
        disable_tqdm=True,
    )
    model = tiny_llama().bfloat16()
    if fsdp:
        chosen = {"optimizer_cls_and_kwargs": (Lion, SETTINGS)}
    else:
        chosen = {"optimizers": (Lion(model.parameters(), **SETTINGS), None)}
    trainer = Trainer(model=model, args=arguments, train_dataset=counting_sequences(), **chosen)
    trainer.train(resume_from_checkpoint=str(out / "trainer" / f"checkpoint-{SAVED_AT}") if resume else None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return trainer.model_wrapped, trainer.optimizer.optimizer, losses


PROGRAMS = {
    "accelerate": by_accelerate,
    "trainer fsdp2": partial(by_trainer, fsdp=True),
    "trainer ddp": partial(by_trainer, fsdp=False),
}


def wrapper_of(model: nn.Module) -> str:
    kinds = (FSDPModule, nn.parallel.DistributedDataParallel)
    return next((kind.__name__ for kind in kinds if isinstance(model, kind)), type(model).__name__)


def main() -> None:
    program, out, resume = sys.argv[1], Path(sys.argv[2]), len(sys.argv) > 3
    let_accelerate_shard_on_cpus()
    model, optimizer, losses = PROGRAMS[program](out, resume)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params if optimizer.state[p]]
    held = torch.tensor([sum(local_tensor(t).nbytes for s in states for t in s.values())])
    shares = [torch.empty_like(held) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, held)
    found = {
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "wrapper": wrapper_of(model),
        "state": sorted({f"{key} {value.dtype}" for state in states for key, value in state.items()}),
        "bytes of state": [share.item() for share in shares],
        "losses": losses,
    }
    leave(out, found)


if __name__ == "__main__":
    main()
