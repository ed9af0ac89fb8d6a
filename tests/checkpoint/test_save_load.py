"""What is saved on some ranks by some engine goes on, bit for bit, on others."""

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lion_pytorch import Lion as PublishedLion
from torch import nn

from lion_dist import Lion, ShardedLion, ShardingConfig, checkpoint
from tests.checkpoint.engines import POLICIES, train

PLAIN = {"ranks": 1, "engine": "plain"}
ONE = {"ranks": 1, "engine": "sharded"}
TWO = {"ranks": 2, "engine": "sharded"}
STAGE_1 = {"ranks": 2, "engine": "sharded", "zero_stage": 1, "bucket_numel": 5000}
FOUR = {"ranks": 4, "engine": "sharded"}
# A mean over 3 ranks rounds: 3 ranks are in test_resharding.py, which compares state alone.
MOVES = [(TWO, TWO), (TWO, FOUR), (FOUR, ONE), (ONE, STAGE_1), (STAGE_1, FOUR), (PLAIN, TWO), (FOUR, PLAIN)]


def build(policy, engine, zero_stage=2, bucket_numel=900):
    dtype, precision = POLICIES[policy]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 33), nn.LayerNorm(33), nn.Linear(33, 7)).to(dtype)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]
    if engine == "plain":
        return model, Lion(groups, lr=1e-3, precision=precision)
    sharding = ShardingConfig(zero_stage=zero_stage, bucket_numel=bucket_numel)
    return model, ShardedLion(groups, lr=1e-3, module=model, precision=precision, sharding=sharding)


def parameters_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save_after_three_steps(path, policy, settings):
    model, optimizer = build(policy, **settings)
    train(model, optimizer, range(3))
    checkpoint.save(path, model=model, optimizer=optimizer, extra={"step": 3})
    train(model, optimizer, range(3, 6))
    return parameters_of(model)


def go_on(path, policy, settings):
    model, optimizer = build(policy, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = checkpoint.load(path, model=model, optimizer=optimizer)
    assert extra == {"step": 3}
    train(model, optimizer, range(3, 6))
    return parameters_of(model)


def settings_of(where):
    return {key: value for key, value in where.items() if key != "ranks"}


@pytest.fixture
def saved(gloo, once):
    """``saved(where, policy)``: the path of what was saved there, and the parameters of the run that went on.

    All loads of it share them.
    """

    def save(where, policy, folder):
        path = str(folder / "checkpoint")
        return path, gloo.run(where["ranks"], save_after_three_steps, path, policy, settings_of(where))[0]

    def ask(where, policy):
        name = "-".join(map(str, where.values()))
        return once(f"saved on {name}, {policy}", lambda folder: save(where, policy, folder))

    return ask


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("saved_by, loaded_by", MOVES, ids=lambda w: "-".join(map(str, w.values())))
def test_training_goes_on_bit_identically(gloo, saved, policy, saved_by, loaded_by):
    path, never_stopped = saved(saved_by, policy)
    resumed = gloo.run(loaded_by["ranks"], go_on, path, policy, settings_of(loaded_by))[0]
    assert never_stopped.keys() == resumed.keys()
    for name in never_stopped:
        assert torch.equal(never_stopped[name], resumed[name]), name


def test_momentum_is_stored_in_its_own_dtype(saved):
    path, _ = saved(TWO, "fp32 parameters, bf16 momentum")
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    assert stored["optimizer.0.weight.exp_avg"].properties.dtype == torch.bfloat16
    assert stored["model.0.weight"].properties.dtype == torch.float32


def save_then_state(path):
    model, optimizer = build("fp32 parameters", "sharded")
    train(model, optimizer, range(3))
    checkpoint.save(path, model=model, optimizer=optimizer)
    return parameters_of(model)


def test_a_sharded_run_goes_on_under_lion_pytorch(gloo, tmp_path):
    path = tmp_path / "c"
    parameters = gloo.run(2, save_then_state, str(path))[0]
    model, optimizer = build("fp32 parameters", "plain")
    checkpoint.load(path, model=model, optimizer=optimizer)
    published = PublishedLion([{"params": g["params"], "weight_decay": 0.0} for g in optimizer.param_groups], lr=1e-3)
    published.load_state_dict(optimizer.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, parameters[name])
    assert published.param_groups[0]["weight_decay"] == 0.1
    assert all(torch.equal(published.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]) for p in model.parameters())


