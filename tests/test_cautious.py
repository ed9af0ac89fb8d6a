"""Cautious Lion (arXiv 2411.16085): the statistic is over the whole tensor, whatever rank holds which part."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig

LR, DECAY = 1e-2, 0.1


def by_the_paper(param, momentum, grad):
    """Algorithm 2 of the paper for Lion, in fp64. Returns the new (param, momentum)."""
    update = (0.9 * momentum + 0.1 * grad).sign()
    mask = (update * grad > 0).double()
    scaled_lr = LR * mask.numel() / (mask.sum() + 1)
    return param * (1 - LR * DECAY) - scaled_lr * mask * update, 0.99 * momentum + 0.01 * grad


def test_a_step_is_the_papers():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(31, 17))
    expected, momentum = param.detach().double(), torch.zeros(31, 17, dtype=torch.float64)
    optimizer = Lion([param], lr=LR, weight_decay=DECAY, cautious=True)
    for _ in range(8):
        param.grad = torch.randn(31, 17)
        expected, momentum = by_the_paper(expected, momentum, param.grad.double())
        optimizer.step()
    torch.testing.assert_close(param.detach().double(), expected, rtol=0, atol=1e-6)


def test_elements_that_disagree_only_decay():
    param = nn.Parameter(torch.ones(4))
    optimizer = Lion([param], lr=LR, weight_decay=DECAY, cautious=True)
    param.grad = torch.tensor([1.0, 1.0, 1.0, 1.0])
    optimizer.step()
    before = param.detach().clone()
    param.grad = torch.tensor([-0.01, 1.0, 0.0, float("nan")])  # against the momentum; with it; none; not a number
    optimizer.step()
    decay = torch.tensor(1.0 - LR * DECAY)
    step = torch.tensor(LR * 4 / 2)
    assert param.tolist() == [before[0] * decay, before[1] * decay - step, before[2] * decay, before[3]]


def model_and_batches(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 37), nn.ReLU(), nn.Linear(37, 5)).to(dtype)
    return model, [torch.randn(4, 13, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(5)]


POLICIES = {"fp32": (torch.float32, PrecisionPolicy()), "split": (torch.bfloat16, PrecisionPolicy())}


def sharded_equals_plain(policy, zero_stage):
    dtype, precision = POLICIES[policy]
    model, batches = model_and_batches(dtype)
    plain = copy.deepcopy(model)
    settings = {"lr": LR, "weight_decay": DECAY, "precision": precision, "cautious": True}
    reference = Lion(plain.parameters(), **settings)
    sharding = ShardingConfig(zero_stage=zero_stage, bucket_numel=300)
    optimizer = ShardedLion(model.parameters(), module=model, sharding=sharding, **settings)
    for batch in batches:
        for network, opt in ((model, optimizer), (plain, reference)):
            opt.zero_grad()
            network(batch).square().mean().backward()
            opt.step()
    optimizer.finish_param_sync()
    return [torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ranks, zero_stage", [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_sharded_lion_counts_over_whole_parameters(gloo, policy, ranks, zero_stage):
    """Every rank has the same batch, so the mean gradient is the same to the bit on 1, 2 and 4 ranks."""
    for equal in gloo.run(ranks, sharded_equals_plain, policy, zero_stage):
        assert all(equal)


def fsdp2_equals_plain(mesh_shape):
    model, batches = model_and_batches()
    plain = copy.deepcopy(model)
    names = ("replicate", "shard")[-len(mesh_shape) :]
    fully_shard(model, mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    settings = {"lr": LR, "weight_decay": DECAY, "cautious": True}
    optimizer, reference = Lion(model.parameters(), **settings), Lion(plain.parameters(), **settings)
    for batch in batches:
        for network, opt in ((model, optimizer), (plain, reference)):
            opt.zero_grad()
            network(batch).square().mean().backward()
            opt.step()
    return [torch.equal(a.full_tensor(), b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]


@pytest.mark.parametrize("mesh_shape", [(2,), (4,), (2, 2)])
def test_fsdp2_shards_count_over_whole_parameters(gloo, mesh_shape):
    ranks = 4 if mesh_shape == (2, 2) else mesh_shape[0]
    for equal in gloo.run(ranks, fsdp2_equals_plain, mesh_shape):
        assert all(equal)


def refused_under_fsdp1(use_orig_params):
    model = FullyShardedDataParallel(
        nn.Linear(5, 4), use_orig_params=use_orig_params, device_id=torch.device("cpu"), process_group=dist.group.WORLD
    )
    with pytest.raises(ValueError, match="FSDP1's flat parameter, which hides where tensors begin"):
        Lion(model.parameters(), cautious=True)
    Lion(model.parameters())


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_with_the_reason(gloo, use_orig_params):
    gloo.run(2, refused_under_fsdp1, use_orig_params)
