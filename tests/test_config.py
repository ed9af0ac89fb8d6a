"""PrecisionPolicy and ShardingConfig: what may be chosen, and what is said about the rest."""

import dataclasses
import warnings

import pytest
import torch

from lion_dist import Lion, PrecisionPolicy, ShardingConfig, hyperparameters
from lion_dist.hyperparameters import check_hyperparameters

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"main_params": "fp8"}, r"main_params must be one of \('auto', 'fp32', 'split', 'none'\), got 'fp8'"),
        ({"main_params": None}, "main_params must be one of"),
        ({"momentum_rounding": "up"}, r"momentum_rounding must be one of \('nearest', 'stochastic'\), got 'up'"),
        ({"momentum_dtype": FP16}, "momentum_dtype must be .* got torch.float16. fp16 lacks the range"),
        ({"momentum_dtype": "bf16"}, "momentum_dtype must be"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\*\*63\), got -1"),
        ({"seed": 2**63}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
    ],
)
def test_unknown_precision_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        PrecisionPolicy(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"zero_stage": 3}, "zero_stage=3 .*fully_shard and use lion_dist.Lion"),
        ({"zero_stage": 0}, "zero_stage must be 1 or 2, got 0"),
        ({"zero_stage": "2"}, "zero_stage must be 1 or 2, got '2'"),
        ({"bucket_numel": 0}, "bucket_numel must be at least 1 element, got 0"),
        ({"bucket_numel": -5}, "bucket_numel must be at least 1 element, got -5"),
        ({"reduce_dtype": FP16}, "reduce_dtype must be .* got torch.float16"),
    ],
)
def test_unknown_sharding_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        ShardingConfig(**settings)


def test_configs_are_values():
    """Frozen, comparable, hashable, and with a repr that says everything: ranks compare it."""
    assert PrecisionPolicy(seed=3) == PrecisionPolicy(seed=3) != PrecisionPolicy()
    assert len({ShardingConfig(), ShardingConfig(zero_stage=1), ShardingConfig()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        PrecisionPolicy().seed = 1
    for field in dataclasses.fields(ShardingConfig):
        assert field.name in repr(ShardingConfig())


@pytest.mark.parametrize(
    ("main_params", "dtype", "kind"),
    [
        ("auto", FP32, "own"),
        ("auto", BF16, "split"),
        ("auto", FP16, "fp32"),
        ("fp32", FP32, "own"),
        ("fp32", BF16, "fp32"),
        ("fp32", FP16, "fp32"),
        ("split", FP32, "own"),
        ("split", BF16, "split"),
        ("none", BF16, "none"),
    ],
)
def test_kind_of_main_params_for_a_parameter(main_params, dtype, kind):
    assert PrecisionPolicy(main_params).main_params_for(dtype) == kind


@pytest.mark.parametrize("main_params", ["split", "none"])
def test_bf16_main_params_of_fp16_parameters_are_refused(main_params):
    with pytest.raises(ValueError, match="is for bf16 parameters, but a parameter is torch.float16.*'fp32'"):
        PrecisionPolicy(main_params).main_params_for(FP16)


@pytest.mark.parametrize(
    ("configured", "param", "dtype"),
    [(None, FP32, FP32), (None, BF16, BF16), (None, FP16, FP32), (FP32, BF16, FP32), (BF16, FP32, BF16)],
)
def test_momentum_dtype_for_a_parameter(configured, param, dtype):
    assert PrecisionPolicy(momentum_dtype=configured).momentum_dtype_for(param) == dtype


@pytest.mark.parametrize(
    ("policy", "dtype", "stochastic"),
    [
        (PrecisionPolicy(), BF16, False),
        (PrecisionPolicy("none"), BF16, True),
        (PrecisionPolicy("none"), FP32, False),
        (PrecisionPolicy(momentum_rounding="stochastic"), BF16, True),
        (PrecisionPolicy(momentum_rounding="stochastic"), FP32, False),
        (PrecisionPolicy(momentum_dtype=BF16, momentum_rounding="stochastic"), FP32, True),
        (PrecisionPolicy(momentum_dtype=FP32, momentum_rounding="stochastic"), BF16, False),
    ],
)
def test_when_random_bits_are_drawn(policy, dtype, stochastic):
    assert policy.is_stochastic(dtype) is stochastic


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_rates_that_are_negative_or_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite and at least 0, got {value}"):
        check_hyperparameters({"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, name: value})


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, float("nan")), (0.9,), (0.9, 0.9, 0.9)])
def test_betas_outside_their_range_are_refused(betas):
    with pytest.raises(ValueError, match="betas must be two numbers in"):
        check_hyperparameters({"lr": 1e-4, "betas": betas, "weight_decay": 0.0})


def test_limits_of_the_ranges_are_allowed():
    check_hyperparameters({"lr": 0.0, "betas": (0.0, 0.0), "weight_decay": 0.0})
    check_hyperparameters({"lr": torch.tensor(1e-3), "betas": [0.9, 0.99], "weight_decay": torch.tensor([0.1])})


def test_decay_that_fp32_cannot_hold_is_warned_of_once():
    hyperparameters._warned_of_decay.clear()
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt = Lion([param], lr=1e-7, weight_decay=0.1)
    with pytest.warns(UserWarning, match="lr \\* weight_decay = 1.0e-08 is below 6e-8.*Raise weight_decay"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        Lion([param], lr=1e-4, weight_decay=0.1).step()
