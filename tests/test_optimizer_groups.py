"""Param groups of ``Lion``: their keys, whatever was loaded, copied or added, and settings that cannot be a group's."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import lion_pytorch
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lion_dist import Lion
from lion_dist.adopted_state import FOREIGN_KEYS, GROUP_KEYS
from tests.models import mlp
from tests.test_optimizer import run


def fresh() -> tuple[nn.Module, Lion]:
    model = mlp(3, 2)
    return model, Lion(model.parameters(), lr=1e-3)


def trained() -> tuple[nn.Module, Lion]:
    model, opt = fresh()
    run(opt, range(2))
    return model, opt


def keys_of(opt: Lion) -> list[set]:
    return [set(group) - {"params"} for group in opt.param_groups]


def torch_optimizers() -> list[type]:
    found = [c for c in vars(torch.optim).values() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]
    return [c for c in found if c is not torch.optim.Optimizer]


@pytest.mark.parametrize("cls", torch_optimizers(), ids=lambda cls: cls.__name__)
def test_every_key_of_torchs_optimizers_is_known(cls):
    """A new release of torch may bring a new one: add it."""
    params = [nn.Parameter(torch.ones(3, 3))]
    theirs = set(cls(params, lr=1e-3).param_groups[0]) - {"params"}
    assert theirs <= FOREIGN_KEYS | set(GROUP_KEYS)


def load_of(cls, **settings):
    def load(opt: Lion) -> None:
        model = mlp(3, 2)
        other = cls(model.parameters(), lr=1e-3, **settings)
        other.load_state_dict(other.state_dict())
        run(other, range(1))
        opt.load_state_dict(other.state_dict())

    return load


def load_twice(opt: Lion) -> None:
    for _ in range(2):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))


WAYS = {
    "load-own": load_twice,
    "load-lion-pytorch": load_of(lion_pytorch.Lion),
    "load-adamw": load_of(torch.optim.AdamW, amsgrad=True, foreach=True),
    "load-adam-fused": load_of(torch.optim.Adam, fused=True, capturable=False),
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "deepcopy-and-load": lambda opt: load_twice(copy.deepcopy(opt)),
}


@pytest.mark.parametrize("way", WAYS)
def test_group_keys_are_those_of_a_fresh_optimizer(way):
    _, opt = trained()
    opt = WAYS[way](opt) or opt
    load_twice(opt)
    assert keys_of(opt) == [set(GROUP_KEYS)] and set(opt.defaults) == set(GROUP_KEYS)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert keys_of(opt) == [set(GROUP_KEYS)] * 2
    load_twice(opt)
    assert keys_of(opt) == [set(GROUP_KEYS)] * 2


def test_optimizer_that_an_earlier_version_pickled_loses_the_key():
    _, opt = trained()
    opt.defaults["differentiable"] = False
    opt = pickle.loads(pickle.dumps(opt))
    opt.load_state_dict(opt.state_dict())
    assert set(opt.defaults) == set(GROUP_KEYS) and keys_of(opt) == [set(GROUP_KEYS)]


def test_earlier_checkpoint_is_loaded_again_and_again(tmp_path):
    """torch.distributed.checkpoint takes its template from the optimizer, and refuses a file that lacks a key of it."""
    model, opt = trained()
    dcp.save({"optim": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    saved = opt.state[model[0].weight]["exp_avg"].clone()
    model, opt = fresh()
    for _ in range(3):
        template = {"optim": get_optimizer_state_dict(model, opt)}
        dcp.load(template, checkpoint_id=tmp_path)
        set_optimizer_state_dict(model, opt, template["optim"])
        assert torch.equal(opt.state[model[0].weight]["exp_avg"], saved)
        run(opt, range(3))


def test_keys_of_the_users_own_and_of_schedulers_are_kept():
    model = mlp(3, 2)
    opt = Lion([{"params": model.parameters(), "name": "decay", "foreach": True}], lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=9)
    run(opt, range(1))
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["note"] = "mine"
    keys = keys_of(opt)[0]
    assert {"initial_lr", "max_lr", "name"} <= keys
    opt.load_state_dict(saved)
    assert keys_of(opt) == [keys | {"note"}]
    del saved["param_groups"][0]["max_lr"], saved["param_groups"][0]["name"]
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["name"] == "decay" and "max_lr" in opt.param_groups[0]
    plain = Lion(mlp(3, 2).parameters())
    plain.load_state_dict(saved)
    assert plain.param_groups[0]["initial_lr"] == saved["param_groups"][0]["initial_lr"]


def test_key_that_a_file_lacks_is_taken_from_the_groups_own():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = Lion([{"params": [a], "weight_decay": 0.0}, {"params": [b]}], lr=1e-3, weight_decay=0.3)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["weight_decay"]
    opt.load_state_dict(saved)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.3]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"maximize": True}, "maximize=True, which is a setting of the whole optimizer"),
        ({"differentiable": True}, "differentiable=True, which Lion does not support"),
        ({"lr": -1.0}, "lr must be finite and at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"betas": (0.9, 1.5)}, "betas must be two numbers"),
        ({"cautious": True}, "cautious=True, which is a setting of the whole optimizer"),
        ({"skip_spikes": True}, "skip_spikes=True, which is a setting of the whole optimizer"),
        ({"precision": "fp32"}, "precision='fp32', which is a setting of the whole optimizer"),
    ],
)
def test_group_that_asks_for_what_is_not_done_is_refused_and_nothing_is_changed(settings, match):
    model, opt = trained()
    with pytest.raises(ValueError, match=match):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))], **settings})
    assert len(opt.param_groups) == 1
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(settings)
    saved["state"][0]["exp_avg"] += 1
    before = opt.state[model[0].weight]["exp_avg"].clone()
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(saved)
    assert torch.equal(opt.state[model[0].weight]["exp_avg"], before) and opt.param_groups[0]["lr"] == 1e-3
    with pytest.raises(ValueError, match=match):
        Lion([{"params": [nn.Parameter(torch.ones(3))], **settings}])


# ---- a user's hooks of load_state_dict()


def test_hook_before_loading_may_change_the_state():
    """As torch's documentation shows it: state found by the names of parameters."""
    names = ["0.weight", "0.bias"]
    model, opt = trained()
    other = mlp(3, 2)
    theirs = Lion([other[0].bias, other[0].weight], lr=1e-3)

    def by_name(_opt, state_dict: dict) -> dict:
        order = [names.index("0.bias"), names.index("0.weight")]
        return {**state_dict, "state": {i: state_dict["state"][j] for i, j in enumerate(order)}}

    theirs.register_load_state_dict_pre_hook(by_name)
    theirs.load_state_dict(opt.state_dict())
    assert torch.equal(theirs.state[other[0].weight]["exp_avg"], opt.state[model[0].weight]["exp_avg"])
    assert torch.equal(theirs.state[other[0].bias]["exp_avg"], opt.state[model[0].bias]["exp_avg"])


def test_hook_after_loading_sees_the_loaded_state():
    model, opt = trained()
    saved = copy.deepcopy(opt.state_dict())
    run(opt, range(2, 4))
    seen = []
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.state[model[0].weight]["exp_avg"].clone()))
    opt.load_state_dict(saved)
    assert torch.equal(seen[0], saved["state"][0]["exp_avg"])
    run(opt, range(2, 4))
    assert not torch.equal(opt.state[model[0].weight]["exp_avg"], seen[0])


def test_failed_load_leaves_no_hook_behind():
    _, opt = trained()
    saved = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict({**saved, "param_groups": []})
    run(opt, range(2, 3))
    opt.load_state_dict(torch.load(_saved(saved)))
    assert not opt._optimizer_load_state_dict_pre_hooks and not opt._optimizer_load_state_dict_post_hooks


def _saved(state_dict: dict) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return io.BytesIO(buffer.getvalue())
