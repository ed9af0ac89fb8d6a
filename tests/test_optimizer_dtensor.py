"""``Lion`` over DTensor shards: FSDP2 and tensor parallel, against plain Lion on the full gradient."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lion_dist import Lion, PrecisionPolicy
from lion_dist.local_shard import local_tensor
from tests.models import mlp

BF16, FP32 = torch.bfloat16, torch.float32
SETTINGS = dict(lr=2e-3, weight_decay=0.1)
WIDTHS = (8, 5, 8, 3)  # rows that two ranks do not share evenly, and that leave the third of three without any


def full(param: Tensor) -> Tensor:
    return param.full_tensor() if isinstance(param, DTensor) else param.detach()


def assert_same_full_params(model: nn.Module, expected: nn.Module) -> None:
    for (name, param), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(full(param), theirs), name


def train_fully_sharded(dtype: torch.dtype, policy: PrecisionPolicy, widths: tuple[int, ...]) -> None:
    """Every rank has the same batch: the averaged gradient is exactly the full one."""
    model = mlp(*widths).to(dtype)
    expected = copy.deepcopy(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    opt = Lion(model.parameters(), precision=policy, **SETTINGS)
    plain = Lion(expected.parameters(), precision=policy, **SETTINGS)
    for step in range(4):
        x = torch.randn(4, widths[0], generator=torch.Generator().manual_seed(step)).to(dtype)
        for m, o in ((model, opt), (expected, plain)):
            o.zero_grad()
            m(x).float().square().mean().backward()
            o.step()
    assert_same_full_params(model, expected)
    for param, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        exp_avg = opt.state[param]["exp_avg"]
        assert isinstance(exp_avg, DTensor) and exp_avg.placements == param.placements
        assert torch.equal(full(exp_avg), plain.state[theirs]["exp_avg"])


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        (FP32, PrecisionPolicy()),
        (FP32, PrecisionPolicy(momentum_dtype=BF16, momentum_rounding="stochastic")),
        (BF16, PrecisionPolicy("split")),
        (BF16, PrecisionPolicy("fp32")),
        (BF16, PrecisionPolicy("none", BF16, "stochastic", seed=5)),
    ],
    ids=["fp32", "momentum16-stochastic", "split", "fp32-main", "none-stochastic"],
)
def test_fsdp2_equals_plain_lion_on_two_ranks(gloo, dtype, policy):
    """Also the bits of stochastic rounding: the global element index does not know of shards on dim 0."""
    gloo.run(2, train_fully_sharded, dtype, policy, WIDTHS)


@pytest.mark.parametrize("policy", [PrecisionPolicy(), PrecisionPolicy("none")], ids=["split", "none"])
def test_fsdp2_with_ranks_that_own_nothing_of_a_parameter(gloo, policy):
    gloo.run(4, train_fully_sharded, BF16 if policy.main_params == "none" else FP32, policy, (4, 2, 4, 1))


def train_on_a_mesh_of_replicas() -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = mlp(*WIDTHS)
    expected = copy.deepcopy(model)
    fully_shard(model, mesh=mesh)
    opt, plain = Lion(model.parameters(), **SETTINGS), Lion(expected.parameters(), **SETTINGS)
    for step in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        for m, o in ((model, opt), (expected, plain)):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    assert_same_full_params(model, expected)


def test_hybrid_sharding(gloo):
    gloo.run(4, train_on_a_mesh_of_replicas)


def train_with_placements(dim: int) -> None:
    """Tensor parallel: one parameter split along ``dim``, one replicated, and gradients that say so."""
    mesh = dist.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    values = [torch.randn(6, 4), torch.randn(5)]
    placements = [[Shard(dim)], [Replicate()]]
    params = [
        nn.Parameter(distribute_tensor(value, mesh, place)) for value, place in zip(values, placements, strict=True)
    ]
    expected = [nn.Parameter(value.clone()) for value in values]
    opt, plain = Lion(params, **SETTINGS), Lion(expected, **SETTINGS)
    for _ in range(3):
        for param, theirs, place in zip(params, expected, placements, strict=True):
            theirs.grad = torch.randn(theirs.shape)
            param.grad = distribute_tensor(theirs.grad, mesh, place)
        opt.step(), plain.step()
    for param, theirs in zip(params, expected, strict=True):
        assert torch.equal(full(param), theirs)


@pytest.mark.parametrize("dim", [0, 1])
def test_tensor_parallel_placements(gloo, dim):
    gloo.run(2, train_with_placements, dim)


class RefuseDTensors(TorchDispatchMode):
    """Overriding ``DTensor.__torch_dispatch__`` would see nothing: torch 2.13 dispatches from C++."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(issubclass(kind, DTensor) for kind in types), f"DTensor was asked to dispatch {func}"
        return func(*args, **(kwargs or {}))


def dispatch_nothing(policy: PrecisionPolicy) -> None:
    """The step asks DTensor for no operation: rules for foreach ops are missing in some versions of torch."""
    model = mlp(*WIDTHS).bfloat16()
    fully_shard(model)
    opt = Lion(model.parameters(), precision=policy, **SETTINGS)
    for step in range(3):
        model(torch.ones(1, 8).bfloat16()).float().square().mean().backward()
        with RefuseDTensors() if step else nullcontext():  # the first creates the state
            opt.step()
    with pytest.raises(AssertionError, match="aten.add"), RefuseDTensors():
        next(model.parameters()) + 1


@pytest.mark.parametrize("main_params", ["split", "fp32", "none"])
def test_step_asks_dtensor_for_no_operation(gloo, main_params):
    gloo.run(2, dispatch_nothing, PrecisionPolicy(main_params, momentum_rounding="stochastic"))


def save_and_load_through_dcp(policy: PrecisionPolicy) -> None:
    """get_optimizer_state_dict, which on a fresh optimizer runs a step with lr 0, and back."""
    model = mlp(*WIDTHS).to(BF16)
    fully_shard(model)
    opt = Lion(model.parameters(), precision=policy, **SETTINGS)
    before = [full(p).clone() for p in model.parameters()]
    get_optimizer_state_dict(model, opt)
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(full(param), value), "making the state changed a parameter"
    assert opt.param_groups[0]["lr"] == SETTINGS["lr"]

    twin = copy.deepcopy(mlp(*WIDTHS).to(BF16))
    fully_shard(twin)
    twin_opt = Lion(twin.parameters(), precision=policy, **SETTINGS)

    def train(m: nn.Module, o: Lion, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
            o.zero_grad()
            m(x).float().square().mean().backward()
            o.step()

    train(model, opt, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            mine._local_tensor.copy_(theirs._local_tensor)
    set_optimizer_state_dict(twin, twin_opt, saved)
    train(model, opt, range(3, 6)), train(twin, twin_opt, range(3, 6))
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(full(mine), full(theirs))
        for key, value in twin_opt.state[mine].items():
            assert value.dtype == opt.state[theirs][key].dtype
            assert torch.equal(local_tensor(value), local_tensor(opt.state[theirs][key])), key


@pytest.mark.parametrize("main_params", ["split", "fp32", "none"])
def test_state_dict_through_torch_distributed_checkpoint(gloo, main_params):
    gloo.run(2, save_and_load_through_dcp, PrecisionPolicy(main_params, momentum_rounding="stochastic"))
