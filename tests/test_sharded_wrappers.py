"""A second data-parallel wrapper around the model is refused by name, whenever it comes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lion_dist import ShardedLion, ShardingConfig
from tests.models import mlp

CPU = torch.device("cpu")


class DeepSpeedEngine(nn.Module):
    """Known by its name, as all wrappers of libraries that need not be installed."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "FullyShardedDataParallel": lambda m: FullyShardedDataParallel(m, device_id=CPU, use_orig_params=True),
    "DeepSpeedEngine": DeepSpeedEngine,
}


def wrap_before(name: str, passed: str) -> list[str]:
    model = mlp(8, 8)
    wrapped = WRAPPERS[name](model)
    module = {"wrapper": wrapped, "model": model, "nothing": None, "parent": nn.Sequential(wrapped)}[passed]
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(TypeError) as raised:
        ShardedLion(wrapped.parameters(), module=module)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    return str(raised.value)


CASES = [(name, passed) for name in WRAPPERS for passed in ("wrapper", "model", "nothing", "parent")]
CASES.remove(("DistributedDataParallel", "wrapper"))  # is taken over: test_sharded_ddp.py


@pytest.mark.parametrize(("name", "passed"), CASES)
def test_a_wrapped_model_is_refused_at_construction(gloo, name, passed):
    for message in gloo.run(2, wrap_before, name, passed):
        assert f"wrapped in {name}" in message and "Pass the bare module" in message


def wrap_after(name: str, with_module: bool, in_backward: bool) -> str:
    model = mlp(8, 8)
    sharding = ShardingConfig(update_in_backward=in_backward)
    opt = ShardedLion(model.parameters(), module=model if with_module else None, sharding=sharding)
    before = model[0].weight.detach().clone()
    wrapped = WRAPPERS[name](model)
    wrapped(torch.ones(2, 8)).sum().backward()
    with pytest.raises(TypeError) as raised:
        opt.step()
    if not (in_backward or name == "FullyShardedDataParallel"):
        assert torch.equal(model[0].weight, before)
    return str(raised.value)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("with_module", [False, True])
@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "FullyShardedDataParallel"])
def test_a_model_wrapped_after_construction_is_refused_at_the_first_step(gloo, name, with_module, in_backward):
    for message in gloo.run(2, wrap_after, name, with_module, in_backward):
        assert f"wrapped in {name}" in message


def wrap_in_the_middle() -> str:
    """After the first step nobody looks; DDP's reducer leaves gradients behind."""
    model = mlp(8, 8)
    opt = ShardedLion(model.parameters(), module=model)
    model(torch.ones(2, 8)).sum().backward()
    opt.step()
    wrapped = DistributedDataParallel(model)
    wrapped(torch.ones(2, 8)).sum().backward()
    with pytest.raises(RuntimeError) as raised:
        opt.step()
    return str(raised.value)


def test_a_model_wrapped_in_ddp_later_is_refused_at_the_next_step(gloo):
    for message in gloo.run(2, wrap_in_the_middle):
        assert "'0.weight' has a gradient that DistributedDataParallel has left" in message


def unwrap() -> None:
    """A wrapper that nobody holds any more is none."""
    model = DistributedDataParallel(mlp(8, 8)).module
    opt = ShardedLion(model.parameters(), module=model)
    model(torch.ones(2, 8)).sum().backward()
    opt.step()


def test_an_unwrapped_model_is_trained(gloo):
    gloo.run(2, unwrap)


def wrap_another() -> None:
    model, other = mlp(8, 8), DistributedDataParallel(mlp(8, 8))
    opt = ShardedLion(model.parameters(), module=model)
    model(other(torch.ones(2, 8))).sum().backward()
    opt.step()


def test_a_wrapper_around_another_model_is_nobodys_business(gloo):
    gloo.run(2, wrap_another)


def shard_after(how: str, with_module: bool) -> str:
    """The wrapper replaces the parameters: those of the optimizer are nobody's."""
    model = mlp(8, 8)
    opt = ShardedLion(model.parameters(), module=model if with_module else None)
    if how == "fully_shard":
        wrapped = fully_shard(model)
    else:
        wrapped = FullyShardedDataParallel(model, device_id=CPU, use_orig_params=how == "FSDP1, own parameters")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                wrapped(torch.ones(2, 8)).sum().backward()
                opt.step()
    except (TypeError, RuntimeError) as error:
        return str(error)
    return "\n".join(str(w.message) for w in caught)


@pytest.mark.parametrize("with_module", [False, True])
@pytest.mark.parametrize("how", ["fully_shard", "FSDP1", "FSDP1, own parameters"])
def test_a_model_sharded_after_construction_does_not_pass_in_silence(gloo, how, with_module):
    for message in gloo.run(2, shard_after, how, with_module):
        remedies = ("lion_dist.Lion", "Make the optimizer last", "construct the optimizer after")
        assert "fully_shard" in message and any(remedy in message for remedy in remedies), message


def pass_a_flat_parameter() -> str:
    model = FullyShardedDataParallel(mlp(8, 8), device_id=CPU)
    with pytest.raises(TypeError) as raised:
        ShardedLion(list(model.parameters()))
    return str(raised.value)


def test_flat_parameters_of_fsdp1_are_refused(gloo):
    for message in gloo.run(2, pass_a_flat_parameter):
        assert "FullyShardedDataParallel" in message and "lion_dist.Lion" in message


def add_a_group_of_a_wrapped_model() -> str:
    opt = ShardedLion(mlp(8, 8).parameters())
    wrapped = DistributedDataParallel(mlp(8, 8))
    with pytest.raises(TypeError) as raised:
        opt.add_param_group({"params": wrapped.parameters()})
    assert len(opt.param_groups) == 1
    return str(raised.value)


def test_an_added_group_of_a_wrapped_model_is_refused(gloo):
    assert "wrapped in DistributedDataParallel" in gloo.run(2, add_a_group_of_a_wrapped_model)[0]


# ---- nobody's parameters


def step_with_and_without_gradients(steps: int, first_gradient: int | None) -> list[str]:
    model = mlp(8, 8)
    opt = ShardedLion(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            if first_gradient is not None and step >= first_gradient:
                model(torch.ones(2, 8)).sum().backward()
            opt.step()
    return [str(w.message) for w in caught if "had a gradient in its first" in str(w.message)]


def test_an_optimizer_that_never_gets_a_gradient_says_so_once(gloo):
    ((warning,),) = gloo.run(1, step_with_and_without_gradients, 8, None)
    assert "in its first 3 steps" in warning and "Make the optimizer last" in warning


@pytest.mark.parametrize("first_gradient", [0, 2])
def test_a_gradient_in_the_first_steps_is_enough(gloo, first_gradient):
    assert gloo.run(1, step_with_and_without_gradients, 8, first_gradient) == [[]]
