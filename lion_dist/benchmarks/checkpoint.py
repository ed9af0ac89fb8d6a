"""Saving and loading a model and its optimizer, beside torch.save and torch.distributed.checkpoint as they come.

    python -m lion_dist.benchmarks.checkpoint /tmp/somewhere --csv docs/benchmarks/checkpoint.csv

One process; bf16 parameters, split main params, bf16 momentum: 6 bytes a parameter. They take turns. Every save is made
durable (fsync); files are in the page cache when they are loaded. ``stage`` is the part of ``save_async`` that training
waits for. GB/s counts the bytes of the state.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lion_dist import Lion, checkpoint
from lion_dist.benchmarks.report import Rows

Action = Callable[[], object]


def state_of(layers: int, width: int, device: torch.device) -> tuple[nn.Module, Lion]:
    """Square layers and a norm each, trained for no step: their optimizer state exists."""
    blocks = [m for _ in range(layers) for m in (nn.Linear(width, width, bias=False), nn.LayerNorm(width))]
    model = nn.Sequential(*blocks).to(device, torch.bfloat16)
    optimizer = Lion(model.parameters())
    for param in model.parameters():
        optimizer.state_of(param)
    return model, optimizer


def contenders(model: nn.Module, optimizer: Lion, folder: Path) -> dict[str, tuple[Action, Action]]:
    """{name: (save, load)}"""
    both = {"model": model, "optimizer": optimizer}

    def everything() -> dict:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}

    def torch_save() -> None:
        with open(folder / "torch.pt", "wb") as file:
            torch.save(everything(), file)
            os.fsync(file.fileno())

    def torch_load() -> None:
        loaded = torch.load(folder / "torch.pt", weights_only=True)
        model.load_state_dict(loaded["model"])
        mine = optimizer.state_dict()["state"]
        for i, state in loaded["optimizer"].items():
            for kind, tensor in state.items():
                mine[i][kind].copy_(tensor)

    def dcp_save() -> None:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        dcp.save(everything(), checkpoint_id=folder / "dcp")

    return {
        "lion_dist": (
            lambda: checkpoint.save(folder / "lion_dist", **both),
            lambda: checkpoint.load(folder / "lion_dist", **both),
        ),
        "torch.save, one file": (torch_save, torch_load),
        "torch.distributed.checkpoint": (dcp_save, lambda: dcp.load(everything(), checkpoint_id=folder / "dcp")),
    }


def seconds(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="on the file system to measure; it must hold three times the state")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    device = torch.device(args.device)
    args.folder.mkdir(parents=True, exist_ok=True)
    model, optimizer = state_of(args.layers, args.width, device)
    nbytes = 6 * sum(p.numel() for p in model.parameters())
    both = {"model": model, "optimizer": optimizer}
    actions = contenders(model, optimizer, args.folder)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.repeats):
        for name, (save, load) in actions.items():
            times.setdefault((name, "save"), []).append(seconds(save))
            times.setdefault((name, "load"), []).append(seconds(load))
        start = time.perf_counter()
        pending = checkpoint.save_async(args.folder / "lion_dist", **both)
        times.setdefault(("lion_dist", "stage"), []).append(time.perf_counter() - start)
        pending.wait()
    rows = Rows(args.csv, device)
    for (name, what), measured in times.items():
        row = {"what": what, "name": name, "state_gb": round(nbytes / 1e9, 3)}
        for label, value in (("median", statistics.median(measured)), ("best", min(measured))):
            row |= {f"{label}_s": round(value, 3), f"{label}_gb_s": round(nbytes / value / 1e9, 2)}
        rows.add(row)
        print(f"{what}  {name:34}{row['median_s']:8.3f} s {row['median_gb_s']:6.2f} GB/s (best {row['best_gb_s']:.2f})")


if __name__ == "__main__":
    main()
