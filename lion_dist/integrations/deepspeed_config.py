"""What a DeepSpeed config says of the optimizer, and what of it goes with Lion."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from lion_dist.config import PrecisionPolicy

LION_KEYS = ("lr", "betas", "weight_decay", "decoupled_weight_decay", "use_triton")
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
    "cautious": "its statistic is over whole tensors, and flat partitions hide where those begin. Use ShardedLion "
    "or fully_shard (FSDP2) for it",
    "max_grad_norm": 'use the top-level "gradient_clipping" of the config',
}


def read_optimizer_section(config: Mapping) -> dict:
    """The ``"params"`` for :func:`read_params`; none where the config has no optimizer.

    Raises:
        ValueError: the config names another optimizer, or offloads it to NVMe or without
            ``"zero_force_ds_cpu_optimizer": false``.
    """
    section = config.get("optimizer", {"type": "Lion"})
    if not isinstance(section, Mapping):
        raise ValueError(
            f'the config\'s "optimizer" must be an object, got {json.dumps(section)}. Write {{"type": "Lion"}}, or '
            "leave it out."
        )
    name = section.get("type")
    if str(name).lower() != "lion":
        raise ValueError(
            f'the config\'s "optimizer" has type {name!r}. Write "type": "Lion", or call deepspeed.initialize '
            "without optimizer=lion_optimizer(...)."
        )
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    device = offload.get("device", "none")
    if device not in ("none", "cpu"):
        raise ValueError(
            f'"offload_optimizer": {{"device": "{device}"}} is not supported: Lion updates what is in memory. Write '
            '"device": "cpu", or shard over more ranks.'
        )
    if device == "cpu" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            '"offload_optimizer": {"device": "cpu"} with an optimizer of your own needs '
            '"zero_force_ds_cpu_optimizer": false at the top level of the config: DeepSpeed refuses it otherwise.'
        )
    return dict(section.get("params") or {})


def read_params(params: Mapping) -> dict:
    """The ``"params"`` of a DeepSpeed optimizer section, checked, as keyword arguments of ``Lion``.

    Keys: lr (1e-4), betas ([0.9, 0.99]), weight_decay (0), decoupled_weight_decay (false), use_triton (null), and those
    of ``PrecisionPolicy``: momentum_dtype ("fp32", "bf16", or null: as the partition, which is fp32),
    momentum_rounding, main_params, seed.

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
        if key in params and not _is_number(params[key]):
            raise ValueError(f'"{key}" must be a number, got {params[key]!r}. JSON numbers have no quotes: 1e-4')
    keywords = {key: params[key] for key in LION_KEYS if key in params}
    if "betas" in params:
        keywords["betas"] = _read_betas(params["betas"])
    precision = {key: params[key] for key in PRECISION_KEYS if key in params}
    if "momentum_dtype" in precision:
        precision["momentum_dtype"] = _read_dtype(precision["momentum_dtype"])
    return keywords | {"precision": PrecisionPolicy(**precision)}


def _is_number(value: object) -> bool:
    is_scalar = isinstance(value, Tensor) and value.numel() == 1
    return is_scalar or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def _read_betas(value) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_is_number, value)):
        raise ValueError(f'"betas" must be two numbers, got {value!r}. The paper\'s are [0.9, 0.99].')
    if value[1] >= ADAMS_BETA2:
        warnings.warn(
            f"betas {tuple(value)}: {value[1]} is Adam's beta2 (the HF Trainer's \"auto\", and DeepSpeed's own default "
            "for Lion); Lion's is 0.99. A bf16 momentum that is rounded to nearest never decays at 0.999. "
            "Write [0.9, 0.99] (HF Trainer: --adam_beta2 0.99).",
            stacklevel=4,
        )
    return tuple(value)


def _read_dtype(value) -> torch.dtype | None:
    if not isinstance(value, str | torch.dtype | None) or value not in MOMENTUM_DTYPES:
        raise ValueError(f'"momentum_dtype" must be "fp32", "bf16" or null (as the partition), got {value!r}.')
    return MOMENTUM_DTYPES[value]
