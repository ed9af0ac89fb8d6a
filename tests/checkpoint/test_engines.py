"""What one engine saves another loads: the same state, and the same bits of every step from there."""

import itertools

import pytest

from lion_dist import checkpoint
from tests.checkpoint.engines import POLICIES, assert_same_tensors, engine, train

ENGINES = {"plain": 1, "sharded": 2, "fsdp2": 4, "fsdp1": 2, "fsdp1 flat": 4}
# name, ranks: the other ways in which these engines hold a model
VARIANTS = {
    "ddp": 2,
    "sharded hsdp": 4,
    "fsdp2 hsdp": 4,
    "fsdp2 in one unit": 2,
    "fsdp1 grad op": 2,
}


def save_and_go_on(folder, name, policy):
    model, optimizer = engine(name, policy)
    train(model, optimizer, range(3))
    checkpoint.save(f"{folder}/saved", model=model, optimizer=optimizer, extra={"step": 3})
    train(model, optimizer, range(3, 5))
    checkpoint.save(f"{folder}/never stopped", model=model, optimizer=optimizer)


def load_and_go_on(folder, name, policy):
    model, optimizer = engine(name, policy)
    train(model, optimizer, range(20, 21))  # state that must go
    assert checkpoint.load(f"{folder}/saved", model=model, optimizer=optimizer) == {"step": 3}
    checkpoint.save(f"{folder}/loaded", model=model, optimizer=optimizer)
    train(model, optimizer, range(3, 5))
    checkpoint.save(f"{folder}/resumed", model=model, optimizer=optimizer)


def assert_moves(gloo, folder, saved_by, loaded_by, policy):
    ranks = ENGINES | VARIANTS
    gloo.run(ranks[saved_by], save_and_go_on, str(folder), saved_by, policy)
    gloo.run(ranks[loaded_by], load_and_go_on, str(folder), loaded_by, policy)
    assert_same_tensors(folder / "saved", folder / "loaded")
    assert_same_tensors(folder / "never stopped", folder / "resumed")


@pytest.mark.parametrize("saved_by, loaded_by", [*itertools.product(ENGINES, ENGINES)])
def test_every_engine_goes_on_where_every_other_stopped(gloo, tmp_path, saved_by, loaded_by):
    assert_moves(gloo, tmp_path, saved_by, loaded_by, "split")


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "split"])
@pytest.mark.parametrize("saved_by, loaded_by", [("fsdp2", "sharded"), ("sharded", "fsdp2"), ("fsdp1", "fsdp1")])
def test_every_policy_moves(gloo, tmp_path, saved_by, loaded_by, policy):
    assert_moves(gloo, tmp_path, saved_by, loaded_by, policy)


@pytest.mark.parametrize("policy", ["fp32 parameters, bf16 momentum", "fp32 main params"])
@pytest.mark.parametrize("saved_by, loaded_by", [("fsdp1 flat", "plain"), ("plain", "fsdp1 flat")])
def test_flat_parameters_move_in_every_kind_of_main_params(gloo, tmp_path, saved_by, loaded_by, policy):
    assert_moves(gloo, tmp_path, saved_by, loaded_by, policy)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_engines_move_to_plain_and_back(gloo, tmp_path, variant):
    (tmp_path / "there").mkdir()
    (tmp_path / "back").mkdir()
    assert_moves(gloo, tmp_path / "there", variant, "plain", "split")
    assert_moves(gloo, tmp_path / "back", "plain", variant, "split")
