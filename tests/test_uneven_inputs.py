"""``torch.distributed.algorithms.Join`` with ``ShardedLion``: ranks run out of batches at different times."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, ShardedLion, ShardingConfig
from lion_dist.uneven_inputs import UnevenInputs
from tests.models import make_batch, make_model, mlp
from tests.oracle import Oracle, assert_same_on_all_ranks, assert_same_params

CLIP = 0.3


def lr_at(step: int) -> float:
    return 1e-2 / (1 + step)


def train_unevenly(steps: list[int], micro_batches: int, stage: int, wrapped: bool) -> None:
    """``steps[rank]`` of them. The others' learning rate goes on falling when a rank has stopped."""
    rank, model = dist.get_rank(), make_model()
    called = DistributedDataParallel(model, broadcast_buffers=False) if wrapped else model
    sharding = ShardingConfig(zero_stage=stage, bucket_numel=100)
    opt = ShardedLion(called.parameters(), weight_decay=0.1, module=called, sharding=sharding)
    with Join([UnevenInputs(opt, max_norm=CLIP, micro_batches=micro_batches)]):
        for step in range(steps[rank]):
            opt.param_groups[0]["lr"] = lr_at(step)
            for micro_batch in range(micro_batches - 1):
                with opt.no_sync():
                    make_batch(step, micro_batch, rank).loss(called).backward()
            make_batch(step, micro_batches - 1, rank).loss(called).backward()
            opt.clip_grad_norm_(CLIP)
            opt.step()
    assert opt.taken_steps() == max(steps)
    assert_same_on_all_ranks(model)
    expected = make_model()
    oracle = Oracle(expected, Lion(expected.parameters(), weight_decay=0.1), len(steps))
    for step in range(max(steps)):
        oracle.lion.param_groups[0]["lr"] = lr_at(step)
        for micro_batch in range(micro_batches):
            losses = [
                make_batch(step, micro_batch, r).loss if step < steps[r] else None for r in range(len(steps))
            ]  # fmt: skip
            oracle.backward(losses, reduce=stage == 2 or micro_batch == micro_batches - 1)
        oracle.step(clip=CLIP)
    assert_same_params(model, expected)


@pytest.mark.parametrize(
    ("steps", "micro_batches", "stage", "wrapped"),
    [([2, 5], 1, 2, False), ([4, 1], 2, 1, False), ([1, 3], 2, 2, False), ([3, 0], 1, 2, True)],
)
def test_a_rank_without_batches_takes_part_with_zeros_and_the_others_learning_rate(
    gloo, steps, micro_batches, stage, wrapped
):
    gloo.run(2, train_unevenly, steps, micro_batches, stage, wrapped)


def evaluate_inside() -> None:
    """A forward without gradients is nobody's turn."""
    model = mlp(8, 8)
    opt = ShardedLion(model.parameters(), module=model)
    with Join([UnevenInputs(opt)]):
        for _ in range(1 + dist.get_rank()):
            model(torch.ones(2, 8)).sum().backward()
            opt.step()
            with torch.no_grad():
                model(torch.ones(2, 8))
    model(torch.ones(2, 8)).sum().backward()  # behind it all is as before
    pickle.loads(pickle.dumps(copy.deepcopy(model)))(torch.ones(2, 8))
    assert opt.taken_steps() == 2


def test_evaluation_inside_is_not_counted(gloo):
    gloo.run(2, evaluate_inside)


def refuse() -> None:
    model = mlp(8, 8)
    with pytest.raises(ValueError, match="constructed with module=model"):
        UnevenInputs(ShardedLion(mlp(8, 8).parameters()))
    with pytest.raises(ValueError, match="without update_in_backward"):
        in_backward = ShardingConfig(update_in_backward=True)
        UnevenInputs(ShardedLion(model.parameters(), module=model, sharding=in_backward))
    ddp = DistributedDataParallel(make_model())
    with pytest.raises(ValueError, match="sends the model's buffers"):
        UnevenInputs(ShardedLion(ddp.parameters(), module=ddp))
    ddp = DistributedDataParallel(mlp(8, 8))
    opt = ShardedLion(ddp.parameters(), module=ddp)
    with pytest.raises(RuntimeError, match="has been replaced by a ShardedLion"):
        Join([ddp])
    with pytest.raises(ValueError, match="divide_by_initial_world_size=False"):
        Join([UnevenInputs(opt)], divide_by_initial_world_size=False)


def test_what_cannot_be_joined_is_refused(gloo):
    gloo.run(2, refuse)
