"""What a user passes by mistake is refused by name, with its value and the remedy; what was right stays right."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig, checkpoint, values
from lion_dist.planning.estimates import Job, activation_bytes, plan
from lion_dist.planning.model_shapes import read_shapes

NAN = float("nan")


def model_of() -> nn.Module:
    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"average": "False"}, "average must be True or False, got 'False'. Pass one of them, without quotes"),
        ({"average": 1}, "average must be True or False, got 1"),
        ({"average": None}, "average must be True or False, got None"),
        ({"ordered_sum": "true"}, "ordered_sum must be True, False or None, got 'true'"),
        ({"peer_memory": 0}, "peer_memory must be True, False or None, got 0"),
        ({"update_in_backward": "no"}, "update_in_backward must be True or False, got 'no'"),
        ({"bucket_numel": 1.5}, "bucket_numel must be at least 1 element, got 1.5. Pass a whole number"),
        ({"bucket_numel": 5e6}, "bucket_numel must be at least 1 element, got 5000000.0. Pass a whole number"),
        ({"bucket_numel": NAN}, "bucket_numel must be at least 1 element, got nan"),
        ({"bucket_numel": True}, "bucket_numel must be at least 1 element, got True"),
        ({"bucket_numel": "1000"}, "bucket_numel must be at least 1 element, got '1000'"),
        ({"zero_stage": True}, "zero_stage must be 1 or 2, got True"),
        ({"zero_stage": 2.0}, "zero_stage must be 1 or 2, got 2.0"),
        ({"zero_stage": None}, "zero_stage must be 1 or 2, got None"),
        ({"zero_stage": torch.tensor([1, 2])}, r"zero_stage must be 1 or 2, got a tensor of shape \(2,\)"),
        ({"zero_stage": np.array([1, 2])}, r"zero_stage must be 1 or 2, got array\(\[1, 2\]\)"),
        ({"reduce_dtype": "bf16"}, "reduce_dtype must be torch.float32, torch.bfloat16 or None, got 'bf16'"),
        ({"param_sync": ["coded"]}, r"param_sync must be one of \('gather', 'coded'\), got \['coded'\]"),
        ({"check_replicas_every": "5"}, "check_replicas_every must be a whole number of steps, or 0 .* got '5'"),
    ],
    ids=str,
)
def test_sharding_config_refuses(settings, match):
    with pytest.raises(ValueError, match=match):
        ShardingConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"main_params": torch.tensor([1.0, 2.0])}, r"main_params must be one of .* got a tensor of shape \(2,\)"),
        ({"momentum_dtype": "fp32"}, "momentum_dtype must be torch.float32, torch.bfloat16 or None, got 'fp32'"),
        ({"momentum_dtype": torch.tensor([1, 2])}, "momentum_dtype must be"),
        ({"momentum_rounding": None}, "momentum_rounding must be one of .* got None"),
        ({"seed": True}, "seed must be an int in .* got True"),
        ({"seed": None}, "seed must be an int in .* got None"),
    ],
    ids=str,
)
def test_precision_policy_refuses(settings, match):
    with pytest.raises(ValueError, match=match):
        PrecisionPolicy(**settings)


def test_configs_keep_pythons_own_values_which_ranks_compare_by_their_text():
    config = ShardingConfig(np.int64(1), np.int32(100), average=np.bool_(False), check_replicas_every=np.int64(3))
    assert repr(config) == repr(ShardingConfig(1, 100, average=False, check_replicas_every=3))
    assert repr(PrecisionPolicy(seed=np.int64(7))) == repr(PrecisionPolicy(seed=7))
    assert repr(ShardingConfig(bucket_numel=torch.tensor(64))) == repr(ShardingConfig(bucket_numel=64))


@pytest.mark.parametrize("kind", [Lion, ShardedLion])
@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"decoupled_weight_decay": "false"}, ValueError, "decoupled_weight_decay must be True or False, got 'false'"),
        ({"use_triton": "no"}, ValueError, "use_triton must be True, False or None, got 'no'"),
        ({"cautious": "False"}, ValueError, "cautious must be True or False, got 'False'"),
        ({"metrics_every": "10"}, ValueError, "metrics_every must be a whole number of steps, .* got '10'"),
        ({"precision": "fp32"}, TypeError, "precision must be a PrecisionPolicy, got 'fp32'. Pass lion_dist.Precision"),
        ({"precision": None}, TypeError, "precision must be a PrecisionPolicy, got None"),
        ({"precision": PrecisionPolicy}, TypeError, "precision must be a PrecisionPolicy, got <class"),
        ({"params": 3}, TypeError, "params must be parameters or param groups, got 3. Pass model.parameters"),
        ({"params": None}, TypeError, "params must be parameters or param groups, got None"),
        ({"params": {"params": []}}, TypeError, "params must be parameters or param groups, got {'params'"),
    ],
    ids=str,
)
def test_the_optimizers_refuse(kind, settings, error, match):
    with pytest.raises(error, match=match):
        kind(**{"params": model_of().parameters()} | settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sharding": {"zero_stage": 1}}, "sharding must be a ShardingConfig, got {'zero_stage': 1}. Pass lion"),
        ({"sharding": 2}, "sharding must be a ShardingConfig, got 2"),
        ({"module": 3}, "module must be a Module or None, got 3. Pass the model that owns the parameters"),
        ({"module": nn.Linear}, "module must be a Module or None, got <class"),
    ],
    ids=str,
)
def test_sharded_lion_refuses(settings, match):
    with pytest.raises(TypeError, match=match):
        ShardedLion(model_of().parameters(), **settings)


@pytest.mark.parametrize("kind", [Lion, ShardedLion])
def test_what_is_called_on_an_optimizer_refuses(kind):
    opt = kind(model_of().parameters())
    with pytest.raises(TypeError, match="closure must be a function or None, got 3"):
        opt.step(3)
    with pytest.raises(TypeError, match='param_group must be a dict with "params", got {}'):
        opt.add_param_group({})
    with pytest.raises(TypeError, match='param_group must be a dict with "params", got 3'):
        opt.add_param_group(3)
    for state_dict, match in [
        ({}, r"state_dict needs 'state' \(a dict\), got a dict with \[\]. Pass what state_dict"),
        (None, "state_dict must be a dict, got None"),
        ({"model": 1, 3: 2}, r"got a dict with \['3', 'model'\]"),
        ({"state": [], "param_groups": [], "counters": 0}, r"needs 'state' to be a dict, got \[\]"),
        ({"state": {}, "param_groups": {}, "counters": 0}, "needs 'param_groups' to be a list, got {}"),
        ({"state": {}, "param_groups": [{}], "counters": 0}, 'param group 0 has no list "params"'),
        ({"state": {}, "param_groups": [3], "counters": 0}, 'param group 0 has no list "params"'),
    ]:
        with pytest.raises(ValueError, match=match):
            opt.load_state_dict(state_dict)


def test_what_is_called_on_sharded_lion_refuses():
    model = model_of()
    opt = ShardedLion(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    for limit in (None, "1.0", True, 10**400, torch.ones(2)):
        with pytest.raises(ValueError, match="max_norm must be above 0, got .*. Pass the largest norm"):
            opt.clip_grad_norm_(limit)
    for count in (None, "4", True, torch.ones(2), torch.tensor(True)):
        with pytest.raises(ValueError, match="count.* must"):
            opt.set_grad_divisor(count)
    with pytest.raises(ValueError, match="set_to_none must be True or False, got 'False'"):
        opt.zero_grad("False")
    with pytest.raises(TypeError, match="inverse_loss_scale must be a Tensor, got 0.5"):
        opt.unscale_and_check_(0.5)
    with pytest.raises(ValueError, match="process_group must be a ProcessGroup .*got \\[1\\]"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "process_group": [1]})
    assert float(opt.clip_grad_norm_(torch.tensor(0.5))) == float(opt.clip_grad_norm_(np.float32(0.5)))
    assert float(opt.clip_grad_norm_(float("inf"))) > 0
    opt.step()


# ---- checkpoints


@pytest.mark.parametrize("path", [None, 3, b"bytes", "nul\0byte", ["a"]], ids=repr)
def test_checkpoint_functions_refuse_what_is_no_path(path):
    model = model_of()
    both = {"model": model, "optimizer": Lion(model.parameters())}
    for call in (checkpoint.save, checkpoint.save_async, checkpoint.load):
        with pytest.raises(TypeError, match="path must be a path, got .*. Pass a string or a pathlib.Path"):
            call(path, **both)
    with pytest.raises(TypeError, match="path must be a path"):
        checkpoint.verify(path)
    for call in (checkpoint.newest, lambda folder: checkpoint.keep_last(folder, 1)):
        with pytest.raises(TypeError, match="folder must be a path"):
            call(path)


@pytest.mark.parametrize("count", ["3", 0, 1.5, True, None, NAN], ids=repr)
def test_keep_last_refuses(count, tmp_path):
    with pytest.raises(ValueError, match=f"count must be at least 1, got {count!r}. Pass how many"):
        checkpoint.keep_last(tmp_path, count)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"a": torch.ones(2)}, r"extra\['a'\] must be a JSON value, got a tensor of shape \(2,\) .*Pass .item"),
        ({"a": {"b": [1, np.int64(3)]}}, r"extra\['a'\]\['b'\]\[1\] must be a JSON value, got .*Pass .item"),
        ({"a": {1, 2}}, r"extra\['a'\] must be a JSON value, got {1, 2} \(set\). Convert it"),
        ({"a": len}, r"extra\['a'\] must be a JSON value"),
        ({(1, 2): 3}, r"extra has the key \(1, 2\), but keys in JSON are strings"),
        (3, "extra must be a Mapping, got 3. Pass a dict"),
    ],
    ids=str,
)
@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_async])
def test_extra_that_is_no_json_is_refused_by_the_place_in_it(save, extra, match, tmp_path):
    model = model_of()
    with pytest.raises(checkpoint.CheckpointError, match=match):
        save(tmp_path / "a", model=model, optimizer=Lion(model.parameters()), extra=extra)
    assert not list(tmp_path.iterdir())


def test_extra_that_holds_itself_is_refused(tmp_path):
    model, extra = model_of(), {}
    extra["extra"] = extra
    with pytest.raises(checkpoint.CheckpointError, match="nested too deeply for JSON"):
        checkpoint.save(tmp_path / "a", model=model, optimizer=Lion(model.parameters()), extra=extra)


@pytest.mark.parametrize("model", [3, None, nn.Linear])
def test_a_model_that_is_none_is_refused(model, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="model must be a Module, got .*. Pass the model whose"):
        checkpoint.save(tmp_path / "a", model=model, optimizer=Lion(model_of().parameters()))


# ---- planning


@pytest.mark.parametrize("name", ["ranks", "nodes", "micro_batches"])
@pytest.mark.parametrize("value", [0, "8", 2.0, True, None], ids=repr)
def test_a_job_refuses(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value!r}. Pass a whole number"):
        Job(**{"ranks": 8} | {name: value})


def test_planning_refuses():
    model, job = read_shapes("1b"), Job(np.int64(2))
    with pytest.raises(TypeError, match="sharding must be a ShardingConfig, got {}"):
        Job(2, sharding={})
    with pytest.raises(TypeError, match="model must be a ModelShapes, got '1b'"):
        plan("1b", job, "fp32")
    with pytest.raises(TypeError, match="job must be a Job, got 2"):
        plan(model, 2, "fp32")
    with pytest.raises(ValueError, match="precision must be one of .* got 'fp8'"):
        plan(model, job, "fp8")
    with pytest.raises(ValueError, match="inter must be above 0, got 0"):
        plan(model, job, "fp32")[0].seconds(1e9, 0)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 1.5"):
        activation_bytes(model, 1.5, 2, checkpointing=False)
    with pytest.raises(ValueError, match="checkpointing must be True or False, got 'no'"):
        activation_bytes(model, 1, 2, checkpointing="no")
    with pytest.raises(TypeError, match="where must be a path, got None"):
        read_shapes(None)
    assert json.dumps(plan(model, job, "fp32")[0].memory)


# ---- the text


def test_a_message_is_one_short_line_whatever_the_value():
    class Loud:
        def __repr__(self):
            raise RuntimeError("no")

    for value in ("x" * 10_000, "a\nb", list(range(10_000)), torch.zeros(1000), np.zeros(1000), Loud(), {"a": {}}):
        text = values.shown(value)
        assert len(text) < 250 and "\n" not in text
