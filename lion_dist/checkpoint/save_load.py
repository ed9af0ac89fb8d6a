"""``save`` and ``load``: model, optimizer and the program's own numbers, from any engine into any other.

A checkpoint is a directory: torch.distributed.checkpoint's files, and ``lion_dist.json`` for what is not a tensor
(param groups, ``extra``). What identifies a tensor is the parameter's name in the unwrapped model::

    model.<name>                              the parameter or buffer, whole
    optimizer.<name>.exp_avg | main_param     fp32, bf16 or int16, in the parameter's full shape
    optimizer.<name>.step                     [] int64, with stochastic rounding
    counters                                  [2] int64, steps taken and skipped (ShardedLion)

It is written under another name and renamed when whole, so a directory without ``.partial`` is a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from lion_dist.config import check_hyperparameters
from lion_dist.kernels.reference import join_main, split_main
from lion_dist.optimizer import Lion, local_tensor
from lion_dist.sharded_optimizer import ShardedLion, clean_name
from lion_dist.sharding.boxes import BoxedTensor

FORMAT = 1
JSON_NAME = "lion_dist.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is not there, not whole, or of another model. Nothing has been loaded."""


def save(path: str | Path, *, model: nn.Module, optimizer: Lion | ShardedLion, extra: dict | None = None) -> None:
    """Write a checkpoint to the directory ``path``, replacing an older one. All ranks call it together.

    Args:
        extra: what else the program needs to go on (step, seed, ...): JSON values, the first rank's are kept.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    is_first = _alone() or dist.get_rank() == 0
    described = json.dumps(
        {"format": FORMAT, "param_groups": _param_groups(optimizer, model), "extra": extra or {}}, indent=1
    )
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    writer = FileSystemWriter(partial, sync_files=True)
    with _expecting_one_process():
        dcp.save(_tensors(model, optimizer), storage_writer=writer)
    if is_first:
        with open(partial / JSON_NAME, "w") as file:
            file.write(described)
            file.flush()
            os.fsync(file.fileno())
        _replace(path, partial)
    _barrier()


def load(path: str | Path, *, model: nn.Module, optimizer: Lion | ShardedLion) -> dict:
    """Load a checkpoint of :func:`save` into ``model`` and ``optimizer``, in place. All ranks call it together.

    Ranks, buckets, ZeRO stage and engine may differ from those that saved. The momentum keeps the configured dtype
    (with a warning where the file's differs); main params of the other kind are converted.

    Returns:
        ``extra`` as it was saved.

    Raises:
        CheckpointError: no checkpoint there, or one of another model; what differs is listed, nothing is changed.
    """
    path = Path(path)
    if not (path / JSON_NAME).is_file():
        raise CheckpointError(f"no checkpoint at {path}: it has no {JSON_NAME}. {_neighbours(path)}")
    described = json.loads((path / JSON_NAME).read_text())
    if described["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {described['format']}, this version reads up to {FORMAT}: upgrade")
    reader = FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata

    target = _tensors(model, optimizer)
    _check_same_model(path, stored, target["model"])
    _check_same_groups(path, described["param_groups"], _param_groups(optimizer, model))
    conversions = _prepare_optimizer(stored, target["optimizer"], model)
    if "counters" in target and "counters" not in stored:
        del target["counters"]
    with _expecting_one_process():
        dcp.load(target, storage_reader=reader)
    set_model_state_dict(model, target["model"])
    for convert in conversions:
        convert()
    _finish_optimizer(optimizer, described["param_groups"])
    return described["extra"]


# ---- what is in a checkpoint


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _named_params(model: nn.Module) -> dict[str, Tensor]:
    return {clean_name(name): param for name, param in _unwrapped(model).named_parameters()}


def _tensors(model: nn.Module, optimizer: Lion | ShardedLion) -> dict:
    """The live tensors by name; what this rank owns of them."""
    tensors = {"model": get_model_state_dict(model)}
    if isinstance(optimizer, ShardedLion):
        state = optimizer.state_dict()
        return tensors | {"optimizer": state["state"], "counters": state["counters"]}
    names = {param: name for name, param in _named_params(model).items()}
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return tensors | {"optimizer": {names[p]: optimizer.state_of(p) for p in params}}


def _param_groups(optimizer: Lion | ShardedLion, model: nn.Module) -> list[dict]:
    names = {param: name for name, param in _named_params(model).items()}
    keys = ("lr", "betas", "weight_decay", "initial_lr")
    return [
        {key: _plain(group[key]) for key in keys if key in group} | {"params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]


def _plain(value):
    return value.item() if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else value


# ---- does it fit


def _check_same_model(path: Path, stored: dict, model_state: dict[str, Tensor]) -> None:
    saved = {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}
    differences = [f"only in the checkpoint: {name}" for name in saved.keys() - model_state.keys()]
    differences += [f"only in the model: {name}" for name in model_state.keys() - saved.keys()]
    for name in saved.keys() & model_state.keys():
        if isinstance(saved[name], TensorStorageMetadata) and saved[name].size != model_state[name].shape:
            differences.append(f"{name}: {tuple(saved[name].size)} saved, {tuple(model_state[name].shape)} here")
    _refuse(path, "another model", differences)


def _check_same_groups(path: Path, saved: list[dict], present: list[dict]) -> None:
    differences = [] if len(saved) == len(present) else [f"{len(saved)} param groups saved, {len(present)} here"]
    for i, (theirs, mine) in enumerate(zip(saved, present, strict=False)):
        moved = sorted(set(theirs["params"]) ^ set(mine["params"]))
        differences += [f"param group {i}: {name} is in only one of the two" for name in moved]
    _refuse(path, "other param groups", differences)


def _refuse(path: Path, what: str, differences: list[str]) -> None:
    if differences:
        more = f" and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise CheckpointError(f"{path} is of {what}: {'; '.join(sorted(differences)[:10])}{more}")


def _neighbours(path: Path) -> str:
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
        return f"{partial.name} beside it is a save that did not finish."
    return "Give the directory that save() was given."


# ---- optimizer state of another dtype or kind


def _prepare_optimizer(stored: dict, state: dict[str, dict], model: nn.Module) -> list:
    """Point ``state`` at places of the file's kind; returns what must be called once they are filled."""
    params, after, absent, recast = _named_params(model), [], [], set()
    for name, kinds in state.items():
        for kind, place in list(kinds.items()):
            saved = stored.get(f"optimizer.{name}.{kind}")
            if saved is None:
                absent.append(f"{name}.{kind}")
                del kinds[kind]
            elif kind == "main_param" and saved.properties.dtype != place.dtype:
                kinds[kind], convert = _main_of_other_kind(place, saved.properties.dtype, params[name])
                after.append(convert)
            elif kind == "exp_avg" and saved.properties.dtype != place.dtype:
                recast.add((saved.properties.dtype, place.dtype))
    if absent:
        warnings.warn(f"not in the checkpoint, kept as it is: {', '.join(absent[:5])} ({len(absent)})", stacklevel=3)
    for found, configured in recast:
        warnings.warn(f"the saved exp_avg is {found}; it is kept as {configured}, as configured", stacklevel=3)
    return after


def _main_of_other_kind(place: Tensor, dtype: torch.dtype, param: Tensor):
    """A temporary place for main params of ``dtype`` and the call that brings them to ``place`` afterwards."""
    is_boxed = isinstance(place, BoxedTensor)
    ranges = place.ranges if is_boxed else [(0, place.view(-1))]
    temporary = [(start, torch.empty_like(local, dtype=dtype)) for start, local in ranges]
    flat_param = local_tensor(param.detach()).reshape(-1)

    def convert() -> None:
        for (start, value), (_, local) in zip(temporary, ranges, strict=True):
            if dtype == torch.int16:
                local.copy_(join_main(flat_param[start : start + value.numel()], value))
            else:
                local.copy_(split_main(value)[1])

    boxed = BoxedTensor(place.shape, temporary, dtype=dtype, device=place.device)
    return (boxed if is_boxed else temporary[0][1].view(place.shape)), convert


def _finish_optimizer(optimizer: Lion | ShardedLion, groups: list[dict]) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        settings = {k: tuple(v) if k == "betas" else v for k, v in saved.items() if k != "params"}
        check_hyperparameters({**group, **settings})
        for key, value in settings.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = value


# ---- files


def _alone() -> bool:
    return not dist.is_initialized()


@contextlib.contextmanager
def _expecting_one_process() -> Iterator[None]:
    """Without torch.distributed, its checkpoint module warns that it assumes one process: so do we."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _barrier() -> None:
    if not _alone():
        dist.barrier()


def _replace(path: Path, partial: Path) -> None:
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
