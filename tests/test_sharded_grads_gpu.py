"""Gradients that programs write, read, replace and interrupt, on GPUs: by NCCL, and by peer memory if there is some."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import ShardedLion, ShardingConfig
from tests.oracle import assert_same_params
from tests.test_sharded_gpu import on_all_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

Twin = tuple[nn.Module, ShardedLion]


def make(device: torch.device, peer_memory: bool | None) -> Twin:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(64, 64), nn.Tanh())]).to(device)
    sharding = ShardingConfig(bucket_numel=5000, peer_memory=peer_memory, ordered_sum=True)
    return model, ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=sharding)


def loss_of(model: nn.Module, step: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return model(torch.randn(8, 64, generator=generator).to(device)).square().mean()


def write_on_the_last_rank(device: torch.device, peer_memory: bool | None) -> None:
    (model, opt), (expected, other) = make(device, peer_memory), make(device, peer_memory)
    for step in range(5):
        loss = loss_of(model, step, device)
        if dist.get_rank() == dist.get_world_size() - 1:
            params = list(model.parameters())
            for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                param.grad = grad
        else:
            loss.backward()
        # Before the twin's backward: this rank's reductions start here, and ranks take the two optimizers in one order.
        norm = opt.clip_grad_norm_(0.1)
        opt.step()
        loss_of(expected, step, device).backward()
        assert torch.equal(norm, other.clip_grad_norm_(0.1))
        other.step()
    assert_same_params(model, expected)


def read_and_write_back(device: torch.device, peer_memory: bool | None) -> None:
    model, opt = make(device, peer_memory)
    loss_of(model, 0, device).backward()
    norm = opt.grad_norm()
    before = [bucket.finish_grad_sync().clone() for bucket in opt.buckets]
    grads = [opt.full_grad(param) for param in model.parameters()]
    assert torch.allclose(torch.cat([grad.flatten() for grad in grads]).norm().float(), norm)
    for param, grad in zip(model.parameters(), grads, strict=True):
        opt.set_full_grad(param, grad)
    assert all(torch.equal(b.finish_grad_sync(), value) for b, value in zip(opt.buckets, before, strict=True))
    assert torch.allclose(opt.grad_norm(), norm)
    opt.set_full_grad(model[0].weight, torch.zeros(64, 64, device=device))
    assert opt.grad_norm() < norm
    opt.step()


def see_gradients_in_hooks(device: torch.device, peer_memory: bool | None) -> None:
    model, opt = make(device, peer_memory)
    seen = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))
    loss_of(model, 0, device).backward()
    opt.step()
    assert seen == [True] * len(list(model.parameters()))


def run_out_of_memory(device: torch.device, peer_memory: bool | None) -> None:
    """On all ranks, when the second bucket is packed."""
    (model, opt), (expected, other) = make(device, peer_memory), make(device, peer_memory)
    pool = opt.buckets[0]._reduce_scatter.pool
    take, taken = pool.take, []

    def no_room():
        taken.append(None)
        if len(taken) == 2:
            raise torch.OutOfMemoryError("no room")
        return take()

    for step in range(4):
        if step % 2:
            pool.take = no_room
            taken.clear()
            with pytest.raises(torch.OutOfMemoryError):
                loss_of(model, 100 + step, device).backward()
            pool.take = take
            opt.zero_grad()
        for twin, its in ((model, opt), (expected, other)):
            loss_of(twin, step, device).backward()
            its.clip_grad_norm_(0.1)
            its.step()
    assert_same_params(model, expected)
    opt.check_replicas()


def run_backward_on_another_stream(device: torch.device, peer_memory: bool | None) -> None:
    (model, opt), (expected, other) = make(device, peer_memory), make(device, peer_memory)
    side = torch.cuda.Stream(device)
    for step in range(5):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss_of(model, step, device).backward()
        torch.cuda.current_stream().wait_stream(side)
        loss_of(expected, step, device).backward()
        opt.step(), other.step()
    assert_same_params(model, expected)


@pytest.mark.parametrize("peer_memory", [False, None], ids=["NCCL", "peer memory if there is some"])
@pytest.mark.parametrize(
    "situation",
    [
        write_on_the_last_rank,
        read_and_write_back,
        see_gradients_in_hooks,
        run_out_of_memory,
        run_backward_on_another_stream,
    ],
)
def test_gradients_are_the_programs_on_gpus_too(situation, peer_memory):
    on_all_gpus(situation, peer_memory)
