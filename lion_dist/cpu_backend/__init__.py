"""The step on the CPU: compiled C, and PyTorch operations where there is no compiler."""

from __future__ import annotations

from lion_dist.cpu_backend import native


def choose() -> str:
    """Which of ``kernels.backends.MODULES`` updates CPU tensors on this machine."""
    return "cpu" if native.library() is None else "cpu_native"
