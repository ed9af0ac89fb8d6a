"""torch's own get_ and set_optimizer_state_dict with full_state_dict=True: between FSDP2, FSDP1 and plain ``Lion``."""

import copy

import pytest
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lion_dist import Lion
from tests.integrations.fsdp_ranks import POLICIES, SETTINGS, Net, inputs, mesh_of, shard
from tests.integrations.test_fsdp1 import assert_same, wrap

WHOLE = StateDictOptions(full_state_dict=True)
ENGINES = {
    "plain": lambda model: model,
    "FSDP2": lambda model: shard(model, mesh_of(shard=2)),
    "FSDP1": lambda model: wrap(model, use_orig_params=True),
    "FSDP1, flat": lambda model: wrap(model, use_orig_params=False),
}


def make(engine: str, policy: str) -> tuple[nn.Module, Lion]:
    dtype, precision = POLICIES[policy]
    model = ENGINES[engine](Net(dtype))
    return model, Lion(model.parameters(), **SETTINGS, precision=precision)


def whole_state(model: nn.Module, opt: Lion) -> dict:
    state = {"model": get_model_state_dict(model, options=WHOLE)}
    return copy.deepcopy(state | {"opt": get_optimizer_state_dict(model, opt, options=WHOLE)})


def move(source: str, target: str, policy: str) -> None:
    model, opt = make(source, policy)
    for step in range(3):
        opt.zero_grad()
        model(inputs(step, rank=0, dtype=POLICIES[policy][0])).backward()
        opt.step()
    state = whole_state(model, opt)
    other, other_opt = make(target, policy)
    set_model_state_dict(other, copy.deepcopy(state["model"]), options=WHOLE)
    set_optimizer_state_dict(other, other_opt, copy.deepcopy(state["opt"]), options=WHOLE)
    assert_same(whole_state(other, other_opt), state)
    assert any(kinds["exp_avg"].any() for kinds in state["opt"]["state"].values())


@pytest.mark.parametrize("policy", ["fp32, bf16 momentum", "split"])
@pytest.mark.parametrize(
    ("source", "target"),
    [("FSDP2", "FSDP2"), ("FSDP2", "plain"), ("plain", "FSDP2"), ("FSDP2", "FSDP1"), ("FSDP1", "FSDP2")]
    + [("FSDP1", "plain"), ("plain", "FSDP1"), ("FSDP1, flat", "plain"), ("FSDP1, flat", "FSDP2")],
)
def test_whole_state_moves(gloo, source, target, policy):
    gloo.run(2, move, source, target, policy)
