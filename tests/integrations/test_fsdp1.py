"""FSDP1 (FullyShardedDataParallel): equal to plain ``Lion`` fed the gradients it reduced; saves and loads by itself."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    MixedPrecision,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lion_dist import GradScaler, Lion, PrecisionPolicy
from tests.integrations.fsdp_ranks import BF16, FP32, POLICIES, SETTINGS, Block, Net, NetWithSpares, inputs

orig_params = pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat", "original"])
FULL = StateDictType.FULL_STATE_DICT
# Offloading would give every state the last one's values: on CPUs, .cpu() copies nothing (torch 2.13).
ON_DEVICE = FullStateDictConfig(offload_to_cpu=False), FullOptimStateDictConfig(offload_to_cpu=False)


def wrap(model: nn.Module, use_orig_params: bool, **options) -> FSDP:
    return FSDP(
        model,
        auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, Block),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
        **options,
    )


def train_step(model: FSDP, opt: Lion, step: int, dtype: torch.dtype) -> None:
    opt.zero_grad()
    model(inputs(step, dtype=dtype)).backward()
    opt.step()


# ---- training


VARIANTS = {
    "bf16 forward, fp32 sums": dict(mixed_precision=MixedPrecision(param_dtype=BF16, reduce_dtype=FP32)),
    "parameters whole between forward and backward": dict(sharding_strategy=ShardingStrategy.SHARD_GRAD_OP),
    "not sharded": dict(sharding_strategy=ShardingStrategy.NO_SHARD),
}


def equals_plain(policy: str, use_orig_params: bool, variant: str = "", micro_batches: int = 1) -> int:
    """The gradients that FSDP1 reduced lie in the flat parameters; a plain Lion gets copies of both."""
    dtype, precision = POLICIES[policy]
    model = wrap(Net(dtype), use_orig_params, **VARIANTS.get(variant, {}))
    settings = SETTINGS | {"precision": precision}
    opt = Lion(model.parameters(), **settings)
    params = [p for group in opt.param_groups for p in group["params"] if p.numel()]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    plain = Lion(twins, **settings)
    losses = []
    for step in range(6):
        opt.zero_grad()
        for micro_batch in range(micro_batches):
            with nullcontext() if micro_batch == micro_batches - 1 else model.no_sync():
                loss = model(inputs(step % 2, micro_batch=micro_batch, dtype=dtype))
                loss.backward()
        model.clip_grad_norm_(0.5)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.clone()
        opt.step(), plain.step()
        losses.append(loss.item())
        for param, twin in zip(params, twins, strict=True):
            assert torch.equal(param, twin)
            for key, value in plain.state[twin].items():
                assert opt.state[param][key].dtype == value.dtype
                assert torch.equal(opt.state[param][key], value), key
    assert losses[4] < losses[0] and losses[5] < losses[1]
    return sum(p.numel() for p in params)


@orig_params
@pytest.mark.parametrize("policy", POLICIES)
def test_steps_equal_plain_lion_fed_the_reduced_gradients(gloo, policy, use_orig_params):
    numels = gloo.run(2, equals_plain, policy, use_orig_params)
    assert sum(numels) >= sum(p.numel() for p in Net().parameters()) and min(numels) > 0


@orig_params
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(gloo, variant, use_orig_params):
    gloo.run(2, equals_plain, "fp32", use_orig_params, variant)


@orig_params
def test_gradients_of_micro_batches_add_up(gloo, use_orig_params):
    gloo.run(2, equals_plain, "split", use_orig_params, "", 2)


def train_with_spares() -> None:
    model = wrap(NetWithSpares(), use_orig_params=True)

    def spares() -> dict[str, torch.Tensor]:
        with FSDP.summon_full_params(model, writeback=False):
            return {
                name: param.detach().clone()
                for layer in ("unused", "frozen")
                for name, param in model.get_submodule(layer).named_parameters(prefix=layer)
            }

    before = spares()
    opt = Lion(model.parameters(), lr=0.1, weight_decay=0.1)
    model(inputs(0)).backward()
    opt.step()
    for name, now in spares().items():
        assert torch.equal(now, before[name] * (1 - 0.01 if name.startswith("unused") else 1)), name


def test_unused_parameters_only_decay_and_frozen_ones_stay(gloo):
    """FSDP1 gives zero gradients to what is unused."""
    gloo.run(2, train_with_spares)


def overflow_on_one_rank(kind: type, use_orig_params: bool) -> tuple[bool, float]:
    """Returns whether this rank's parameters moved, and the scale afterwards."""
    model, opt = make("fp32", use_orig_params)
    scaler = kind("cpu", init_scale=4.0)
    scaler.scale(model(inputs(0))).backward()
    params = [p for p in model.parameters() if p.grad is not None and p.numel()]
    if dist.get_rank() == 1:
        params[0].grad[0] = torch.inf
    before = [p.detach().clone() for p in params]
    scaler.step(opt)
    scaler.update()
    return any(not torch.equal(p, old) for p, old in zip(params, before, strict=True)), scaler.get_scale()


