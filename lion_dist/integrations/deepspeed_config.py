"""What a DeepSpeed config says of the optimizer, and what of it goes with Lion."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from lion_dist import values
from lion_dist.config import PrecisionPolicy
from lion_dist.hyperparameters import check_betas

FLAGS = ("decoupled_weight_decay", "cautious_wd", "corrected_weight_decay", "maximize")
LION_KEYS = ("lr", "betas", "weight_decay", *FLAGS, "use_triton")
PRECISION_KEYS = ("momentum_dtype", "momentum_rounding", "main_params", "seed")
MOMENTUM_DTYPES = {
    None: None,
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
}
ADAMS_BETA2 = 0.999
# What configs carry over from other optimizers: {key: why Lion has none and what to do}.
FOREIGN_KEYS = {
    "eps": "Lion takes a sign and divides by nothing. Delete it",
    "adam_w_mode": "Lion's weight decay is always decoupled from the gradient, as AdamW's. Delete it",
    "adamw_mode": "Lion's weight decay is always decoupled from the gradient, as AdamW's. Delete it",
    "torch_adam": "it chooses between Adam implementations. Delete it; use_triton chooses Lion's",
    "bias_correction": "Lion has no bias correction. Delete it",
    "amsgrad": "it is a variant of Adam. Delete it",
    "fp32_optimizer_states": 'use "momentum_dtype": "fp32" (the default for fp32 partitions) or "bf16"',
    "set_grad_none": "DeepSpeed owns the gradients here. Delete it",
    **dict.fromkeys(
        ("cautious", "cautious_factor"),
        "its statistic is over whole tensors, and flat partitions hide where those begin. Use ShardedLion or "
        "fully_shard (FSDP2) for it",
    ),
    "skip_spikes": "the norm over all ranks' gradients is DeepSpeed's, which does not hand it on. Use ShardedLion or "
    "fully_shard (FSDP2) for it",
    **dict.fromkeys(
        ("ema_decay", "ema_dtype"),
        "the average would be one of flat partitions, and DeepSpeed itself copies those into the model. Use "
        "ShardedLion or fully_shard (FSDP2) for it",
    ),
    "max_grad_norm": 'use the top-level "gradient_clipping" of the config',
}


def read_optimizer_section(config: Mapping) -> dict:
    """The ``"params"`` for :func:`read_params`; none where the config has no optimizer.

    Raises:
        ValueError: the config names another optimizer, or offloads it to NVMe or without
            ``"zero_force_ds_cpu_optimizer": false``.
    """
    section = _object(config, "optimizer", {"type": "Lion"}, 'Write {"type": "Lion"}, or leave it out.')
    name = section.get("type")
    if str(name).lower() != "lion":
        raise ValueError(
            f'the config\'s "optimizer" has type {name!r}. Write "type": "Lion", or call deepspeed.initialize '
            "without optimizer=lion_optimizer(...)."
        )
    zero = _object(config, "zero_optimization", {}, 'Write {"stage": 2}, or leave it out.', null=True)
    offload = _object(zero, "offload_optimizer", {}, 'Write {"device": "cpu"}, or leave it out.', null=True)
    device = offload.get("device", "none")
    if device not in ("none", "cpu"):
        shown = json.dumps(device, default=values.shown)
        raise ValueError(
            f'"offload_optimizer": {{"device": {shown}}} is not supported: Lion updates what is in memory. Write '
            '"device": "cpu", or shard over more ranks.'
        )
    force = values.flag('"zero_force_ds_cpu_optimizer"', config.get("zero_force_ds_cpu_optimizer", True))
    if device == "cpu" and force:
        raise ValueError(
            '"offload_optimizer": {"device": "cpu"} with an optimizer of your own needs '
            '"zero_force_ds_cpu_optimizer": false at the top level of the config: DeepSpeed refuses it otherwise.'
        )
    return dict(_object(section, "params", {}, 'Write {"lr": 1e-4}, or leave it out.', null=True))


def _object(parent: Mapping, name: str, default: Mapping, remedy: str, *, null: bool = False) -> Mapping:
    """The object ``name`` of ``parent``; ``default`` where it is not there, or ``null`` and null is allowed."""
    value = parent.get(name, default)
    if value is None and null:
        return default
    if not isinstance(value, Mapping):
        found = json.dumps(value, default=values.shown)[:120]
        raise ValueError(f'the config\'s "{name}" must be an object, got {found}. {remedy}')
    return value


def read_params(params: Mapping) -> dict:
    """The ``"params"`` of a DeepSpeed optimizer section, checked, as keyword arguments of ``Lion``.

    Keys: lr (1e-4), betas ([0.9, 0.99]), weight_decay (0), decoupled_weight_decay, cautious_wd, corrected_weight_decay
    and maximize (false), use_triton (null), and those of ``PrecisionPolicy``: momentum_dtype ("fp32", "bf16", or null:
    as the partition, which is fp32), momentum_rounding, main_params, seed.

    Raises:
        ValueError: a key that Lion does not have, or a value of the wrong kind.
    """
    for key, value in params.items():
        if key in FOREIGN_KEYS:
            raise ValueError(f'"{key}" does not go with Lion under DeepSpeed: {FOREIGN_KEYS[key]}.')
        if key not in LION_KEYS + PRECISION_KEYS:
            raise ValueError(f'"{key}" is not a parameter of Lion. There are: {", ".join(LION_KEYS + PRECISION_KEYS)}.')
        if isinstance(value, str) and value == "auto" and key != "main_params":
            raise ValueError(
                f'"{key}": "auto" is filled in by the HF Trainer from its own arguments; without it there has to be a '
                f'value. Write one, or delete "{key}" for the default.'
            )
    for key in ("lr", "weight_decay"):
        if key in params:
            _check_rate(key, params[key])
    for key in (*FLAGS, "use_triton"):
        if key in params:
            values.flag(f'"{key}"', params[key], optional=key == "use_triton")
    keywords = {key: params[key] for key in LION_KEYS if key in params}
    if "betas" in params:
        keywords["betas"] = _read_betas(params["betas"])
    precision = {key: params[key] for key in PRECISION_KEYS if key in params}
    if "momentum_dtype" in precision:
        precision["momentum_dtype"] = _read_dtype(precision["momentum_dtype"])
    return keywords | {"precision": PrecisionPolicy(**precision)}


def _check_rate(key: str, value: object) -> None:
    if not isinstance(value, Tensor) and values.as_number(value) is None:
        raise ValueError(f'"{key}" must be a number, got {values.shown(value)}. JSON numbers have no quotes: 1e-4')
    values.rate(f'"{key}"', value)


def _read_betas(given) -> tuple[float, float]:
    value = check_betas(given, '"betas"')
    if value[1] >= ADAMS_BETA2:
        warnings.warn(
            f"betas {value}: {value[1]} is Adam's beta2 (the HF Trainer's \"auto\", and DeepSpeed's own default "
            "for Lion); Lion's is 0.99. A bf16 momentum that is rounded to nearest never decays at 0.999. "
            "Write [0.9, 0.99] (HF Trainer: --adam_beta2 0.99).",
            stacklevel=4,
        )
    return value


def _read_dtype(value) -> torch.dtype | None:
    if not isinstance(value, str | torch.dtype | None) or value not in MOMENTUM_DTYPES:
        shown = values.shown(value)
        raise ValueError(f'"momentum_dtype" must be "fp32", "bf16" or null (as the partition), got {shown}. Write one.')
    return MOMENTUM_DTYPES[value]
