"""What one engine saves another loads: the same state, and the same bits of every step from there."""

import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from lion_dist import checkpoint
from tests.checkpoint.engines import POLICIES, assert_same_tensors, engine, tensors_in, train

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


def load_and_go_on(saved, folder, name, policy):
    model, optimizer = engine(name, policy)
    train(model, optimizer, range(20, 21))  # state that must go
    assert checkpoint.load(f"{saved}/saved", model=model, optimizer=optimizer) == {"step": 3}
    checkpoint.save(f"{folder}/loaded", model=model, optimizer=optimizer)
    train(model, optimizer, range(3, 5))
    checkpoint.save(f"{folder}/resumed", model=model, optimizer=optimizer)


@pytest.fixture
def saved(gloo, once):
    """``saved(name, policy)``: the folder of what this engine has saved, which all loads of it share."""

    def save(name, policy, folder):
        gloo.run((ENGINES | VARIANTS)[name], save_and_go_on, str(folder), name, policy)
        return folder

    return lambda name, policy: once(f"saved by {name}, {policy}", lambda folder: save(name, policy, folder))


def assert_moves(gloo, saved, folder, saved_by, loaded_by, policy):
    source = saved(saved_by, policy)
    gloo.run((ENGINES | VARIANTS)[loaded_by], load_and_go_on, str(source), str(folder), loaded_by, policy)
    assert_same_tensors(source / "saved", folder / "loaded")
    assert_same_tensors(source / "never stopped", folder / "resumed")


@pytest.mark.parametrize("saved_by, loaded_by", [*itertools.product(ENGINES, ENGINES)])
def test_every_engine_goes_on_where_every_other_stopped(gloo, saved, tmp_path, saved_by, loaded_by):
    assert_moves(gloo, saved, tmp_path, saved_by, loaded_by, "split")


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "split"])
@pytest.mark.parametrize("saved_by, loaded_by", [("fsdp2", "sharded"), ("sharded", "fsdp2"), ("fsdp1", "fsdp1")])
def test_every_policy_moves(gloo, saved, tmp_path, saved_by, loaded_by, policy):
    assert_moves(gloo, saved, tmp_path, saved_by, loaded_by, policy)


@pytest.mark.parametrize("policy", ["fp32 parameters, bf16 momentum", "fp32 main params"])
@pytest.mark.parametrize("saved_by, loaded_by", [("fsdp1 flat", "plain"), ("plain", "fsdp1 flat")])
def test_flat_parameters_move_in_every_kind_of_main_params(gloo, saved, tmp_path, saved_by, loaded_by, policy):
    assert_moves(gloo, saved, tmp_path, saved_by, loaded_by, policy)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_engines_move_to_plain_and_back(gloo, saved, tmp_path, variant):
    (tmp_path / "there").mkdir()
    (tmp_path / "back").mkdir()
    assert_moves(gloo, saved, tmp_path / "there", variant, "plain", "split")
    assert_moves(gloo, saved, tmp_path / "back", "plain", variant, "split")


# ---- a parameter that was changed from outside (EMA swap, surgery) between the last step and the save


def change_save_and_go_on(folder, name):
    model, optimizer = engine(name, "fp32 main params")
    train(model, optimizer, range(3))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.5)
    checkpoint.save(f"{folder}/saved", model=model, optimizer=optimizer)
    train(model, optimizer, range(3, 5))
    checkpoint.save(f"{folder}/never stopped", model=model, optimizer=optimizer)


@pytest.mark.parametrize("name", ENGINES)
def test_a_parameter_changed_before_the_save_leads_its_main_params_after_the_load(gloo, tmp_path, name):
    gloo.run(ENGINES[name], change_save_and_go_on, str(tmp_path), name)
    gloo.run(ENGINES[name], go_on_with, f"{tmp_path}/saved", f"{tmp_path}/resumed", name, "fp32 main params")
    assert_same_tensors(tmp_path / "never stopped", tmp_path / "resumed")


# ---- engine, ranks and kind of main params at once


def go_on_with(old, new, name, policy):
    model, optimizer = engine(name, policy)
    checkpoint.load(old, model=model, optimizer=optimizer)
    train(model, optimizer, range(3, 5))
    checkpoint.save(new, model=model, optimizer=optimizer)


def load_and_save(old, new, name, policy):
    model, optimizer = engine(name, policy)
    checkpoint.load(old, model=model, optimizer=optimizer)
    checkpoint.save(new, model=model, optimizer=optimizer)


@pytest.mark.parametrize("loaded_by", ENGINES)
def test_engine_ranks_and_kind_of_main_params_change_at_once_and_exactly(gloo, saved, tmp_path, loaded_by):
    fp32, split = "fp32 main params", "split, fp32 momentum"
    source, ranks = saved("sharded", fp32), ENGINES[loaded_by]
    resumed, back = str(tmp_path / "resumed"), str(tmp_path / "back")
    gloo.run(ranks, go_on_with, str(source / "saved"), resumed, loaded_by, split)
    gloo.run(1, load_and_save, resumed, back, "plain", fp32)
    assert tensors_in(tmp_path / "resumed")["optimizer.0.weight.main_param"].dtype == torch.int16
    assert_same_tensors(source / "never stopped", tmp_path / "back")


def load_model_by_torch_alone(path):
    model, _ = engine("fsdp2", "split")
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    return {name: param.full_tensor() for name, param in model.named_parameters()}


def test_torch_alone_loads_the_model_of_a_checkpoint(gloo, saved):
    path = saved("sharded", "split") / "saved"
    tensors = tensors_in(path)
    for name, param in gloo.run(4, load_model_by_torch_alone, str(path))[0].items():
        assert torch.equal(param, tensors[f"model.{name}"]), name
