"""On GPUs: several owners of collectives in one backward pass, and differences that the next step raises."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from lion_dist import ShardedLion, ShardingConfig
from lion_dist.guards.step_agreement import DisagreementError
from tests.models import GivenGradients, mlp
from tests.test_sharded_gpu import on_all_gpus
from tests.test_sharded_own_groups import SumOverRanks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
TRANSPORTS = pytest.mark.parametrize("peer_memory", [False, True])
NUMEL = 4096
WEIGHTS = 7


def make(device, peer_memory: bool) -> tuple[GivenGradients, ShardedLion]:
    model = GivenGradients(*[(NUMEL,)] * WEIGHTS).to(device)
    sharding = ShardingConfig(bucket_numel=NUMEL, average=False, peer_memory=peer_memory, wait_in_backward=False)
    return model, ShardedLion(model.parameters(), 2**-7, (0.0, 0.0), sharding=sharding)


def reduced(opt: ShardedLion) -> list[list[float]]:
    return [[x for piece in s.slices_of(s.exp_avg) for x in piece.unique().tolist()] for s in opt.shards]


def train_two_at_once(device, peer_memory: bool) -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    made = [make(device, peer_memory) for _ in range(2)]
    for _ in range(3):
        losses = []
        for i, (model, _) in enumerate(made):
            grads = [torch.full((NUMEL,), 100.0 * i + k + 1, device=device) for k in range(WEIGHTS)]
            if i == 1 and rank == last:
                grads[-1] = None
            losses.append(model.loss(grads))
        sum(losses).backward()
        for _, opt in made:
            opt.step()
    ranks = dist.get_world_size()
    sums = [ranks * (k + 1) for k in range(WEIGHTS)]
    assert reduced(made[0][1]) == [[s] for s in sums]
    assert reduced(made[1][1]) == [[s + 100 * ranks] for s in sums[:-1]] + [[(100 + WEIGHTS) * (ranks - 1)]]


@TRANSPORTS
def test_two_optimizers_in_one_backward_with_a_branch_that_some_ranks_use(peer_memory):
    on_all_gpus(train_two_at_once, peer_memory)


def train_with_a_collective_of_the_models(device, peer_memory: bool) -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, opt = make(device, peer_memory)
    for _ in range(3):
        grads = [torch.full((NUMEL,), float(k + 1), device=device) for k in range(WEIGHTS)]
        early, late = [*grads[:1], *[None] * (WEIGHTS - 1)], [None, *grads[1:]]
        if rank == last:
            late[-1] = None
        (SumOverRanks.apply(model.loss(early)) + model.loss(late)).backward()
        opt.step()
    ranks = dist.get_world_size()
    sums = [ranks * ranks, *(ranks * (k + 1) for k in range(1, WEIGHTS - 1)), (ranks - 1) * WEIGHTS]
    assert reduced(opt) == [[s] for s in sums]


@TRANSPORTS
def test_a_collective_of_the_model_in_backward_with_a_branch_that_some_ranks_use(peer_memory):
    on_all_gpus(train_with_a_collective_of_the_models, peer_memory)


def differ_in_a_step(device, change: str, in_backward: bool) -> None:
    model = mlp(8, 8, 8).to(device)
    on_device = torch.tensor(1e-3, device=device)
    sharding = ShardingConfig(update_in_backward=in_backward)
    opt = ShardedLion(model.parameters(), lr=on_device, module=model, sharding=sharding)

    def step() -> None:
        opt.zero_grad()
        model(torch.ones(2, 8, device=device)).square().sum().backward()
        opt.step()

    for _ in range(3):
        step()
    if dist.get_rank() == 1 and change == "lr":
        on_device.fill_(2e-3)
    elif dist.get_rank() == 1:
        opt.param_groups[0]["betas"] = (0.9, 0.95)
    step()
    name = {"lr": "lr of param group 0 is 0.002", "betas": "beta2 of param group 0 is 0.95 on rank 1"}[change]
    with pytest.raises(DisagreementError, match=name):
        step()


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("change", ["lr", "betas"])
def test_a_factor_that_differs_is_raised_by_the_next_step(change, in_backward):
    on_all_gpus(differ_in_a_step, change, in_backward)


def unfreeze_on_one_rank(device) -> None:
    model = mlp(8, 8, 8).to(device)
    model[0].requires_grad_(False)
    opt = ShardedLion(model.parameters(), module=model)

    def step() -> None:
        opt.zero_grad()
        model(torch.ones(2, 8, device=device)).square().sum().backward()
        opt.step()

    step()
    if dist.get_rank() == 1:
        model[0].requires_grad_(True)
    with pytest.raises(DisagreementError, match="'0.weight'"):
        step()
        step()
    # The rank that has unfrozen nothing has gathered parameters, on its device, where the other does not come any more.
    os._exit(0)


def test_a_layer_that_one_rank_unfreezes_is_named_on_every_rank():
    on_all_gpus(unfreeze_on_one_rank)
