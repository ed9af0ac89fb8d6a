"""The recipes of docs/fsdp.md under FSDP2: each trains as plain ``Lion`` fed the gradients that FSDP2 reduced."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lion_dist import GradScaler, Lion
from lion_dist.cpu_backend import eager, native
from tests.integrations.fsdp_ranks import (
    BF16,
    FP32,
    POLICIES,
    SETTINGS,
    Net,
    NetWithSpares,
    Twin,
    full,
    inputs,
    mesh_of,
    shard,
    train,
)


def make(
    policy: str = "fp32", axes: dict[str, int] | None = None, blocks: int = 2, **options
) -> tuple[Net, Lion, Twin]:
    dtype, precision = POLICIES[policy]
    settings = SETTINGS | {"precision": precision}
    model = Net(dtype, blocks)
    twin = Twin(model, **settings)
    axes = axes or {"shard": dist.get_world_size()}
    shard(model, mesh_of(**axes), tensor_parallel="tensor" in axes, **options)
    return model, Lion(model.parameters(), **settings), twin


# ---- precision and placement


def train_with(policy: str, options: dict) -> None:
    model, opt, twin = make(policy, **options)
    train(model, opt, twin)
    twin.assert_equal(model, opt)
    assert {p.dtype for p in model.parameters()} == {POLICIES[policy][0]}


@pytest.mark.parametrize("policy", ["fp32", "split"])
def test_mixed_precision_policy(gloo, policy):
    """fp32 shards under a bf16 forward, and bf16 shards with fp32 sums of their gradients."""
    gloo.run(2, train_with, policy, {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)})


@pytest.mark.parametrize("policy", ["fp32", "split"])
def test_cpu_offload_policy(gloo, policy):
    """Pinned memory needs an accelerator; test_fsdp_gpu.py has it."""
    gloo.run(2, train_with, policy, {"offload_policy": CPUOffloadPolicy(pin_memory=False)})


def train_by_triton(policy: str) -> None:
    model, opt, twin = make(policy, blocks=1)  # a tensor takes the interpreter 10 ms, of whatever size
    opt.use_triton, twin.opt.use_triton = True, False
    train(model, opt, twin)
    twin.assert_equal(model, opt)


@pytest.mark.parametrize("policy", POLICIES)
def test_triton_kernel_on_uneven_and_empty_shards(gloo, policy):
    """In Triton's interpreter."""
    pytest.importorskip("triton")
    gloo.run(4, train_by_triton, policy)


def train_compiled() -> None:
    model, opt, twin = make("split")
    for block in model.blocks:
        block.compile(backend="aot_eager")
    train(model, opt, twin)
    twin.assert_equal(model, opt)


def test_compiled_blocks(gloo):
    gloo.run(2, train_compiled)


# ---- around the step


def accumulate(policy: str, sync_every_micro_batch: bool) -> None:
    model, opt, twin = make(policy)
    for step in range(3):
        opt.zero_grad()
        for micro_batch in range(3):
            model.set_requires_gradient_sync(sync_every_micro_batch or micro_batch == 2)
            loss = model(inputs(step, micro_batch=micro_batch, dtype=POLICIES[policy][0])) / 3
            loss.backward()
        twin.step(model)
        opt.step()
    twin.assert_equal(model, opt)


@pytest.mark.parametrize("policy", ["fp32", "split"])
@pytest.mark.parametrize("sync_every_micro_batch", [False, True])
def test_gradients_of_micro_batches_add_up(gloo, policy, sync_every_micro_batch):
    gloo.run(2, accumulate, policy, sync_every_micro_batch)


