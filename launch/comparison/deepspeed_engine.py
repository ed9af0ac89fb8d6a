"""DeepSpeed, configured by JSON files."""

import json
import os
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from comparison import ranks
from comparison.durable import clear, doomed_of, remove, sync
from comparison.plain_engine import PlainEngine, param_groups
from comparison.report import MEMORY_KINDS
from lion_dist import PrecisionPolicy
from lion_dist.integrations.deepspeed import lion_optimizer


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
        """Under another name, for DeepSpeed writes in place: what is named step-N is whole and durable."""
        partial = path.with_name(path.name + ".partial")
        is_first, is_first_of_node = dist.get_rank() == 0, os.environ["LOCAL_RANK"] == "0"
        # Of a killed save, maybe of more ranks.
        _all_or_none(lambda: is_first and partial.exists() and remove(partial, path))
        self.engine.save_checkpoint(str(partial), tag="deepspeed", client_state=extra)
        dist.barrier()
        _all_or_none(lambda: is_first_of_node and _make_durable(partial))  # what its ranks wrote is in its page cache
        _all_or_none(lambda: is_first and _replace(path, partial))

    @staticmethod
    def newest(folder: Path) -> Path | None:
        return max(_checkpoints(folder), key=_step, default=None)

    @staticmethod
    def newest_verified(folder: Path) -> Path | None:
        """The newest by name, as the first rank sees it: DeepSpeed's files have no checksums."""
        return ranks.gather_objects(DeepSpeedEngine.newest(folder))[0]

    @staticmethod
    def keep_last(folder: Path, count: int) -> None:
        def remove_older():
            for doomed in folder.glob("step-*.removed"):
                clear(doomed)
            for old in sorted(_checkpoints(folder), key=_step)[:-count]:
                _remove_or_warn(old)

        _all_or_none(lambda: dist.get_rank() == 0 and remove_older())

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


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]


def _step(checkpoint: Path) -> int:
    """As a number: by name step-1000000 comes before step-999999."""
    return int(checkpoint.name.removeprefix("step-"))


def _all_or_none(act: Callable[[], object]) -> None:
    """Every rank acts, and where one cannot, all raise OSError with its reason: none is left waiting for it."""
    reason = None
    try:
        act()
    except OSError as error:
        reason = str(error)
    for rank, found in enumerate(ranks.gather_objects(reason)):
        if found is not None:
            raise OSError(f"rank {rank}: {found}")


def _replace(path: Path, partial: Path) -> None:
    """The one that had the name goes when the new one has it for good."""
    doomed = path.rename(doomed_of(path)) if path.exists() else None
    partial.rename(path)
    sync(path.parent)
    if doomed is not None:
        clear(doomed)


def _remove_or_warn(path: Path) -> None:
    try:
        remove(path, path)
    except OSError as error:
        warnings.warn(f"{path} cannot be removed and stays: {error}", stacklevel=2)


def _make_durable(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        sync(path)


def read_config(args: Namespace) -> dict:
    """deepspeed/zeroN.json, or --deepspeed-config, as it is.

    Raises:
        ValueError: no such file, no JSON, or a section is missing that the arguments are filled into.
    """
    path = args.deepspeed_config or Path(__file__).parents[1] / "deepspeed" / f"zero{args.zero_stage}.json"
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Pass --deepspeed-config with a JSON file.") from error
    remedies = {
        ("optimizer", "params"): '"optimizer": {"type": "Lion", "params": {"lr": "auto", "weight_decay": "auto"}}',
        ("bf16", "enabled"): '"bf16": {"enabled": "auto"}',
    }
    for (section, key), remedy in remedies.items():
        if not isinstance(config, dict) or key not in (config.get(section) or {}):
            raise ValueError(f'{path} has no "{section}" with "{key}". Write {remedy}; "auto" is from the arguments.')
    return config


def deepspeed_config(args: Namespace) -> dict:
    """``read_config`` with its "auto" values filled in from the arguments."""
    config = read_config(args)
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
