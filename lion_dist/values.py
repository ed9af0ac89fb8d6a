"""One check for each kind of value that a user passes: every refusal names the argument, its value and the remedy.

Numbers and flags may come from NumPy or as tensors of one element; they are read as the Python values that they hold.
A bool is no number and a number is no flag: ``"False"`` and ``lr=True`` are mistakes, not choices.
"""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
FP32_MAX = torch.finfo(torch.float32).max

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def shown(value: object) -> str:
    """``value`` for a message, on one line."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    return " ".join(_short.repr(value).split())


def plain(value: object) -> object:
    """The Python value of a NumPy scalar or a tensor of one element (which waits for its device); else ``value``."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and not value.is_meta else value
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if is_scalar else value


def plain_list(value: object) -> object:
    """The Python list of a NumPy array or a tensor of any size; else ``value``."""
    is_array = type(value).__module__ == "numpy" and hasattr(value, "tolist")
    return value.tolist() if is_array or (isinstance(value, Tensor) and not value.is_meta) else value


def as_number(value: object) -> float | None:
    """A finite or infinite number as a float; None where it is none, NaN, or too large for a float."""
    value = plain(value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return None if math.isnan(value) else value


def number(name: str, value: object, expected: str, *, above: float, remedy: str, finite: bool = False) -> float:
    """``value`` as a float; ValueError unless it is a number above ``above``."""
    found = as_number(value)
    if found is None or not found > above or (finite and math.isinf(found)):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}. {remedy}")
    return found


def scalar_tensor(name: str, value: Tensor) -> None:
    """ValueError unless the tensor ``value`` has the form of a number. Looking at it would wait for its device."""
    if value.numel() != 1:
        raise ValueError(
            f"{name} as a tensor must hold one element, got shape {tuple(value.shape)}. Pass one of shape ()."
        )
    if value.dtype == torch.bool or value.is_complex() or value.is_meta:
        raise ValueError(
            f"{name} as a tensor must hold a real number, got {value.dtype} on {value.device}. Pass a float, or a "
            "torch.float32 tensor on the parameters' device."
        )


def rate(name: str, value: object) -> None:
    """A learning rate or weight decay: finite in fp32 and at least 0; of a tensor only the form is looked at."""
    if isinstance(value, Tensor):
        scalar_tensor(name, value)
        return
    found = as_number(value)
    if found is None or not 0 <= found <= FP32_MAX:
        raise ValueError(
            f"{name} must be finite and at least 0, got {shown(value)}. Steps are computed in fp32 (up to 3.4e38): "
            "pass a number such as 1e-4, without quotes."
        )


def whole_number(name: str, value: object, expected: str, *, least: int, remedy: str, below: float = math.inf) -> int:
    """``value`` as an int; ValueError unless it is a whole number in [``least``, ``below``). 2.0 is none."""
    found = plain(value)
    if not isinstance(found, numbers.Integral) or isinstance(found, bool) or not least <= found < below:
        raise ValueError(f"{name} must be {expected}, got {shown(value)}. {remedy}")
    return int(found)


def flag(name: str, value: object, *, optional: bool = False) -> bool | None:
    """``value`` as a bool; ``optional``: or None."""
    found = plain(value)
    if isinstance(found, bool) or (optional and found is None):
        return found
    choices = "True, False or None" if optional else "True or False"
    raise ValueError(f"{name} must be {choices}, got {shown(value)}. Pass one of them, without quotes.")


def choice(name: str, value: T, choices: Sequence[T]) -> T:
    """ValueError unless ``value`` is one of ``choices``, which are strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {shown(value)}. Pass one of them.")
    return str(value)  # pyrefly: ignore[bad-return] # T is a kind of string


def dtype(name: str, value: object, choices: Sequence[torch.dtype], remedy: str) -> torch.dtype | None:
    """ValueError unless ``value`` is one of ``choices``, or None."""
    if value is not None and (not isinstance(value, torch.dtype) or value not in choices):
        allowed = ", ".join(map(str, choices))
        raise ValueError(f"{name} must be {allowed} or None, got {shown(value)}. {remedy}")
    return value


def instance(name: str, value: object, kind: type[T], remedy: str, *, optional: bool = False) -> T | Any:
    """TypeError unless ``value`` is a ``kind``; ``optional``: or None. For config objects, modules, groups of ranks."""
    if not isinstance(value, kind) and not (optional and value is None):
        or_none = " or None" if optional else ""
        raise TypeError(f"{name} must be a {kind.__name__}{or_none}, got {shown(value)}. {remedy}")
    return value


def closure(value: object) -> None:
    """TypeError unless ``value`` can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"closure must be a function or None, got {shown(value)}. Call step() without arguments.")


def path(name: str, value: object) -> Path:
    """``value`` as a Path."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise TypeError(f"{name} must be a path, got {shown(value)}. Pass a string or a pathlib.Path.")
    return Path(value)


def params(value: object) -> Iterable:
    """What an optimizer is made over, as torch's takes it; a TypeError of torch's own names what is inside."""
    has_no_items = getattr(value, "ndim", None) == 0  # an array of no dimensions claims to be iterable
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping) or has_no_items:
        raise TypeError(f"params must be parameters or param groups, got {shown(value)}. Pass model.parameters().")
    return value


def param_group(value: object) -> None:
    """TypeError unless ``value`` can be a param group."""
    if not isinstance(value, Mapping) or "params" not in value:
        raise TypeError(
            f'param_group must be a dict with "params", got {shown(value)}. Pass {{"params": [...], "lr": ...}}.'
        )
    if not isinstance(value["params"], Tensor):
        params(value["params"])


def state_dict(value: object) -> None:
    """ValueError unless ``value`` has the form of an optimizer's ``state_dict()``."""
    remedy = "Pass what state_dict() returned."
    if not isinstance(value, Mapping):
        raise ValueError(f"state_dict must be a dict, got {shown(value)}. {remedy}")
    for key, kind, described in (("state", Mapping, "dict"), ("param_groups", list | tuple, "list")):
        if key not in value:
            raise ValueError(
                f"state_dict needs {key!r} (a {described}), got a dict with {sorted(map(str, value))[:8]}. {remedy}"
            )
        if not isinstance(value[key], kind):
            raise ValueError(f"state_dict needs {key!r} to be a {described}, got {shown(value[key])}. {remedy}")
    for i, group in enumerate(value["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(f'state_dict: param group {i} has no list "params". {remedy}')


def refuse_in_json(name: str, value: object, depth: int = 0) -> None:
    """ValueError naming the first part of ``value`` that JSON cannot hold; ``name``: of ``value``."""
    if depth > 100:
        raise ValueError(f"{name} is nested too deeply for JSON (or holds itself). Flatten it.")
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str | int | float | None):
                raise ValueError(f"{name} has the key {shown(key)}, but keys in JSON are strings. Rename it.")
            refuse_in_json(f"{name}[{shown(key)}]", part, depth + 1)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            refuse_in_json(f"{name}[{i}]", part, depth + 1)
    elif value is not None and not isinstance(value, str | int | float):
        is_array = isinstance(value, Tensor) or type(value).__module__ == "numpy"
        remedy = "Pass .item() or .tolist() of it." if is_array else "Convert it, or save it in a file of its own."
        raise ValueError(f"{name} must be a JSON value, got {shown(value)} ({type(value).__name__}). {remedy}")
