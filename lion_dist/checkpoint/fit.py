"""Whether a checkpoint fits a model and its optimizer: all that ``load`` refuses, found out before anything changes."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lion_dist.averages import KIND as AVERAGE
from lion_dist.checkpoint.conversion import Stored
from lion_dist.checkpoint.errors import CheckpointError
from lion_dist.checkpoint.sharded_state import GROUP_KEYS, ShardedState
from lion_dist.hyperparameters import check_hyperparameters

SETTINGS = ("lr", "betas", "weight_decay")  # that each param group has
STATE_KEYS = ("exp_avg", "main_param", AVERAGE, "step")


def check_fit(path: Path, stored: Stored, groups: list[dict], state: ShardedState) -> None:
    """Raise CheckpointError, with what differs, unless the checkpoint can be loaded into ``state``.

    Args:
        stored: its tensors.
        groups: its param groups.
    """
    _refuse(path, "another model", _other_tensors(stored, state))
    _refuse(path, "other param groups", _other_groups(groups, state.param_groups))
    _refuse(path, "other optimizer state", _other_state(stored, state))
    _refuse(path, "tensors that cannot be converted", _other_dtypes(stored, state))
    for i, group in enumerate(groups):
        wrong = wrong_setting(group)
        if wrong is not None:
            raise CheckpointError(f"{path}: param group {i} {wrong}")


def _refuse(path: Path, what: str, differences: list[str]) -> None:
    if differences:
        more = f" and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise CheckpointError(f"{path} is of {what}: {'; '.join(sorted(differences)[:10])}{more}")


def _other_tensors(stored: Stored, state: ShardedState) -> list[str]:
    saved = {key.removeprefix("model."): entry.size for key, entry in stored.items() if key.startswith("model.")}
    here = {name: param.value.shape for name, param in state.params.items()}
    here |= {name: buffer.shape for name, buffer in state.buffers.items()}
    differences = [f"only in the checkpoint: {name}" for name in saved.keys() - here.keys() - state.elsewhere]
    differences += [f"only in the model: {name}" for name in here.keys() - saved.keys() if here[name].numel()]
    for name in saved.keys() & here.keys():
        if saved[name] != here[name]:
            differences.append(f"{name}: {tuple(saved[name])} saved, {tuple(here[name])} here")
    return differences


def _other_groups(saved: list[dict], present: list[dict]) -> list[str]:
    differences = [] if len(saved) == len(present) else [f"{len(saved)} param groups saved, {len(present)} here"]
    for i, (theirs, mine) in enumerate(zip(saved, present, strict=False)):
        moved = sorted(set(theirs["params"]) ^ set(mine["params"]))
        differences += [f"param group {i}: {name} is in only one of the two" for name in moved]
    return differences


def _other_state(stored: Stored, state: ShardedState) -> list[str]:
    differences = []
    for key, entry in stored.items():
        name, _, kind = key.removeprefix("optimizer.").rpartition(".")
        if key.startswith("model.") or (key.startswith("optimizer.") and name in state.elsewhere):
            continue
        if key == "counters":
            wrong = wrong_state("counters", entry.size, entry.properties.dtype, (2,))
        elif key == "spike_guard":
            here = entry.size if state.spike_window is None else state.spike_window.shape
            wrong = wrong_state("spike_guard", entry.size, entry.properties.dtype, here)
        elif not key.startswith("optimizer.") or kind not in STATE_KEYS or name not in state.params:
            wrong = "belongs to nothing here"
        else:
            value = stored.get(f"model.{name}")
            param_dtype = None if value is None else value.properties.dtype
            wrong = wrong_state(kind, entry.size, entry.properties.dtype, state.params[name].value.shape, param_dtype)
        if wrong is not None:
            differences.append(f"{key} {wrong}")
    return differences


def wrong_state(
    kind: str, size: torch.Size, dtype: torch.dtype, shape: tuple, param_dtype: torch.dtype | None = None
) -> str | None:
    """What is wrong with saved state of a parameter of ``shape`` and ``param_dtype``; None when nothing is."""
    if kind == "step":
        shape = ()
    if tuple(size) != tuple(shape):
        return f"is {tuple(size)}, not {tuple(shape)}"
    is_whole_number = not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool
    if kind in ("step", "counters"):
        return None if is_whole_number else f"counts in {dtype}"
    if kind == "spike_guard":
        return None if dtype == torch.float64 else f"is {dtype}, not torch.float64"
    if kind in ("exp_avg", AVERAGE):
        return None if dtype.is_floating_point else f"is {dtype}, no floating-point numbers"
    if dtype == torch.int16:
        return None if param_dtype == torch.bfloat16 else f"is a remainder of bf16, of a parameter in {param_dtype}"
    if dtype != torch.float32 or param_dtype is None or not param_dtype.is_floating_point:
        return f"is {dtype} of a parameter in {param_dtype}"
    return None


def _other_dtypes(stored: Stored, state: ShardedState) -> list[str]:
    here = {key: boxed.dtype for key, boxed in state.tensors().items()}
    saved = {key: stored[key].properties.dtype for key in here.keys() & stored.keys() if not key.endswith("main_param")}
    convertible = {pair: _can_convert(*pair) for pair in {(saved[key], here[key]) for key in saved}}
    return [f"{key}: {saved[key]} to {here[key]}" for key in saved if not convertible[saved[key], here[key]]]


def _can_convert(saved: torch.dtype, here: torch.dtype) -> bool:
    if not torch.can_cast(saved, here):
        return False
    try:  # torch knows dtypes that it can neither read nor copy
        torch.empty(1, dtype=here).copy_(torch.frombuffer(bytearray(saved.itemsize), dtype=saved, count=1))
    except (RuntimeError, ValueError, TypeError):
        return False
    return True


def wrong_setting(group: dict) -> str | None:
    """What is wrong with the settings of a saved param group; None when nothing is."""
    missing = [key for key in SETTINGS if key not in group]
    if missing:
        return f"has no {', '.join(missing)}"
    unknown = sorted(group.keys() - {*GROUP_KEYS, "params"})
    if unknown:
        return f"has settings that this version does not know: {', '.join(unknown)}"
    if not isinstance(group["betas"], list | tuple):
        return f"has betas {group['betas']!r:.40}"
    numbers = [(key, group[key]) for key in GROUP_KEYS if key in group and key != "betas"]
    for key, value in [*numbers, *(("betas", beta) for beta in group["betas"])]:
        if type(value) not in (int, float) or not math.isfinite(value):
            return f"has {key} {value!r:.40}"
    try:
        check_hyperparameters(group)
    except ValueError as error:
        return f"is refused: {error}"
    return None
