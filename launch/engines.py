"""One class per --engine: the wrapped model, the optimizer over it, and what differs around a step."""

import json
import math
import os
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lion_dist.checkpoint
from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.integrations.deepspeed import lion_optimizer
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

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, loss: torch.Tensor) -> None:
        """`loss` is a micro-batch's part of the step's."""
        loss.backward()

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """The norm before clipping, 0-d; max_norm 0 only measures it."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm or math.inf)

    def step(self, max_norm: float) -> torch.Tensor:
        """Clips and updates; returns the norm before clipping, 0-d."""
        grad_norm = self.clip_grad_norm_(max_norm)
        self.optimizer.step()
        return grad_norm

    def save(self, path: Path, extra: dict) -> None:
        lion_dist.checkpoint.save(path, model=self.model, optimizer=self.optimizer, extra=extra)

    def load(self, path: Path) -> dict:
        """Returns what was saved as `extra`."""
        return lion_dist.checkpoint.load(path, model=self.model, optimizer=self.optimizer)

    def full_parameters(self) -> AbstractContextManager:
        """Within it every rank sees whole parameters; every rank enters."""
        return nullcontext()

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

    def skipped_steps(self) -> int:
        """Steps that left everything as it was because a gradient was not finite; only ShardedLion counts them."""
        return 0


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

    def skipped_steps(self) -> int:
        return self.optimizer.skipped_steps()


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
        self.engine.save_checkpoint(str(path), tag="deepspeed", client_state=extra)

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


ENGINES = {"plain": PlainEngine, "ddp": DDPEngine, "sharded": ShardedEngine, "deepspeed": DeepSpeedEngine}


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


def param_groups(model: nn.Module, args: Namespace) -> list[dict]:
    """Matrices decay; the gains of the norms do not."""
    return [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
