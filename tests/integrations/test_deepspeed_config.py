"""What the JSON may say, what registering replaces, and that all of it can be undone."""

import json
import logging
import subprocess
import sys
import warnings

import pytest
import torch

from lion_dist import Lion, PrecisionPolicy
from lion_dist.integrations import deepspeed as integration
from lion_dist.integrations.deepspeed import DeepSpeedLion, lion_optimizer, read_params, register, unregister

deepspeed = pytest.importorskip("deepspeed")
ZERO_SUPPORTED_OPTIMIZERS = pytest.importorskip("deepspeed.runtime.zero.utils").ZERO_SUPPORTED_OPTIMIZERS


@pytest.fixture
def registered():
    register()
    yield
    unregister()


def weights():
    return [torch.nn.Parameter(torch.ones(3))]


def test_params_of_the_json_reach_the_optimizer():
    params = {"lr": 3e-4, "betas": [0.95, 0.98], "weight_decay": 0.1, "momentum_dtype": "bf16"}
    optimizer = DeepSpeedLion(weights(), **params, momentum_rounding="stochastic", seed=3, use_triton=False)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.95, 0.98), 0.1)
    assert optimizer.precision == PrecisionPolicy("auto", torch.bfloat16, "stochastic", 3)
    assert optimizer.use_triton is False


def test_defaults_are_lions_and_not_deepspeeds():
    group = DeepSpeedLion(weights()).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.99), 0.0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"eps": 1e-8},
            '"eps" does not go with Lion under DeepSpeed: Lion takes a sign and divides by nothing. Delete it',
        ),
        ({"adam_w_mode": True}, "decoupled from the gradient"),
        ({"torch_adam": True}, "use_triton chooses Lion's"),
        ({"fp32_optimizer_states": False}, '"momentum_dtype": "fp32"'),
        ({"cautious": True}, "flat partitions hide where those begin. Use ShardedLion or fully_shard"),
        ({"max_grad_norm": 1.0}, '"gradient_clipping"'),
        ({"learning_rate": 1e-4}, '"learning_rate" is not a parameter of Lion. There are: lr, betas, weight_decay'),
        ({"lr": "auto"}, '"lr": "auto" is filled in by the HF Trainer'),
        ({"betas": "auto"}, '"betas": "auto" is filled in by the HF Trainer'),
        ({"lr": "1e-4"}, "JSON numbers have no quotes"),
        ({"weight_decay": True}, '"weight_decay" must be a number, got True'),
        ({"betas": [0.9, 0.99, 0.999]}, '"betas" must be two numbers'),
        ({"momentum_dtype": "fp16"}, '"momentum_dtype" must be "fp32", "bf16" or null'),
        ({"momentum_dtype": ["bf16"]}, '"momentum_dtype" must be'),
        ({"momentum_rounding": "up"}, "momentum_rounding must be one of"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_bad_params_are_refused_with_the_remedy(params, message):
    for make in (
        lambda: lion_optimizer({"optimizer": {"type": "Lion", "params": params}}),
        lambda: read_params(params),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert message in str(error.value)


def test_adams_beta2_is_warned_of():
    with pytest.warns(UserWarning, match="0.999 is Adam's beta2.*--adam_beta2 0.99"):
        read_params({"betas": [0.9, 0.999]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_params({"betas": [0.9, 0.99]})


def test_factory_reads_a_file_and_touches_only_the_public_list(tmp_path):
    before = deepspeed.ops.lion.FusedLion, deepspeed.ops.lion.DeepSpeedCPULion
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": {"type": "lion", "params": {"lr": 0.5}}}))
    optimizer = lion_optimizer(path)(weights())
    assert type(optimizer) is DeepSpeedLion and optimizer.param_groups[0]["lr"] == 0.5
    assert ZERO_SUPPORTED_OPTIMIZERS.count(DeepSpeedLion) == 1
    lion_optimizer(path)
    assert ZERO_SUPPORTED_OPTIMIZERS.count(DeepSpeedLion) == 1
    assert before == (deepspeed.ops.lion.FusedLion, deepspeed.ops.lion.DeepSpeedCPULion)
    unregister()
    assert DeepSpeedLion not in ZERO_SUPPORTED_OPTIMIZERS


def test_factory_refuses_another_optimizer_and_offload_that_deepspeed_would_refuse():
    with pytest.raises(ValueError, match='has type \'AdamW\'. Write "type": "Lion"'):
        lion_optimizer({"optimizer": {"type": "AdamW"}})
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ValueError, match='needs "zero_force_ds_cpu_optimizer": false'):
        lion_optimizer(offload)
    lion_optimizer(offload | {"zero_force_ds_cpu_optimizer": False})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}},
                "zero_force_ds_cpu_optimizer": False,
            },
            '"device": "nvme"} is not supported: Lion updates what is in memory. Write "device": "cpu"',
        ),
        ({"optimizer": None}, '"optimizer" must be an object, got null. Write {"type": "Lion"}, or leave it out'),
    ],
    ids=["nvme", "null"],
)
def test_factory_refuses_a_config_that_could_not_train(config, message):
    with pytest.raises(ValueError) as error:
        lion_optimizer(config)
    assert message in str(error.value)


def test_register_replaces_nothing_where_accelerate_has_not_what_it_needs(monkeypatch):
    accelerator = pytest.importorskip("accelerate.accelerator")
    unregister()
    before = deepspeed.ops.lion.FusedLion, deepspeed.ops.lion.DeepSpeedCPULion
    with monkeypatch.context() as patch:
        patch.delattr(accelerator, "map_pytorch_optim_to_deepspeed")
        for _ in range(2):
            with pytest.raises(ImportError, match="has no map_pytorch_optim_to_deepspeed"):
                register()
    assert (deepspeed.ops.lion.FusedLion, deepspeed.ops.lion.DeepSpeedCPULion) == before
    assert DeepSpeedLion not in ZERO_SUPPORTED_OPTIMIZERS


