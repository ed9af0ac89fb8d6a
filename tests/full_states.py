"""A model with every kind of parameter under ``Lion`` and ``ShardedLion``, trained to the same bits on any ranks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lion_dist import Lion, ShardedLion, ShardingConfig
from tests.checkpoint.engines import POLICIES
from tests.models import make_batch, make_model


def build(policy: str = "fp32 parameters", engine: str = "sharded", **options) -> tuple[nn.Module, Lion | ShardedLion]:
    """``engine``: plain, sharded or sharded hsdp (2 replicas)."""
    dtype, precision = POLICIES[policy]
    model = make_model(dtype)
    params = list(model.named_parameters())
    groups = [
        {"params": [(name, p) for name, p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(name, p) for name, p in params if p.ndim < 2]},
    ]
    if engine == "plain":
        return model, Lion(groups, lr=1e-2, precision=precision)
    options.setdefault("sharding", ShardingConfig(bucket_numel=300))
    if engine == "sharded hsdp":
        half = torch.distributed.get_world_size() // 2
        options["process_group"] = init_device_mesh("cpu", (2, half), mesh_dim_names=("replicate", "shard"))
    return model, ShardedLion(groups, lr=1e-2, precision=precision, module=model, **options)


def train(model: nn.Module, opt: Lion | ShardedLion, steps: range) -> None:
    """All ranks have the same batch: the mean over 1, 2 or 4 is the same to the bit."""
    for step in steps:
        opt.zero_grad()
        make_batch(step, 0, 0, detour=True).loss(model).backward()
        opt.step()


def trained(
    policy: str = "fp32 parameters", engine: str = "sharded", **options
) -> tuple[nn.Module, Lion | ShardedLion]:
    model, opt = build(policy, engine, **options)
    train(model, opt, range(3))
    return model, opt


@functools.cache
def never_stopped(policy: str) -> list[Tensor]:
    """The parameters of plain ``Lion`` after five steps. It is asked for where the ranks are not: once for all."""
    model, opt = trained(policy, "plain")
    train(model, opt, range(3, 5))
    return [param.detach() for param in model.parameters()]


def assert_same_tensors(found: dict, expected: dict) -> None:
    """Of two full states: every tensor that ``expected`` has, bit for bit."""
    for i, kinds in expected["state"].items():
        for kind, value in kinds.items() if kinds["exp_avg"].numel() else ():
            other = found["state"][i][kind]
            assert other.dtype == value.dtype and torch.equal(bits(other), bits(value)), (i, kind)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def same_params(model: nn.Module, other: nn.Module) -> bool:
    return has_params(model, list(other.parameters()))


def has_params(model: nn.Module, expected: list[Tensor]) -> bool:
    pairs = zip(model.parameters(), expected, strict=True)
    return all(torch.equal(bits(a), bits(b)) for a, b in pairs)
