"""An optimizer of which no parameter ever gets a gradient says so, once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from lion_dist import Lion
from lion_dist.guards.unused_params import STEPS_BEFORE_WARNING, NoGradientWarning
from tests.models import mlp

MATCH = r"none of the optimizer's parameters had a gradient in its first 3 steps.*fully_shard.*PEFT.*Make the optimizer"


def warnings_of(function) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught if "had a gradient" in str(w.message)]


def train(model: nn.Module, opt: Lion, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        opt.step()


def test_model_whose_parameters_were_replaced_is_noticed_once():
    model = mlp(4, 4)
    opt = Lion(model.parameters())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    train(model, opt, STEPS_BEFORE_WARNING - 1)
    with pytest.warns(UserWarning, match=MATCH):
        train(model, opt, 1)
    assert not warnings_of(lambda: train(model, opt, 20))


def test_layers_put_in_the_place_of_others_are_noticed():
    """What LoRA does: the old weight is frozen, others are trained."""
    model = mlp(4, 4)
    opt = Lion(model.parameters())
    model.requires_grad_(False)
    model.append(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=MATCH):
        train(model, opt, 5)


def shard_after_the_optimizer() -> None:
    model = mlp(4, 4)
    opt = Lion(model.parameters())
    fully_shard(model)
    with pytest.warns(UserWarning, match=MATCH):
        train(model, opt, 5)


def test_model_that_was_sharded_afterwards_is_noticed(gloo):
    gloo.run(2, shard_after_the_optimizer)


def test_nothing_is_said_once_a_gradient_was_there():
    model = mlp(4, 4)
    opt = Lion(model.parameters())

    def late_and_then_never() -> None:
        for _ in range(STEPS_BEFORE_WARNING - 1):
            opt.step()
        train(model, opt, 1)
        opt.zero_grad()
        for _ in range(10):
            opt.step()

    assert not warnings_of(late_and_then_never)
    assert not opt._guards._no_gradients.is_waiting


def test_one_parameter_with_a_gradient_is_enough():
    model, unused = mlp(4, 4), nn.Parameter(torch.ones(3))
    opt = Lion([*model.parameters(), unused])
    assert not warnings_of(lambda: train(model, opt, 10))


def test_state_made_for_a_checkpoint_is_not_taken_for_training():
    model = mlp(4, 4)
    opt = Lion(model.parameters())
    get_optimizer_state_dict(model, opt)  # steps with gradients of its own and lr 0
    fresh = mlp(4, 4)
    with pytest.warns(UserWarning, match=MATCH):
        train(fresh, opt, 5)


def rank_without_a_part() -> None:
    """The third of three ranks holds no row of these parameters, and FSDP gives it empty gradients or none."""
    model = nn.Linear(4, 1)
    fully_shard(model)
    opt = Lion(model.parameters())
    rank_has_none = not any(p.to_local().numel() for p in model.parameters())
    if rank_has_none:
        assert not warnings_of(lambda: [opt.step() for _ in range(10)])
    else:
        with pytest.warns(UserWarning, match=MATCH):
            for _ in range(10):
                opt.step()


def test_rank_that_holds_no_element_says_nothing(gloo):
    gloo.run(3, rank_without_a_part)


def test_warning_stops_looking_after_the_first_gradient():
    watch = NoGradientWarning()
    watch.note_step(any_gradients=False)
    assert watch.is_waiting
    watch.note_step(any_gradients=True)
    assert not watch.is_waiting
