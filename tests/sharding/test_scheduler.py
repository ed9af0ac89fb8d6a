"""Who waits for parameters in flight: hooks of modules, and readers of attributes.

While a gather is under way the doubles fill the parameters with NaN, so an early read cannot go unnoticed.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from lion_dist import ShardedLion, ShardingConfig
from tests.collective_doubles import poisoned_gathers
from tests.models import mlp
from tests.oracle import assert_same_params

EACH_ITS_OWN = ShardingConfig(bucket_numel=1)  # a bucket a parameter


def step(model: nn.Module, opt: ShardedLion) -> float:
    loss = model(torch.full((3, 8), dist.get_rank() + 1.0)).square().mean()
    loss.backward()
    opt.step()
    return loss.item()


def shard(model: nn.Module, **choices) -> ShardedLion:
    return ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=EACH_ITS_OWN, **choices)


class Listed(nn.Linear):
    """Computes with a list of its parameters."""

    def __init__(self):
        super().__init__(8, 8)
        self.held = [self.weight, self.bias]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.held)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.listed, self.last = nn.Linear(8, 8), Listed(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.listed(self.first(x)))


class Recurrent(nn.Module):
    """nn.LSTM has a list of its weights too, and compares it with its attributes first."""

    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0])


def train_beside_the_plain(make: type[nn.Module], prepare) -> None:
    """Trained with gathers in flight and without; ``prepare(model)`` before the optimizer is made."""
    torch.manual_seed(0)
    model = make()
    expected = copy.deepcopy(model)
    prepare(model)
    opt, plain = shard(model), ShardedLion(expected.parameters(), lr=1e-3, sharding=EACH_ITS_OWN)
    with poisoned_gathers():
        for _ in range(4):
            assert step(model, opt) == step(expected, plain)
        opt.finish_param_sync()
    assert_same_params(model, expected)


def log_norms(module: nn.Module, *_args) -> None:
    sum(p.detach().norm() for p in module.parameters())


def train_listed(logged: bool) -> None:
    train_beside_the_plain(Mixed, lambda model: logged and model.listed.register_forward_pre_hook(log_norms))


@pytest.mark.parametrize("logged", [False, True])
def test_leaf_with_a_list_of_its_parameters_is_waited_for_by_its_hook(gloo, logged):
    """Also when somebody else goes through all its parameters during its forward."""
    gloo.run(2, train_listed, logged)


def train_recurrent() -> None:
    train_beside_the_plain(Recurrent, lambda model: None)


def test_lstm_is_waited_for(gloo):
    gloo.run(2, train_recurrent)


def unfreeze_everything(compiled: bool) -> None:
    torch.manual_seed(0)
    model = Mixed()
    for part in (model.first, model.listed):
        part.requires_grad_(False)
    opt = shard(model)
    with poisoned_gathers():
        step(model, opt)
        if compiled:
            model.compile(backend="eager")
        model.requires_grad_(True)
        losses = [step(model, opt) for _ in range(4)]
    assert all(loss == loss for loss in losses) and opt.skipped_steps() == 0
    assert len(opt.buckets) == 6


@pytest.mark.parametrize("compiled", [False, True])
def test_parameters_unfrozen_later_are_waited_for(gloo, compiled):
    gloo.run(2, unfreeze_everything, compiled)


def call_a_leaf() -> None:
    model = mlp(8, 8, 8)
    opt = shard(model)
    with poisoned_gathers():
        step(model, opt)
        assert model[2](torch.ones(2, 8)).isfinite().all()


def test_leaf_called_by_itself_waits_for_its_own(gloo):
    gloo.run(2, call_a_leaf)


class Retiring(nn.Module):
    """Its layer is called at first, and later its weight is used by a reference held elsewhere."""

    def __init__(self):
        super().__init__()
        self.body, self.layer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.way, self.held = "layer", [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.way == "held":
            return F.linear(x, self.held[0])
        return self.layer(x) if self.way == "layer" else x


def retire_a_layer(evaluated: bool) -> None:
    torch.manual_seed(0)
    model = Retiring()
    opt = shard(model)
    with poisoned_gathers():
        step(model, opt)
        model.way = "neither"
        step(model, opt)
        loss = model(torch.ones(2, 8)).square().mean()
        if evaluated:
            model.way = "layer"
            with torch.no_grad():
                model(torch.ones(2, 8))
        loss.backward()
        opt.step()
        assert all(p.isfinite().all() for p in (model.layer.weight, model.layer.bias))
        opt.step()
        model.way = "held"
        assert step(model, opt) < float("inf")


@pytest.mark.parametrize("evaluated", [False, True])
def test_leaf_that_stopped_running_is_waited_for_at_the_root(gloo, evaluated):
    """Evaluation in between, in which it did run, and reads outside of any forward do not count."""
    gloo.run(2, retire_a_layer, evaluated)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def reparametrize() -> None:
    """The weight moves to another module, while the layer's bias stays; reads of the new module are not seen."""
    torch.manual_seed(0)
    model = mlp(8, 8, 8)
    opt = shard(model)
    with poisoned_gathers():
        step(model, opt)
        parametrize.register_parametrization(model[2], "weight", Half())
        losses = [step(model, opt) for _ in range(4)]
    assert all(loss == loss for loss in losses) and opt.skipped_steps() == 0


def test_parametrization_registered_later_is_waited_for(gloo):
    gloo.run(2, reparametrize)


def tie_after_construction() -> None:
    model = mlp(8, 8, 8)
    opt = shard(model)
    with poisoned_gathers():
        step(model, opt)
        model[0].weight = model[2].weight
        opt.step()
        assert model[0].weight.isfinite().all()


def test_parameter_assigned_to_another_module_is_waited_for_there(gloo):
    gloo.run(2, tie_after_construction)


def call_functionally() -> None:
    """Its exchange of parameters and back leaves the model as it was: reads wait."""
    model = mlp(8, 8, 8)
    opt = shard(model)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with poisoned_gathers():
        for _ in range(3):
            step(model, opt)
            assert not functional_call(model, zeros, torch.ones(2, 8)).any()
            opt.step()
            assert model[2](torch.ones(2, 8)).isfinite().all()


def test_functional_call_leaves_readers_waiting(gloo):
    gloo.run(2, call_functionally)


def run_a_shallow_copy() -> None:
    """It shares the hooks with the model, which do not know it."""
    model = mlp(8, 8, 8)
    opt = shard(model)
    model[0] = copy.copy(model[0])
    with poisoned_gathers():
        losses = [step(model, opt) for _ in range(3)]
    assert all(loss == loss for loss in losses)


def test_shallow_copy_of_a_leaf_waits(gloo):
    gloo.run(2, run_a_shallow_copy)
