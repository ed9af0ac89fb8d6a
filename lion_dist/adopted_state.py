"""State and param groups that come from a file, another optimizer or a user's hand, made into ``Lion``'s own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lion_dist.averages import KIND as AVERAGE
from lion_dist.boxed_tensor import IS_NO_OPERAND, BoxedTensor
from lion_dist.hyperparameters import check_hyperparameters
from lion_dist.local_shard import LocalShard, local_tensor, part_of
from lion_dist.main_params import main_param_as
from lion_dist.update_batch import STATE_KEYS

if TYPE_CHECKING:
    from lion_dist.lion import Lion

GROUP_KEYS = ("lr", "betas", "weight_decay")  # lion-pytorch's, so that param groups travel both ways
# Keys of torch's other optimizers, which say how (not what) to compute or belong to another rule. They are left behind:
# a key that a fresh optimizer lacks makes torch.distributed.checkpoint refuse every checkpoint without it.
FOREIGN_KEYS = frozenset(
    "alpha ams_bound amsgrad beta2_decay capturable centered d dampening decoupled_weight_decay differentiable eps "
    "etas fused foreach history_size initial_accumulator_value lambd line_search_fn lr_decay max_eval max_iter "
    "maximize momentum momentum_decay nesterov ns_coefficients ns_steps adjust_lr_fn rho step_sizes t0 "
    "tolerance_change tolerance_grad".split()
)
OF_THE_WHOLE_OPTIMIZER = tuple(
    "precision cautious use_triton metrics_every corrected_weight_decay maximize ema_decay skip_spikes".split()
)
SEED_KEYS = ("cautious_factor", "cautious_wd")  # in param groups of lion-pytorch's cautious class; the optimizer's here


# ---- param groups


def check_group(group: Mapping, decoupled_from: float | None) -> None:
    """Raise ValueError if a param group asks for what ``Lion`` would not do."""
    check_hyperparameters(group, decoupled_from)
    if group.get("differentiable"):
        raise ValueError(
            f"a param group has differentiable={group['differentiable']!r}, which Lion does not support. Leave it out: "
            "gradients do not flow through a step."
        )
    for key in (*OF_THE_WHOLE_OPTIMIZER, *SEED_KEYS):
        if key in group and (group[key] or key != "maximize"):  # groups of torch's optimizers say maximize=False
            raise ValueError(
                f"a param group has {key}={group[key]!r}, which is a setting of the whole optimizer. "
                "Pass it to the constructor, or make an optimizer for each setting."
            )


def adopt_groups(
    saved: Sequence[Mapping], present: Sequence[Mapping], defaults: Mapping, decoupled_from: float | None
) -> list[dict]:
    """``saved`` param groups with the keys of the ``present`` ones, whatever wrote them.

    Keys that a saved group lacks are filled in. Keys of the user's own, and those of schedulers, are kept.
    """
    result = []
    for i, group in enumerate(saved):
        own = present[i] if i < len(present) else {}  # torch refuses another number of groups
        group = {key: value for key, value in group.items() if key not in SEED_KEYS}
        known = {key: value for key, value in group.items() if key in own or key not in FOREIGN_KEYS}
        filled = {key: value for key, value in own.items() if key not in ("params", "param_names")}
        check_group(dict(defaults) | filled | dict(group), decoupled_from)
        result.append(dict(defaults) | filled | known)
    return result


# ---- state


def fits(param: Tensor, state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether ``state`` can be updated in place; ``dtypes`` says which entries ``param`` needs."""
    local = local_tensor(param)
    if any(key in state and key not in dtypes for key in STATE_KEYS):
        return False
    for key, dtype in dtypes.items():
        value = state.get(key)
        if not isinstance(value, Tensor):
            return False
        if key != "step" and (local_tensor(value) is value) != (local is param):
            return False
        value = local_tensor(value)
        shape = () if key == "step" else local.shape
        if value.dtype != dtype or value.device != local.device or value.shape != shape or not value.is_contiguous():
            return False
    return True


def adopt_state(param: Tensor, saved: Mapping, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """``fresh`` state of ``param``, filled with what ``saved`` has of it."""
    if "exp_avg" not in saved:
        raise ValueError(
            f"the saved state has {sorted(saved)} but no 'exp_avg': it is not a Lion's (nor an Adam's). "
            "Start with fresh optimizer state instead."
        )
    if saved.get(AVERAGE) is not None and AVERAGE not in fresh:
        warn_of_lost_average()
    for key, target in fresh.items():
        if saved.get(key) is None:
            continue
        value = _local_part(key, torch.as_tensor(saved[key]), target, param)  # other Lions count steps in an int
        if key == "main_param":
            value = main_param_as(target.dtype, value, param)
        if key == "exp_avg" and value.dtype != target.dtype:
            warnings.warn(
                f"lion_dist: the loaded exp_avg is {value.dtype}; it is kept as {target.dtype}, the configured "
                "momentum dtype.",
                stacklevel=4,
            )
        local_tensor(target).copy_(value)
    return fresh


def warn_of_lost_average() -> None:
    warnings.warn(
        "lion_dist: the loaded state has an average of the weights, which is left out: this optimizer keeps none. "
        "Construct it with ema_decay to go on with it.",
        stacklevel=5,
    )


def _local_part(key: str, value: Tensor, target: Tensor, param: Tensor) -> Tensor:
    """Return what belongs of a saved ``value`` to the local ``target``."""
    if isinstance(value, BoxedTensor):
        raise NotImplementedError(f"load_state_dict of {key} {IS_NO_OPERAND}")
    local = part_of(value, target)
    if local is None:
        raise ValueError(
            f"saved {key} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}{_placed(value)}"
            f"{_placed(target)}. Load the state of this model, or delete optimizer.state[param] to begin anew; between "
            "models that are sharded differently, state moves by torch.distributed.checkpoint's "
            "get_optimizer_state_dict() and set_optimizer_state_dict()."
        )
    return local


def _placed(tensor: Tensor) -> str:
    shard = LocalShard.of(tensor)
    return f" ({shard.placements} on {shard.mesh})" if shard.is_dtensor else ""


# ---- both, while torch loads a file


@contextlib.contextmanager
def adopting(optimizer: Lion, decoupled_from: float | None) -> Iterator[None]:
    """A context in which torch's ``Optimizer.load_state_dict`` of ``optimizer`` loads whatever wrote the file.

    torch is given the param groups alone: it would cast the state to the parameters' dtype.
    """
    states: dict[Tensor, dict] = {}
    window: Tensor | None = None

    def adopt(_optimizer, state_dict: dict) -> dict:  # after a user's own hooks, which may have changed it
        nonlocal window
        groups = adopt_groups(state_dict["param_groups"], optimizer.param_groups, optimizer.defaults, decoupled_from)
        saved_ids = [i for group in groups for i in group["params"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        saved = state_dict["state"]
        pairs = zip(saved_ids, params, strict=False)  # torch says so when there are more or fewer
        states.update({param: optimizer.adopt_state(param, saved[i]) for i, param in pairs if i in saved})
        window = optimizer.saved_window(state_dict)
        return {**state_dict, "state": {}, "param_groups": groups}

    def take_over(_optimizer) -> None:  # before a user's own hooks, which may look at it
        optimizer.take_over(states, window)

    hooks = [
        optimizer.register_load_state_dict_pre_hook(adopt),
        optimizer.register_load_state_dict_post_hook(take_over, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
