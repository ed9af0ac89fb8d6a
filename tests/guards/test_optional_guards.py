"""Where guards/ is missing, what takes its place is called alike, and ranks train to the same bits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, ShardedLion, ShardingConfig, optional_guards
from lion_dist.guards.lion_guards import LionGuards
from lion_dist.guards.sharded_guards import ShardedGuards
from lion_dist.guards.step_agreement import StepAgreement
from lion_dist.kernels import backends
from lion_dist.optional_guards import NoAgreement, NoGuards, NoLionGuards
from lion_dist.sharding.bucket import ParamState
from tests.models import make_batch, make_model, mlp
from tests.test_sharded_membership import parametrized, step

# Called by other guards, and not by the core.
OWN = {StepAgreement: {"wait", "end_step"}}


def calls_of(kind: type) -> dict[str, str]:
    public = inspect.getmembers(kind, lambda member: inspect.isfunction(member) and member.__name__[0] != "_")
    return {name: str(inspect.signature(function)) for name, function in public if name not in OWN.get(kind, ())}


@pytest.mark.parametrize(
    "kind, absent", [(ShardedGuards, NoGuards), (LionGuards, NoLionGuards), (StepAgreement, NoAgreement)]
)
def test_what_takes_the_place_of_guards_is_called_alike(kind, absent):
    assert calls_of(kind) == calls_of(absent)


@contextmanager
def no_guards() -> Iterator[None]:
    has_guards, optional_guards._has_guards = optional_guards._has_guards, lambda: False
    try:
        yield
    finally:
        optional_guards._has_guards = has_guards


def train(kind: type, sharding: ShardingConfig) -> list[torch.Tensor]:
    model = make_model()
    opt = ShardedLion(model.parameters(), lr=2e-3, weight_decay=0.1, module=model, sharding=sharding)
    assert isinstance(opt.guards, kind)
    for number in range(3):
        make_batch(number, 0, dist.get_rank()).loss(model).backward()
        if not sharding.update_in_backward:
            opt.clip_grad_norm_(1.0)
        opt.step()
    opt.finish_param_sync()
    return [param.detach().clone() for param in model.parameters()]


def train_with_and_without(sharding: ShardingConfig) -> None:
    expected = train(ShardedGuards, sharding)
    with no_guards():
        assert all(map(torch.equal, train(NoGuards, sharding), expected))


@pytest.mark.parametrize("sharding", [ShardingConfig(1), ShardingConfig(2), ShardingConfig(update_in_backward=True)])
def test_ranks_without_guards_arrive_at_the_same_bits(gloo, sharding):
    gloo.run(2, train_with_and_without, sharding)


def test_parameters_that_move_within_the_module_are_waited_for_without_guards():
    with no_guards():
        model = mlp(5, 5)
        opt = ShardedLion(model.parameters(), module=model)
    parametrized(model)
    step(model, opt)
    (bucket,) = opt.buckets
    assert bucket.param_state is ParamState.GATHERING
    assert model[0].parametrizations.weight.original is not None  # a module that did not exist at construction
    assert bucket.param_state is ParamState.FULL


def test_a_copy_without_guards_says_so_once(monkeypatch):
    monkeypatch.setattr(backends, "has_room", lambda name: name != "guards")
    optional_guards._has_guards.cache_clear()
    weight = nn.Parameter(torch.ones(3))
    try:
        with pytest.warns(UserWarning, match="no guards/") as said:
            opt = Lion([weight])
            Lion([weight])
        assert len(said) == 1 and isinstance(opt._guards, NoLionGuards)
    finally:
        optional_guards._has_guards.cache_clear()
