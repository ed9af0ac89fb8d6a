"""One class per --engine: the wrapped model, the optimizer over it, and what differs around a step."""

import json
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import lion_dist.checkpoint
from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.integrations.deepspeed import lion_optimizer
from lion_dist.optimizer import local_tensor
from ranks import replicas_mesh
from report import MEMORY_KINDS


class PlainEngine:
    """One process and Lion."""

    pending_save: lion_dist.checkpoint.PendingSave | None = None

    def __init__(self, model: nn.Module, args: Namespace, policy: PrecisionPolicy, device: torch.device):
        self.model = model  # names its parameters for checkpoints and checks
        self.forward = model  # what the training loop calls
        self.optimizer = Lion(
            param_groups(model, args), lr=args.lr, precision=policy, metrics_every=args.metrics_every
        )

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
        """Starts a checkpoint, which is written while training goes on; the one before it has been finished."""
        self.pending_save = lion_dist.checkpoint.save_async(
            path, model=self.model, optimizer=self.optimizer, extra=extra
        )

    def finish_save(self) -> None:
        """Waits for the checkpoint that was started, if any; an error in writing it comes out here."""
        if self.pending_save is not None:
            self.pending_save.wait()

    @staticmethod
    def newest(folder: Path) -> Path | None:
        """The newest whole checkpoint directly under the folder."""
        return lion_dist.checkpoint.newest(folder)

    @staticmethod
    def keep_last(folder: Path, count: int) -> None:
        """Removes older whole checkpoints; every rank calls."""
        lion_dist.checkpoint.keep_last(folder, count)

    def load(self, path: Path) -> dict:
        """Returns what was saved as `extra`."""
        return lion_dist.checkpoint.load(path, model=self.model, optimizer=self.optimizer)

    def full_parameters(self) -> AbstractContextManager:
        """Within it every rank sees whole parameters; every rank enters."""
        return nullcontext()

    def memory_bytes(self) -> dict[str, int]:
        """Bytes on this rank by kind, from the tensors themselves, after a backward."""
        size = dict.fromkeys(MEMORY_KINDS, 0)
        for parameter in [p for group in self.optimizer.param_groups for p in group["params"]]:
            size["params"] += local_tensor(parameter).nbytes
            size["grads"] += 0 if parameter.grad is None else local_tensor(parameter.grad).nbytes
            for name, state in self.optimizer.state.get(parameter, {}).items():
                if name != "step":
                    size["exp_avg" if name == "exp_avg" else "main_params"] += local_tensor(state).nbytes
        return size

    def finish_param_sync(self) -> None:
        """Before parameters are read outside the training loop."""

    def metrics(self) -> dict:
        """What the optimizer measured last (docs/metrics.md); every rank calls."""
        return self.optimizer.metrics()

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
            process_group=replicas_mesh(args.replicate, device, timedelta(seconds=args.timeout)),
            sharding=ShardingConfig(zero_stage=args.zero_stage),
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


ENGINES = {
    "plain": PlainEngine,
    "ddp": DDPEngine,
    "sharded": ShardedEngine,
    "fsdp2": FSDP2Engine,
    "fsdp1": FSDP1Engine,
    "deepspeed": DeepSpeedEngine,
}


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