def test_register_says_what_it_replaced_twice_is_once_and_unregister_restores(caplog):
    pytest.importorskip("accelerate")
    import accelerate.accelerator

    places = [
        (deepspeed.ops.lion, "FusedLion"),
        (deepspeed.ops.lion, "DeepSpeedCPULion"),
        (accelerate.accelerator, "map_pytorch_optim_to_deepspeed"),
    ]
    originals = [getattr(module, name) for module, name in places]
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        register()
        first = [getattr(module, name) for module, name in places]
        register()
    assert [getattr(module, name) for module, name in places] == first
    assert deepspeed.ops.lion.FusedLion is deepspeed.ops.lion.DeepSpeedCPULion is DeepSpeedLion
    assert [caplog.text.count(f"replaced {module.__name__}.{name}") for module, name in places] == [1, 1, 1]
    unregister()
    unregister()
    assert [getattr(module, name) for module, name in places] == originals
    assert DeepSpeedLion not in ZERO_SUPPORTED_OPTIMIZERS


def test_accelerates_silent_replacement_is_caught(registered):
    """Under offload Accelerate makes a DeepSpeedCPUAdam of every optimizer that is not bitsandbytes' Lion."""
    accelerator = pytest.importorskip("accelerate.accelerator")
    policy = PrecisionPolicy(momentum_dtype=torch.bfloat16, momentum_rounding="stochastic", seed=4)
    theirs = Lion(weights(), lr=2e-3, betas=(0.8, 0.9), weight_decay=0.3, use_triton=False, precision=policy)
    ours = accelerator.map_pytorch_optim_to_deepspeed(theirs)
    assert type(ours) is DeepSpeedLion and ours.precision == policy and ours.use_triton is False
    group = ours.param_groups[0]
    assert group["params"] == theirs.param_groups[0]["params"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-3, (0.8, 0.9), 0.3)
    assert accelerator.map_pytorch_optim_to_deepspeed(ours) is ours
    with pytest.raises(ValueError, match='"cautious" does not go with Lion under DeepSpeed'):
        accelerator.map_pytorch_optim_to_deepspeed(Lion(weights(), cautious=True))


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "0.14.2+cu118"])
def test_other_versions_are_refused_by_name(monkeypatch, version):
    monkeypatch.setattr(deepspeed, "__version__", version)
    with pytest.raises(ImportError) as error:
        register()
    assert f"DeepSpeed {version} is installed; lion_dist works with 0.19.8 <= version < 0.20" in str(error.value)


def test_missing_deepspeed_is_said(monkeypatch):
    monkeypatch.setattr(integration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"DeepSpeed is not installed. pip install 'lion-dist\[deepspeed\]'"):
        lion_optimizer({})


def test_import_brings_in_no_framework():
    check = "import sys, lion_dist.integrations.deepspeed; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_step_hooks_run_once_a_step():
    weight = weights()
    Lion(weight)  # from its first instance on, torch runs the hooks around Lion.step
    optimizer, calls = DeepSpeedLion(weight), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    weight[0].grad = torch.ones(3)
    optimizer.step()
    assert calls == ["pre"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"decoupled_weight_decay": "false"}, "\"decoupled_weight_decay\" must be True or False, got 'false'"),
        ({"decoupled_weight_decay": 0}, '"decoupled_weight_decay" must be True or False, got 0'),
        ({"use_triton": "true"}, "\"use_triton\" must be True, False or None, got 'true'"),
        ({"lr": True}, '"lr" must be a number, got True'),
        ({"lr": None}, '"lr" must be a number, got None'),
        ({"lr": 1e300}, '"lr" must be finite and at least 0, got 1e+300'),
        ({"weight_decay": -1}, '"weight_decay" must be finite and at least 0, got -1'),
        ({"betas": 0.9}, '"betas" must be two numbers in [0, 1), got 0.9'),
        ({"seed": "7"}, "seed must be an int in [0, 2**63), got '7'"),
    ],
    ids=str,
)
def test_json_values_of_the_wrong_kind_are_refused(params, message):
    with pytest.raises(ValueError) as error:
        lion_optimizer({"optimizer": {"type": "Lion", "params": params}})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "Lion", "params": [1]}}, 'the config\'s "params" must be an object, got [1]'),
        ({"optimizer": "Lion"}, 'the config\'s "optimizer" must be an object, got "Lion"'),
        ({"zero_optimization": 2}, 'the config\'s "zero_optimization" must be an object, got 2'),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, '"offload_optimizer" must be an object, got "cpu"'),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": "false"},
            "\"zero_force_ds_cpu_optimizer\" must be True or False, got 'false'",
        ),
    ],
    ids=str,
)
def test_parts_of_a_config_of_the_wrong_kind_are_refused(config, message):
    with pytest.raises(ValueError) as error:
        lion_optimizer(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
        (b"[" * 10**5, "is not JSON"),
        (b"[1]", "must hold an object"),
    ],
    ids=["half", "binary", "deep", "list"],
)
def test_a_file_that_is_no_config_is_named(content, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"config: {path} {message}.* Pass a dict, or the path of a DeepSpeed config"):
        lion_optimizer(path)
    with pytest.raises(TypeError, match="config must be a path, got 3"):
        lion_optimizer(3)