def clip(axes: dict[str, int]) -> None:
    model, opt, twin = make("fp32", axes)
    norms = []

    def clip_and_compare() -> None:
        whole = math.sqrt(sum(full(p.grad).double().square().sum().item() for p in model.parameters()))
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor().item())
        assert norms[-1] == pytest.approx(whole, rel=1e-6)
        whole = math.sqrt(sum(full(p.grad).double().square().sum().item() for p in model.parameters()))
        assert whole == pytest.approx(0.5, rel=1e-5)

    train(model, opt, twin, before_step=clip_and_compare)
    twin.assert_equal(model, opt)
    assert min(norms) > 0.5


@pytest.mark.parametrize("axes", [dict(shard=2), dict(replicate=2, shard=2), dict(shard=2, tensor=2)], ids=str)
def test_clip_grad_norm_(gloo, axes):
    gloo.run(math.prod(axes.values()), clip, axes)


def holds_last_shard(param: DTensor) -> bool:
    """Replicas of it included: reduced gradients are alike on them."""
    mesh = param.device_mesh
    places = zip(param.placements, mesh.get_coordinate(), mesh.shape, strict=True)
    return all(place.is_replicate() or at == size - 1 for place, at, size in places) and param.to_local().numel() > 0


def overflow_anywhere(kind: type, axes: dict[str, int]) -> list[tuple[bool, float]]:
    """An overflow in the last shard of one parameter after the other: whether anything moved, and the scale after."""
    model, opt, _ = make("fp32", axes)
    scaler = kind("cpu", init_scale=2.0**20)
    scaler.scale(model(inputs(0))).backward()
    grads = [p.grad.to_local().clone() for p in model.parameters()]
    found = []
    for param in model.parameters():
        for each, grad in zip(model.parameters(), grads, strict=True):
            each.grad.to_local().copy_(grad)
        if holds_last_shard(param):
            param.grad.to_local().view(-1)[0] = torch.inf
        before = [p.to_local().clone() for p in model.parameters()]
        scaler.step(opt)
        scaler.update()
        moved = any(not torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
        found.append((moved, scaler.get_scale()))
    return found


SCALERS = [
    (torch.amp.GradScaler, dict(shard=2)),
    (torch.amp.GradScaler, dict(replicate=2, shard=2)),
    (GradScaler, dict(shard=2)),
    (GradScaler, dict(replicate=2, shard=2)),
    (GradScaler, dict(shard=2, tensor=2)),
    (GradScaler, dict(replicate=1, shard=2, tensor=2)),
]


@pytest.mark.parametrize(("kind", "axes"), SCALERS, ids=lambda value: getattr(value, "__module__", str(value)))
def test_overflow_on_one_rank_skips_the_step_on_all(gloo, kind, axes):
    """torch's own is not among them for tensor parallel."""
    by_rank = gloo.run(math.prod(axes.values()), overflow_anywhere, kind, axes)
    assert by_rank == len(by_rank) * [by_rank[0]]
    assert by_rank[0] == [(False, 2.0 ** (19 - i)) for i in range(14)]


def refuses_torchs_scaler() -> None:
    with pytest.raises(RuntimeError, match="ranks would skip different steps. Use lion_dist.GradScaler"):
        overflow_anywhere(torch.amp.GradScaler, dict(shard=2, tensor=2))


def test_torchs_scaler_is_refused_where_ranks_would_disagree(gloo):
    """Over shards of tensor parallel it asks the ranks of the first gradient only (torch 2.11 and 2.13)."""
    gloo.run(4, refuses_torchs_scaler)


def scaled_equals_unscaled(unscale: bool) -> None:
    """A scale that is a power of two changes no bit."""
    model, opt, _ = make()
    other, other_opt, _ = make()
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        opt.zero_grad(), other_opt.zero_grad()
        scaler.scale(model(inputs(step))).backward()
        other(inputs(step)).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        other_opt.step()
    for param, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(param.to_local(), expected.to_local())


@pytest.mark.parametrize("unscale", [False, True])
def test_scaled_gradients_give_the_unscaled_step(gloo, unscale):
    gloo.run(2, scaled_equals_unscaled, unscale)


def train_with_spares() -> None:
    model = NetWithSpares()
    spares = [p.detach().clone() for p in (*model.unused.parameters(), *model.frozen.parameters())]
    shard(model, mesh_of(shard=2))
    opt = Lion(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(2):
        opt.zero_grad()
        model(inputs(step)).backward()
        opt.step()
    now = [full(p) for p in (*model.unused.parameters(), *model.frozen.parameters())]
    assert all(map(torch.equal, now, spares))
    assert len(opt.state) == len(list(model.parameters())) - len(spares)


def test_unused_and_frozen_parameters_stay_and_have_no_state(gloo):
    gloo.run(2, train_with_spares)


# ---- the optimizer within backward


def step_in_backward(model: nn.Module, **settings) -> dict[nn.Parameter, Lion]:
    """One ``Lion`` a parameter, which steps as soon as the gradient is reduced and lets go of it."""
    optimizers = {param: Lion([param], **settings) for param in model.parameters()}

    def step(param: nn.Parameter) -> None:
        optimizers[param].step()
        param.grad = None

    for param in optimizers:
        param.register_post_accumulate_grad_hook(step)
    return optimizers


def backward_steps(policy: str) -> None:
    model, opt, _ = make(policy)
    other, _, _ = make(policy)
    dtype, precision = POLICIES[policy]
    optimizers = step_in_backward(other, **SETTINGS, precision=precision)
    for step in range(4):
        opt.zero_grad()
        model(inputs(step, dtype=dtype)).backward()
        opt.step()
        other(inputs(step, dtype=dtype)).backward()
        assert all(p.grad is None for p in other.parameters())
    for param, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(param.to_local(), theirs.to_local())
        for key, value in opt.state[param].items():
            assert torch.equal(value.to_local(), optimizers[theirs].state[theirs][key].to_local())


@pytest.mark.parametrize("policy", ["fp32", "split"])
def test_optimizer_in_backward_equals_step_after_it(gloo, policy):
    gloo.run(2, backward_steps, policy)


# ---- what a step costs


def bytes_held(policy: str) -> tuple[int, int]:
    """(bytes of this rank's parameters and state, elements of its parameters)."""
    model, opt, twin = make(policy)
    train(model, opt, twin, steps=2)
    held = [p.to_local() for p in model.parameters()]
    held += [value.to_local() for state in opt.state.values() for value in state.values()]
    return sum(t.nbytes for t in held), sum(p.to_local().numel() for p in model.parameters())


@pytest.mark.parametrize(("policy", "expected"), [("split", 6), ("fp32", 8), ("fp32, bf16 momentum", 6)])
def test_bytes_per_parameter_are_those_of_its_shard(gloo, policy, expected):
    by_rank = gloo.run(2, bytes_held, policy)
    assert sum(numel for _, numel in by_rank) == sum(p.numel() for p in Net().parameters())
    assert all(held == expected * numel for held, numel in by_rank)


def count_launches(groups: int) -> list[int]:
    """Calls of the backend in each of three steps, of 14 tensors in so many param groups."""
    model, _, _ = make("split")
    params = list(model.parameters())
    opt = Lion([{"params": params[i::groups]} for i in range(groups)], **SETTINGS)
    calls, original = [], {backend: backend.update for backend in (eager, native)}
    for backend, update in original.items():
        backend.update = lambda *args, update=update, **kwargs: (calls.append(1), update(*args, **kwargs))
    try:
        counts = []
        for step in range(3):
            model(inputs(step, dtype=BF16)).backward()
            calls.clear()
            opt.step()
            counts.append(len(calls))
    finally:
        for backend, update in original.items():
            backend.update = update
    return counts


@pytest.mark.parametrize("groups", [1, 2])
def test_one_launch_per_group_whatever_the_number_of_tensors(gloo, groups):
    assert gloo.run(2, count_launches, groups) == 2 * [3 * [groups]]
