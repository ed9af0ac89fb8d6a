"""Loss scaling: lion_dist.GradScaler with ShardedLion, and torch's refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import GradScaler, Lion, ShardedLion, ShardingConfig
from tests.models import GivenGradients, make_batch, make_model
from tests.oracle import assert_same_on_all_ranks, assert_same_params

LR = 2**-7


def scaler_of(init_scale: float = 256.0, growth_interval: int = 2) -> GradScaler:
    return GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)


def grow_and_back_off(unscale: bool, dtype: torch.dtype) -> list[float]:
    """Steps 0 and 1 are fine (the scale doubles), 2 overflows on the last rank (it halves), 3 and 4 are fine again."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = GivenGradients((70,), (3,), dtype=dtype)
    opt = ShardedLion(model.parameters(), lr=LR, sharding=ShardingConfig(bucket_numel=64))
    scaler = scaler_of()
    scales, params = [], []
    for step in range(5):
        loss = model.loss([torch.ones_like(p) / 8 for p in model.weights])
        if step == 2 and rank == world_size - 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(opt)
            norm = opt.clip_grad_norm_(1e9)
            if step != 2:
                assert norm.item() == pytest.approx(73**0.5 / 8)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        params.append(model.weights[0].detach().clone())
    assert torch.equal(params[2], params[1]) and not torch.equal(params[3], params[2])
    assert (opt.taken_steps(), opt.skipped_steps()) == (4, 1)
    assert_same_on_all_ranks(model)
    return scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("world_size", [1, 4])
def test_scale_grows_and_backs_off_alike_on_all_ranks(gloo, world_size, unscale, dtype):
    assert gloo.run(world_size, grow_and_back_off, unscale, dtype) == [[256.0, 512.0, 256.0, 256.0, 512.0]] * world_size


def train_scaled_and_unscaled(unscale: bool) -> None:
    """A scale that is a power of two changes no bit of an fp32 model's training."""
    rank = dist.get_rank()
    model = make_model()
    plain_model = copy.deepcopy(model)
    opt = ShardedLion(model.parameters(), lr=2e-3, module=model)
    plain = ShardedLion(plain_model.parameters(), lr=2e-3, module=plain_model)
    scaler = scaler_of(1024.0)
    for step in range(5):
        batch = make_batch(step, 0, rank)
        scaler.scale(batch.loss(model)).backward()
        if unscale:
            scaler.unscale_(opt)
            clipped = opt.clip_grad_norm_(0.3)
        scaler.step(opt)
        scaler.update()
        batch.loss(plain_model).backward()
        if unscale:
            assert torch.equal(clipped, plain.clip_grad_norm_(0.3))
        plain.step()
    opt.finish_param_sync(), plain.finish_param_sync()
    assert_same_params(model, plain_model)


@pytest.mark.parametrize("unscale", [False, True])
def test_loss_scale_cancels_out(gloo, unscale):
    gloo.run(2, train_scaled_and_unscaled, unscale)


def use_torchs_scaler(unscale: bool) -> None:
    model = GivenGradients((70,))
    before = model.weights[0].detach().clone()
    opt = ShardedLion(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model.loss([torch.ones(70)])).backward()
    if unscale:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="Use\\s+lion_dist.GradScaler"):
        scaler.step(opt)
    assert torch.equal(model.weights[0], before)
    opt.step()  # without a scaler, as if nothing had been: its gradients are still there
    assert not torch.equal(model.weights[0], before)


@pytest.mark.parametrize("unscale", [False, True])
def test_torchs_scaler_is_refused(gloo, unscale):
    gloo.run(2, use_torchs_scaler, unscale)


def scale_two_optimizers() -> None:
    """One scaler for a ShardedLion and a plain optimizer: only the one whose gradients overflow is skipped."""
    model, head = GivenGradients((70,)), nn.Linear(2, 1)
    opt, plain = ShardedLion(model.parameters(), lr=LR), torch.optim.SGD(head.parameters(), lr=0.1)
    scaler = scaler_of(4.0)
    before, head_before = model.weights[0].detach().clone(), head.weight.detach().clone()
    loss = model.loss([torch.full((70,), float("inf"))]) + head(torch.ones(1, 2)).sum()
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.step(plain)
    scaler.update()
    assert torch.equal(model.weights[0], before) and torch.allclose(head.weight, head_before - 0.1)
    assert scaler.get_scale() == 2.0


def test_scaler_serves_other_optimizers_too(gloo):
    gloo.run(2, scale_two_optimizers)


def accumulate_scaled() -> None:
    model = GivenGradients((64,))
    opt = ShardedLion(model.parameters(), lr=LR)
    scaler = scaler_of(8.0)
    for _ in range(3):
        scaler.scale(model.loss([torch.ones(64)])).backward()
    scaler.unscale_(opt)
    assert opt.grad_norm().item() == 24.0
    scaler.step(opt)
    scaler.update()
    model.loss([torch.ones(64)]).backward()  # without the scaler: nothing of it is left
    assert opt.grad_norm().item() == 8.0
    opt.step()


def test_scaled_micro_batches_add_up(gloo):
    gloo.run(2, accumulate_scaled)


def disable_the_scaler() -> None:
    model = GivenGradients((64,))
    before = model.weights[0].detach().clone()
    opt = ShardedLion(model.parameters(), lr=LR)
    scaler = GradScaler("cpu", enabled=False)
    scaler.scale(model.loss([torch.ones(64)])).backward()
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    assert torch.equal(model.weights[0], before - LR)


def test_disabled_scaler(gloo):
    gloo.run(2, disable_the_scaler)


def test_scaler_is_torchs_own_for_lion():
    """Lion takes either scaler; both give the same."""
    results = []
    for scaler in (scaler_of(), torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)):
        param = nn.Parameter(torch.linspace(-1, 1, 9))
        opt = Lion([param], lr=LR)
        for _ in range(3):
            scaler.scale((param * torch.arange(9.0)).sum()).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        results.append((param.detach(), scaler.get_scale()))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1] == 512.0
