"""One process and Lion: what every engine starts from."""

import math
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import lion_dist.checkpoint
from comparison.report import MEMORY_KINDS
from lion_dist import Lion, PrecisionPolicy


class PlainEngine:
    """One process and Lion."""

    pending_save: lion_dist.checkpoint.PendingSave | None = None

    def __init__(self, model: nn.Module, args: Namespace, policy: PrecisionPolicy, device: torch.device):
        self.model = model  # names its parameters for checkpoints and checks
        self.forward = model  # what the training loop calls
        self.optimizer = Lion(param_groups(model, args), lr=args.lr, precision=policy, metrics_every=args.metrics_every)

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
    def newest_verified(folder: Path) -> Path | None:
        """The newest one of which every byte is as it was written; warns of those left out. Every rank calls."""
        return lion_dist.checkpoint.newest(folder, verified=True)

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
            size["params"] += _local(parameter).nbytes
            size["grads"] += 0 if parameter.grad is None else _local(parameter.grad).nbytes
            for name, state in self.optimizer.state.get(parameter, {}).items():
                if name != "step":
                    size["exp_avg" if name == "exp_avg" else "main_params"] += _local(state).nbytes
        return size

    def finish_param_sync(self) -> None:
        """Before parameters are read outside the training loop."""

    def metrics(self) -> dict:
        """What the optimizer measured last (docs/metrics.md); every rank calls."""
        return self.optimizer.metrics()

    def skipped_steps(self) -> int:
        """Steps that left everything as it was because a gradient was not finite; only ShardedLion counts them."""
        return 0


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def param_groups(model: nn.Module, args: Namespace) -> list[dict]:
    """Matrices decay; the gains of the norms do not."""
    return [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
