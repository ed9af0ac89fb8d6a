"""What engines hide from ``Lion`` after it was made: options that need it are refused at the first step."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from lion_dist import Lion, SpikeGuard
from tests.models import mlp

OPTIONS = {
    "ema_decay": {"ema_decay": 0.9},
    "cautious=True": {"cautious": True},
    "skip_spikes": {"skip_spikes": SpikeGuard()},
}
options = pytest.mark.parametrize("option", OPTIONS)


def step(opt: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in opt.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
    opt.step()


def params_of(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in opt.param_groups for param in group["params"]]


# ---- tensors of somebody else in the place of parameters


def flatten(opt: Lion) -> torch.Tensor:
    """As an engine does that keeps flat fp32 copies and copies them into the model after each step."""
    (group,) = opt.param_groups
    part = torch.cat([param.detach().flatten() for param in group["params"]])[:20].clone().requires_grad_()
    group["params"] = [part]
    return part


@options
def test_a_flat_copy_in_the_place_of_parameters_is_refused_and_nothing_is_changed(option):
    opt = Lion(mlp(4, 6, 3).named_parameters(), **OPTIONS[option])
    part = flatten(opt)
    before = part.detach().clone()
    with pytest.raises(
        ValueError, match=rf"{option} needs .*shape \(20,\), in the place.*Use ShardedLion.*leave {option}"
    ):
        step(opt)
    assert torch.equal(part, before) and not opt.state


def test_every_tensor_is_looked_at_where_there_are_more_of_them_than_names():
    opt = Lion([("weight", nn.Parameter(torch.ones(4)))], ema_decay=0.9)
    opt.param_groups[0]["params"].append(torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match=r"ema_decay needs .*shape \(2,\)"):
        step(opt)


@options
def test_a_flat_copy_that_comes_after_some_steps_is_refused(option):
    opt = Lion(mlp(4, 6, 3).parameters(), **OPTIONS[option])
    step(opt)
    flatten(opt)
    with pytest.raises(ValueError, match=f"{option} needs "):
        step(opt)


def test_without_such_an_option_flat_copies_are_trained():
    opt = Lion(mlp(4, 6, 3).parameters(), cautious_wd=True)
    before = flatten(opt).detach().clone()
    step(opt)
    assert not torch.equal(params_of(opt)[0], before)


@options
def test_tensors_that_are_no_parameters_are_trained_where_they_were_given(option):
    opt = Lion([torch.ones(3, requires_grad=True)], **OPTIONS[option])
    opt.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    for twin in (opt, copy.deepcopy(opt)):
        step(twin)
        assert not any(param.eq(1).any() for param in params_of(twin))


@options
def test_a_new_parameter_of_the_model_may_take_the_place_of_one(option):
    model = mlp(4, 6, 3)
    opt = Lion(model.parameters(), **OPTIONS[option])
    step(opt)
    model[0].weight = nn.Parameter(torch.ones(7, 4))
    opt.param_groups[0]["params"][0] = model[0].weight
    step(opt)
    assert not torch.equal(model[0].weight, torch.ones(7, 4))


def wrap_after_construction(option: str) -> None:
    model = mlp(4, 6, 3)
    opt = Lion(model.parameters(), **OPTIONS[option])
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    opt.param_groups[0]["params"] = list(wrapped.parameters())
    with pytest.raises(ValueError, match=f"{option} needs .* FSDP1's flat parameter.*Use fully_shard"):
        step(opt)


@options
def test_fsdp1s_flat_parameter_that_is_put_in_afterwards_is_refused(gloo, option):
    gloo.run(2, wrap_after_construction, option)


# ---- torch's ZeroRedundancyOptimizer


def divided(given: dict) -> torch.optim.Optimizer:
    # Its own param groups would have what it is given itself, as Lion's would not.
    opt = ZeroRedundancyOptimizer(mlp(4, 6, 3).parameters(), functools.partial(Lion, **given), lr=1e-2)
    step(opt)
    return opt


def refused(option: str) -> None:
    with pytest.raises(
        ValueError, match=f"{option} needs .* ZeroRedundancyOptimizer has divided .* has 2 of them.*Use ShardedLion"
    ):
        divided(OPTIONS[option])


@pytest.mark.parametrize("option", ["ema_decay", "skip_spikes"])
def test_zero_redundancy_is_refused_where_each_rank_would_go_by_its_own(gloo, option):
    gloo.run(2, refused, option)


def cautious_as_alone() -> None:
    opt, alone = divided({"cautious": True}), Lion(mlp(4, 6, 3).parameters(), lr=1e-2, cautious=True)
    step(alone)
    assert all(map(torch.equal, params_of(opt), params_of(alone)))


def test_zero_redundancy_keeps_tensors_whole_for_cautious_steps(gloo):
    gloo.run(2, cautious_as_alone)


def test_another_zero_redundancy_optimizer_does_not_matter(gloo):
    gloo.run(2, beside_another)


def beside_another() -> None:
    other, opt = divided({}), Lion(mlp(4, 6, 3).parameters(), ema_decay=0.9)
    step(opt)
    step(other)
