"""DeepSpeed, configured by JSON files."""

import json
import os
import shutil
from argparse import Namespace
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lion_dist import PrecisionPolicy
from lion_dist.integrations.deepspeed import lion_optimizer
from plain_engine import PlainEngine, param_groups
from report import MEMORY_KINDS


class DeepSpeedEngine(PlainEngine):
    """DeepSpeed, ZeRO stage 0 to 3, by the JSON of that stage; it clips, accumulates and saves in its own way."""

    def __init__(self, model: nn.Module, args: Namespace, policy: PrecisionPolicy, device: torch.device):
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ.setdefault("LOCAL_RANK", "0")
        import deepspeed

        config = deepspeed_config(args)
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=param_groups(model, args), optimizer=lion_optimizer(config), config=config
        )
        self.model = self.engine.module
        self.forward = self.engine
        self.optimizer = self.engine.basic_optimizer  # what the schedule changes the learning rate of
        self.micro_batches = args.micro_batches

    def zero_grad(self) -> None:
        """step() has zeroed them."""

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * self.micro_batches)  # it divides by them itself
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch

    def step(self, max_norm: float) -> torch.Tensor:
        self.engine.step()  # clips by the config
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.engine.device)

    def save(self, path: Path, extra: dict) -> None:
        """Under another name, for DeepSpeed writes in place: what is named step-N is whole."""
        partial = path.with_name(path.name + ".partial")
        self.engine.save_checkpoint(str(partial), tag="deepspeed", client_state=extra)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
        dist.barrier()

    @staticmethod
    def newest(folder: Path) -> Path | None:
        return max(folder.glob("step-*[0-9]"), default=None)

    @staticmethod
    def keep_last(folder: Path, count: int) -> None:
        if dist.get_rank() == 0:
            for old in sorted(folder.glob("step-*[0-9]"))[:-count]:
                shutil.rmtree(old)

    def load(self, path: Path) -> dict:
        return self.engine.load_checkpoint(str(path), tag="deepspeed")[1]

    def full_parameters(self) -> AbstractContextManager:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.model.parameters()))

    def memory_bytes(self) -> dict[str, int]:
        """Between steps, when DeepSpeed holds no gradients but those of its fp32 accumulation."""
        size = dict.fromkeys(MEMORY_KINDS, 0)
        parameters = set(self.model.parameters())
        size["params"] = sum(getattr(p, "ds_tensor", p).nbytes for p in parameters)
        for main, state in self.optimizer.state.items():
            size["main_params"] += 0 if main in parameters else main.nbytes
            size["exp_avg"] += state["exp_avg"].nbytes
        return size


def deepspeed_config(args: Namespace) -> dict:
    """deepspeed/zeroN.json, or --deepspeed-config, with its "auto" values filled in from the arguments."""
    path = args.deepspeed_config or Path(__file__).with_name("deepspeed") / f"zero{args.zero_stage}.json"
    config = json.loads(Path(path).read_text())
    rows = args.batch_size // (args.micro_batches * dist.get_world_size())
    arguments = {"lr": args.lr, "weight_decay": args.weight_decay}
    config["optimizer"]["params"] |= {
        k: v for k, v in arguments.items() if config["optimizer"]["params"].get(k) == "auto"
    }
    if args.momentum_dtype:
        config["optimizer"]["params"]["momentum_dtype"] = args.momentum_dtype
    filled = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": args.micro_batches,
        "gradient_clipping": args.clip,
    }
    config |= {key: value for key, value in filled.items() if config.get(key) == "auto"}
    if config["bf16"]["enabled"] == "auto":
        config["bf16"]["enabled"] = args.precision == "bf16"
    return config
