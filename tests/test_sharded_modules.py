"""Compiled modules and activation checkpointing, with overlap and poisoned gathers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from lion_dist import Lion, ShardedLion, ShardingConfig
from tests.collective_doubles import poisoned_gathers
from tests.models import mlp
from tests.oracle import Oracle, assert_same_on_all_ranks, assert_same_params

WIDTHS = (8, 24, 8, 24, 8)
SETTINGS = dict(lr=2e-3, weight_decay=0.1)


def batches_of(step: int) -> list[Tensor]:
    return [
        torch.randn(3, 8, generator=torch.Generator().manual_seed(100 * step + r)) for r in range(dist.get_world_size())
    ]


def train_beside_the_oracle(
    model: nn.Module, call: nn.Module, opt: ShardedLion, expected: nn.Module, stage: int = 2
) -> None:
    """``call`` is what the training loop calls: the model, or something around it."""
    oracle = Oracle(expected, Lion(expected.parameters(), **SETTINGS), dist.get_world_size())
    with poisoned_gathers():
        for step in range(4):
            batches = batches_of(step)
            call(batches[dist.get_rank()]).square().mean().backward()
            oracle.backward([lambda m, x=x: m(x).square().mean() for x in batches])
            opt.step()
            oracle.step()
        opt.finish_param_sync()
    assert_same_params(model, expected)
    assert_same_on_all_ranks(model)


# ---- torch.compile


def train_compiled(how: str, backend: str) -> None:
    torch._dynamo.reset()
    model = mlp(*WIDTHS)
    expected = copy.deepcopy(model)
    call = model
    sharding = ShardingConfig(bucket_numel=300)
    if how == "compiled before":
        call = torch.compile(model, backend=backend)
    if how == "in place":
        model.compile(backend=backend)
    if how == "layers in place":
        for layer in model:
            layer.compile(backend=backend)
    opt = ShardedLion(call.named_parameters(), module=call, sharding=sharding, **SETTINGS)
    if how == "compiled after":
        call = torch.compile(model, backend=backend)
    if how == "in place after":
        model.compile(backend=backend)
    assert {name for shard in opt.shards for name in shard.bucket.names} <= {
        *dict(expected.named_parameters()),
        *dict(call.named_parameters()),
    }
    train_beside_the_oracle(model, call, opt, expected)


@pytest.mark.parametrize("how", ["compiled before", "compiled after", "in place", "in place after", "layers in place"])
def test_compiled_module_trains_as_any_other(gloo, how):
    gloo.run(2, train_compiled, how, "eager")


def test_compiled_by_aot_autograd(gloo):
    gloo.run(2, train_compiled, "compiled before", "aot_eager")


def name_a_compiled_module() -> None:
    """Names are those of the module that was compiled: a checkpoint does not know of torch.compile."""
    model = mlp(4, 4)
    opt = ShardedLion(model.parameters(), module=torch.compile(model, backend="eager"))
    assert [name for shard in opt.shards for name in shard.bucket.names] == ["0.weight", "0.bias"]


def test_compiled_module_keeps_the_names_of_the_model(gloo):
    gloo.run(1, name_a_compiled_module)


# ---- activation checkpointing


class Checkpointed(nn.Module):
    """Recomputes each layer in backward, in one of torch's two ways."""

    def __init__(self, layers: nn.Sequential, use_reentrant: bool):
        super().__init__()
        self.layers = layers
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 * x.detach().requires_grad_()  # reentrant checkpointing needs an input that takes a gradient
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


def train_checkpointed(use_reentrant: bool, stage: int) -> None:
    model = Checkpointed(mlp(*WIDTHS), use_reentrant)
    expected = copy.deepcopy(model)
    sharding = ShardingConfig(stage, bucket_numel=100)
    opt = ShardedLion(model.parameters(), module=model, sharding=sharding, **SETTINGS)
    train_beside_the_oracle(model, model, opt, expected)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(gloo, use_reentrant, stage):
    gloo.run(2, train_checkpointed, use_reentrant, stage)


def train_with_checkpoint_wrapper() -> None:
    model = nn.Sequential(*[checkpoint_wrapper(layer) for layer in mlp(*WIDTHS)])
    expected = copy.deepcopy(model)
    opt = ShardedLion(model.parameters(), module=model, **SETTINGS)
    names = [name for shard in opt.shards for name in shard.bucket.names]
    assert names == [f"{i}.{kind}" for i in (0, 2, 4, 6) for kind in ("weight", "bias")]
    train_beside_the_oracle(model, model, opt, expected)


def test_checkpoint_wrapper_and_its_names(gloo):
    gloo.run(2, train_with_checkpoint_wrapper)


class SharedInReentrantCheckpoints(nn.Module):
    """One layer in two reentrant checkpoints: its gradient comes twice in one backward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 * x.detach().requires_grad_()
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return x


def train_shared_layer_in_reentrant_checkpoints() -> None:
    torch.manual_seed(0)
    model = SharedInReentrantCheckpoints()
    expected = copy.deepcopy(model)
    opt = ShardedLion(model.parameters(), module=model, **SETTINGS)
    train_beside_the_oracle_loosely(model, opt, expected)


def train_beside_the_oracle_loosely(model: nn.Module, opt: ShardedLion, expected: nn.Module) -> None:
    """One step from the same place: each part of the gradient is summed over ranks by itself, so the norm is close."""
    oracle = Oracle(expected, Lion(expected.parameters(), **SETTINGS), dist.get_world_size())
    batches = batches_of(0)
    model(batches[dist.get_rank()]).square().mean().backward()
    oracle.backward([lambda m, x=x: m(x).square().mean() for x in batches])
    assert torch.allclose(opt.grad_norm(), oracle.step(), rtol=1e-5)
    opt.step()
    opt.finish_param_sync()
    assert_same_params(model, expected)


def test_layer_shared_by_reentrant_checkpoints_gets_both_gradients(gloo):
    gloo.run(2, train_shared_layer_in_reentrant_checkpoints)


# ---- other engines of gradients


def use_autograd_grad() -> None:
    """torch.autograd.grad leaves .grad alone, so nothing is reduced; a later backward is."""
    model = mlp(8, 8)
    opt = ShardedLion(model.parameters(), module=model, **SETTINGS)
    x = torch.ones(2, 8)
    torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    assert opt.grad_norm().item() == 0.0
    model(x).square().mean().backward()
    assert opt.grad_norm().item() > 0
    opt.step()


def test_autograd_grad_reduces_nothing(gloo):
    gloo.run(2, use_autograd_grad)


def penalize_gradients() -> None:
    """Double backward: the gradient of a gradient penalty arrives as any other."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    expected = copy.deepcopy(model)
    opt = ShardedLion(model.parameters(), module=model, **SETTINGS)
    oracle = Oracle(expected, Lion(expected.parameters(), **SETTINGS), dist.get_world_size())

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return slope.square().sum() + m(x).square().mean()

    for step in range(3):
        batches = batches_of(step)
        loss(model, batches[dist.get_rank()]).backward()
        oracle.backward([lambda m, x=x: loss(m, x) for x in batches])
        opt.step()
        oracle.step()
    opt.finish_param_sync()
    assert_same_params(model, expected)


def test_double_backward(gloo):
    gloo.run(2, penalize_gradients)