@orig_params
@pytest.mark.parametrize("kind", [ShardedGradScaler, GradScaler], ids=["FSDP1's", "lion_dist's"])
def test_overflow_on_one_rank_skips_the_step_on_all(gloo, kind, use_orig_params):
    assert gloo.run(2, overflow_on_one_rank, kind, use_orig_params) == 2 * [(False, 2.0)]


# ---- FSDP.optim_state_dict


def saved(model: FSDP, opt: Lion) -> dict:
    with FSDP.state_dict_type(model, FULL, *ON_DEVICE):
        return copy.deepcopy({"model": model.state_dict(), "opt": FSDP.optim_state_dict(model, opt)})


def load(model: FSDP, opt: Lion, state: dict) -> None:
    with FSDP.state_dict_type(model, FULL, *ON_DEVICE), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a momentum in another dtype
        model.load_state_dict(state["model"])
        opt.load_state_dict(FSDP.optim_state_dict_to_load(model, opt, state["opt"]))


def make(policy: str, use_orig_params: bool, seed: int = 0) -> tuple[FSDP, Lion]:
    dtype, precision = POLICIES[policy]
    model = Net(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(seed)
    model = wrap(model, use_orig_params)
    return model, Lion(model.parameters(), **SETTINGS, precision=precision)


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, dict):
            assert_same(value, right[key])
        elif isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype, key
            assert torch.equal(bits(value), bits(right[key])), key


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.view(torch.int16) if value.dtype == BF16 else value


def train_and_save(policy: str, use_orig_params: bool):
    model, opt = make(policy, use_orig_params)
    for step in range(3):
        train_step(model, opt, step, POLICIES[policy][0])
    return saved(model, opt)


STATE_KEYS = {  # and dtypes, as FSDP1 moves them
    "fp32": {"exp_avg": FP32},
    "fp32, bf16 momentum": {"exp_avg": BF16},
    "split": {"exp_avg": BF16, "main_param": BF16},
    "split, fp32 momentum": {"exp_avg": FP32, "main_param": FP32},
    "fp32 main": {"exp_avg": BF16, "main_param": BF16},
    "none, stochastic": {"exp_avg": BF16, "step": torch.int64},
}


def save_and_go_on(policy: str, use_orig_params: bool):
    """Saved by one, loaded by another; both go on alike."""
    model, opt = make(policy, use_orig_params)
    dtype = POLICIES[policy][0]
    for step in range(3):
        train_step(model, opt, step, dtype)
    state = saved(model, opt)
    kinds = {key: value.dtype for key, value in state["opt"]["state"]["head.weight"].items()}
    assert kinds == STATE_KEYS[policy]
    twin, twin_opt = make(policy, use_orig_params, seed=1)
    load(twin, twin_opt, state)
    assert_same(saved(twin, twin_opt), state)
    for step in range(3, 6):
        train_step(model, opt, step, dtype), train_step(twin, twin_opt, step, dtype)
    assert_same(saved(twin, twin_opt), saved(model, opt))


@orig_params
@pytest.mark.parametrize("policy", POLICIES)
def test_saved_state_goes_on_bit_identically(gloo, policy, use_orig_params):
    gloo.run(2, save_and_go_on, policy, use_orig_params)


def load_and_save(policy: str, use_orig_params: bool, state: dict) -> dict:
    model, opt = make(policy, use_orig_params, seed=1)
    load(model, opt, state)
    return saved(model, opt)


@orig_params
@pytest.mark.parametrize("policy", POLICIES)
def test_saved_state_loads_on_other_ranks_and_back(gloo, policy, use_orig_params):
    """2 -> 4 -> 2 ranks: every bit of parameters, momentum, main params and step counts."""
    state, _ = gloo.run(2, train_and_save, policy, use_orig_params)
    by_four = gloo.run(4, load_and_save, policy, use_orig_params, state)[0]
    assert_same(by_four, state)
    assert_same(gloo.run(2, load_and_save, policy, use_orig_params, by_four)[0], state)


def refuses_fp16_with_bf16_momentum() -> None:
    model = wrap(Net(torch.float16), use_orig_params=True)
    opt = Lion(model.parameters(), precision=PrecisionPolicy(momentum_dtype=BF16))
    model(inputs(0, dtype=torch.float16)).backward()
    opt.step()
    with pytest.raises(TypeError, match="one dtype a parameter.*Keep momentum_dtype=torch.float32"):
        FSDP.optim_state_dict(model, opt)


def test_state_of_two_dtypes_is_refused(gloo):
    gloo.run(2, refuses_fp16_with_bf16_momentum)
