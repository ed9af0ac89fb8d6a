"""Global norm and clipping over shards, against torch's over full gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from lion_dist import Lion, ShardedLion, ShardingConfig
from tests.models import GivenGradients, make_batch, make_model, mlp
from tests.oracle import assert_same_params


def averaged_gradients(model, losses) -> None:
    """Leaves in ``.grad`` what one process would call the full gradient: the mean over ranks."""
    world_size = len(losses)
    torch.stack([loss(model) for loss in losses]).sum().div(world_size).backward()


def clip_as_torch_does(max_norm: float) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = make_model()
    expected = copy.deepcopy(model)
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model, sharding=ShardingConfig(bucket_numel=100))
    for step in range(3):
        batches = [make_batch(step, 0, r, detour=True) for r in range(world_size)]
        expected.load_state_dict(model.state_dict())
        expected.zero_grad()
        averaged_gradients(expected, [batch.loss for batch in batches])
        torch_norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), max_norm)
        batches[rank].loss(model).backward()
        before = opt.grad_norm()
        norm = opt.clip_grad_norm_(max_norm)
        assert torch.equal(before, norm) and norm.dtype == torch.float32 and norm.ndim == 0
        assert torch.allclose(norm, torch_norm, rtol=1e-5, atol=0)
        opt.step()
        # The momentum of the first step is (1 - beta2) times the clipped gradient.
        if step == 0:
            grads = {name: p.grad for name, p in expected.named_parameters()}
            names = {p: name for name, p in model.named_parameters()}
            for shard in opt.shards:
                for piece, momentum in zip(shard.bucket.slices, shard.slices_of(shard.exp_avg), strict=True):
                    full = grads[names[shard.bucket.params[piece.param]]]
                    if full is not None:
                        mine = full.flatten()[piece.param_start : piece.param_stop] * 0.01
                        assert torch.allclose(momentum, mine, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_clipping_equals_torchs_on_the_full_gradient(gloo, world_size, max_norm):
    gloo.run(world_size, clip_as_torch_does, max_norm)


def norms(bucket_numel: int | None, ordered_sum: bool | None) -> list[float]:
    """The same gradients on every rank, so that their mean is exact."""
    model = GivenGradients((37, 5), (3,), (200,), ())
    sharding = ShardingConfig(bucket_numel=bucket_numel, ordered_sum=ordered_sum)
    opt = ShardedLion(model.parameters(), sharding=sharding)
    result = []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        model.loss([torch.randn(p.shape, generator=generator) for p in model.weights]).backward()
        result.append(opt.clip_grad_norm_(1.0).item())
        opt.step()
    return result


def test_norm_depends_on_neither_ranks_nor_buckets(gloo):
    (alone,) = gloo.run(1, norms, None, None)
    for world_size in (2, 4):
        for bucket_numel in (None, 1, 130):
            for ordered_sum in (True, False):
                for result in gloo.run(world_size, norms, bucket_numel, ordered_sum):
                    assert result == alone


def clip_beside_gradients_of_frozen_parameters() -> None:
    """clip twice: the second limit holds; a norm read without clipping changes nothing."""
    model = GivenGradients((64,))
    opt = ShardedLion(model.parameters(), betas=(0.0, 0.0))
    model.loss([torch.full((64,), 2.0)]).backward()
    assert opt.grad_norm().item() == 16.0
    opt.clip_grad_norm_(1.0)
    opt.clip_grad_norm_(8.0)
    opt.step()
    for shard in opt.shards:
        assert torch.allclose(shard.slices_of(shard.exp_avg)[0], torch.tensor(1.0))  # beta2 0: the clipped gradient
    model.loss([torch.full((64,), 2.0)]).backward()
    opt.grad_norm()
    opt.step()
    for shard in opt.shards:
        assert torch.equal(shard.slices_of(shard.exp_avg)[0], torch.full((64 // 1,), 2.0)[: shard.exp_avg.numel()])


def test_last_limit_holds_and_for_one_step(gloo):
    gloo.run(1, clip_beside_gradients_of_frozen_parameters)


def let_torch_clip() -> tuple[float, float]:
    """torch's function finds no gradients, as the docs say: the shards are left as they were."""
    model = mlp(4, 4)
    opt = ShardedLion(model.parameters())
    model(torch.ones(2, 4)).square().sum().backward()
    found = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
    return found.item(), opt.grad_norm().item()


def test_torchs_clipping_sees_no_gradients_but_ours_does(gloo):
    for found, norm in gloo.run(2, let_torch_clip):
        assert found == 0.0 and norm > 0.1


def log_the_norm_without_stepping() -> None:
    model = GivenGradients((5,))
    expected = copy.deepcopy(model)
    opt = ShardedLion(model.parameters(), lr=1e-2)
    lion = Lion(expected.parameters(), lr=1e-2)
    for grad in (torch.ones(5), torch.arange(5.0)):
        model.loss([grad]).backward()
        for _ in range(3):
            opt.grad_norm()
        opt.step()
        expected.loss([grad]).backward()
        lion.step()
        lion.zero_grad()
    assert_same_params(model, expected)


def test_reading_the_norm_changes_nothing(gloo):
    gloo.run(2, log_the_norm_without_stepping)