# ---- what is refused, and leaves everything as it was


def small(out_features=5):
    torch.manual_seed(0)
    model = nn.Linear(9, out_features)
    return model, Lion(model.parameters(), lr=1e-3)


def assert_refused(path, model, optimizer, match):
    before = parameters_of(model)
    with pytest.raises(checkpoint.CheckpointError, match=match):
        checkpoint.load(path, model=model, optimizer=optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_no_checkpoint_at_the_path(tmp_path):
    assert_refused(tmp_path / "none", *small(), match="no checkpoint at .*none")


def test_a_save_that_did_not_finish_is_named(tmp_path):
    (tmp_path / "c.partial").mkdir()
    assert_refused(tmp_path / "c", *small(), match="c.partial beside it is a save that did not finish")


def test_a_checkpoint_of_another_shape(tmp_path):
    model, optimizer = small()
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    other, other_optimizer = small(out_features=6)
    assert_refused(tmp_path / "c", other, other_optimizer, match=r"weight: \(5, 9\) saved, \(6, 9\) here")


def test_a_checkpoint_with_other_names(tmp_path):
    model, optimizer = small()
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    other = nn.Sequential(small()[0])
    assert_refused(tmp_path / "c", other, Lion(other.parameters()), match="only in the checkpoint: bias")


def test_a_checkpoint_with_regrouped_parameters(tmp_path):
    model, optimizer = small()
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    regrouped = Lion([{"params": [model.weight]}, {"params": [model.bias]}])
    assert_refused(tmp_path / "c", model, regrouped, match="1 param groups saved, 2 here; param group 0: bias is in")


def test_a_newer_format(tmp_path):
    model, optimizer = small()
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    described = json.loads((tmp_path / "c/lion_dist.json").read_text())
    (tmp_path / "c/lion_dist.json").write_text(json.dumps({**described, "format": 99}))
    assert_refused(tmp_path / "c", model, optimizer, match="format 99, this version reads 2")


# ---- state_dict and load_state_dict by themselves


def state_dict_round_trip(policy):
    model, optimizer = build(policy, "sharded")
    train(model, optimizer, range(3))
    saved, parameters = optimizer.state_dict(), parameters_of(model)
    kept = {**saved, "state": torch_copy(saved["state"]), "counters": saved["counters"].clone()}
    train(model, optimizer, range(3, 6))
    expected = parameters_of(model)
    model.load_state_dict(parameters)
    optimizer.load_state_dict(kept)
    train(model, optimizer, range(3, 6))
    return all(torch.equal(expected[name], tensor) for name, tensor in parameters_of(model).items())


def torch_copy(state):
    return {name: {kind: tensor.clone() for kind, tensor in kinds.items()} for name, kinds in state.items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_dict_brings_the_optimizer_back(gloo, policy):
    assert gloo.run(2, state_dict_round_trip, policy) == [True, True]


def load_of_other_buckets():
    _, optimizer = build("split", "sharded")
    _, other = build("split", "sharded", bucket_numel=5000)
    before = other.shards[0].exp_avg.clone()
    try:
        other.load_state_dict(optimizer.state_dict())
    except ValueError as error:
        return str(error), torch.equal(before, other.shards[0].exp_avg), dist.get_rank()
    return None


def test_a_state_dict_of_other_buckets_is_refused(gloo):
    message, unchanged, _ = gloo.run(2, load_of_other_buckets)[0]
    assert "saved" in message
    assert unchanged


@pytest.mark.parametrize("model_first", [True, False])
def test_a_parameter_changed_before_state_dict_leads_its_main_params_after_it_is_loaded(model_first):
    model, optimizer = build("fp32 main params", "plain")
    train(model, optimizer, range(3))
    with torch.no_grad():
        model[0].weight.fill_(5.0)
    saved, parameters = copy.deepcopy(optimizer.state_dict()), parameters_of(model)
    train(model, optimizer, range(3, 5))
    other, other_optimizer = build("fp32 main params", "plain")
    loads = [lambda: other.load_state_dict(parameters), lambda: other_optimizer.load_state_dict(saved)]
    for load in loads if model_first else reversed(loads):
        load()
    train(other, other_optimizer, range(3, 5))
    for name, expected in parameters_of(model).items():
        assert torch.equal(expected, other.state_dict()[name]), name
