"""Who takes the step: backends by name, and which of them fits a device.

A backend is a module that translates ``reference.py``: it has ``update`` and ``count_aligned``, with the arguments of
``update.lion_update_`` and ``update.count_aligned_elements``. Each but the reference itself lies in a room that can be
removed; it is imported when it is first asked for, so that nobody pays for a compiler that is not used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

MODULES = {
    "triton": "lion_dist.triton_backend",  # one launch for the whole list
    "cpu_native": "lion_dist.cpu_backend.native",  # C
    "cpu": "lion_dist.cpu_backend.eager",  # PyTorch operations, cache-blocked, where there is no C compiler
    "chunked_reference": "lion_dist.kernels.chunked_reference",  # a GPU without Triton
}


class Backend(Protocol):
    update: Callable[..., None]
    count_aligned: Callable[..., Tensor]


@functools.cache
def backend_of(name: str) -> Backend:
    return importlib.import_module(MODULES[name])  # pyrefly: ignore[bad-return] # a module that has both


def choose_backend(device: torch.device, use_triton: bool | None) -> str:
    """``use_triton``: None chooses, True insists, False forbids."""
    can_launch = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if use_triton:
        if not triton_is_installed():
            raise RuntimeError("use_triton=True, but triton is not installed: pip install 'lion-dist[triton]'")
        if not can_launch:
            raise RuntimeError(
                f"use_triton=True, but the parameters are on {device}. Move the model to a GPU, leave use_triton=None, "
                "or set TRITON_INTERPRET=1 before importing triton to run the kernels in its interpreter (slow)."
            )
        return "triton"
    if device.type == "cuda" and use_triton is None:
        if triton_is_installed():
            return "triton"
        _warn_no_triton()
    if device.type != "cpu":
        return "chunked_reference"
    if not has_room("cpu_backend"):
        _warn_no_cpu_backend()
        return "chunked_reference"
    return importlib.import_module("lion_dist.cpu_backend").choose()  # a look-up, in every step


@functools.cache
def has_room(name: str) -> bool:
    return importlib.util.find_spec(f"lion_dist.{name}") is not None


@functools.cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None and has_room("triton_backend")


@functools.cache
def _warn_no_triton() -> None:
    warnings.warn(
        "lion_dist: triton is not installed, so CUDA tensors are updated by plain PyTorch operations, several times "
        "slower. Install it with: pip install 'lion-dist[triton]', or pass use_triton=False to silence this.",
        stacklevel=3,
    )


@functools.cache
def _warn_no_cpu_backend() -> None:
    warnings.warn(
        "lion_dist: this copy has no cpu_backend/, so CPU tensors are updated by the reference implementation, several "
        "times slower. Install lion-dist anew to change that.",
        stacklevel=3,
    )
