"""Micro-batches: no_sync, what is sent when, divisors, and ranks that run out of batches."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist

from lion_dist import ShardedLion, ShardingConfig
from tests.collective_doubles import recorded_reductions
from tests.models import GivenGradients, make_batch, make_model, mlp
from tests.oracle import assert_same_on_all_ranks

STAGES = pytest.mark.parametrize("stage", [1, 2])


def count_what_is_sent(stage: int) -> tuple[int, int, list[bool]]:
    model = make_model()
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(stage, bucket_numel=300))
    with recorded_reductions() as sent:
        with opt.no_sync():
            make_batch(0, 0, dist.get_rank()).loss(model).backward()
        in_no_sync, kept = len(sent), [p.grad is not None for p in model.parameters()]
        make_batch(0, 1, dist.get_rank()).loss(model).backward()
        opt.step()
    assert len(opt.buckets) > 2
    assert in_no_sync in (0, len(opt.buckets)) and len(sent) == in_no_sync + len(opt.buckets)
    return in_no_sync, len(opt.buckets), kept


def test_no_sync_sends_nothing_in_stage_1(gloo):
    for in_no_sync, _, kept in gloo.run(2, count_what_is_sent, 1):
        assert in_no_sync == 0 and any(kept)


def test_no_sync_reduces_every_micro_batch_in_stage_2_and_keeps_no_gradient(gloo):
    for in_no_sync, buckets, kept in gloo.run(2, count_what_is_sent, 2):
        assert in_no_sync == buckets and not any(kept)


def end_with_no_sync(stage: int) -> None:
    """All backward passes were inside no_sync(), step() outside: their gradients are sent then, none is lost."""
    model = GivenGradients((5,), (70,))
    opt = ShardedLion(model.parameters(), lr=1e-2, sharding=ShardingConfig(stage))
    for _ in range(2):
        with opt.no_sync():
            for value in (1.0, 2.0):
                model.loss([torch.full((5,), value), torch.full((70,), value)]).backward()
        assert opt.grad_norm().item() == pytest.approx(3 * 75**0.5)
        opt.step()


@STAGES
def test_gradients_left_by_no_sync_are_sent_by_step(gloo, stage):
    gloo.run(2, end_with_no_sync, stage)


def follow_a_sent_pass_by_a_local_one(stage: int) -> None:
    """no_sync() in the last micro-batch instead of the others: what is still local is sent by step()."""
    model = GivenGradients((64,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(stage))
    for _ in range(2):
        model.loss([torch.full((64,), 1.0)]).backward()
        with opt.no_sync():
            model.loss([torch.full((64,), 2.0)]).backward()
        assert opt.grad_norm().item() == 8 * 3.0
        opt.step()
        assert model.weights[0].grad is None


@STAGES
def test_local_pass_after_one_that_was_sent(gloo, stage):
    gloo.run(2, follow_a_sent_pass_by_a_local_one, stage)


def nest_and_leave_no_sync_by_an_exception() -> None:
    model = mlp(4, 4)
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(1))
    with contextlib.suppress(KeyError):
        with opt.no_sync():
            with opt.no_sync():
                pass
            with pytest.raises(RuntimeError, match="inside no_sync"):
                opt.step()  # the inner block did not end the outer one
            raise KeyError
    model(torch.ones(1, 4)).sum().backward()
    opt.step()


def test_no_sync_nests_and_ends_by_an_exception(gloo):
    gloo.run(2, nest_and_leave_no_sync_by_an_exception)


# ---- ranks with uneven numbers of batches


def run_out_of_batches(stage: int, given_divisor: bool) -> None:
    """Rank 0 has 2 batches, the last rank none: it calls step() all the same. In stage 1 the extra ones are local."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = GivenGradients((5,), (70,))
    opt = ShardedLion(model.parameters(), lr=1e-2, sharding=ShardingConfig(stage, bucket_numel=64))
    mine = {0: 2, world_size - 1: 0}.get(rank, 1)
    for i in range(2):
        if i < mine:
            model.loss([torch.full((5,), 1.0 + i), torch.full((70,), 1.0 + i)]).backward()
        else:
            opt.backward_without_batch()
    # ranks bring 1 + 2, then 1 each, the last none
    total, count = 3.0 + (world_size - 2), 2 + world_size - 2
    if given_divisor:
        opt.set_grad_divisor(count)
    divisor = count if given_divisor else world_size
    assert opt.grad_norm().item() == pytest.approx(total / divisor * 75**0.5)
    opt.step()
    assert_same_on_all_ranks(model)


def run_out_of_batches_inside_no_sync(stage: int) -> None:
    """One loop for both stages: the rank without the first micro-batch says so inside no_sync()."""
    model = GivenGradients((5,), (70,))
    opt = ShardedLion(model.parameters(), lr=1e-2, sharding=ShardingConfig(stage, bucket_numel=64))
    with opt.no_sync():
        if dist.get_rank() == 0:
            model.loss([torch.ones(5), torch.ones(70)]).backward()
        else:
            opt.backward_without_batch()
    model.loss([torch.ones(5), torch.ones(70)]).backward()
    assert opt.grad_norm().item() == pytest.approx(3 / 2 * 75**0.5)
    opt.step()
    assert_same_on_all_ranks(model)


@STAGES
def test_a_rank_without_a_batch_inside_no_sync_sends_what_the_others_send(gloo, stage):
    gloo.run(2, run_out_of_batches_inside_no_sync, stage, timeout=30)


@STAGES
@pytest.mark.parametrize("given_divisor", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_with_uneven_numbers_of_batches(gloo, stage, given_divisor, world_size):
    gloo.run(world_size, run_out_of_batches, stage, given_divisor)


def skip_all_batches(stage: int) -> None:
    """A rank without any batch only calls step(); so do, in another step, all ranks."""
    model = GivenGradients((5,), (70,))
    opt = ShardedLion(model.parameters(), lr=2**-7, weight_decay=0.5, sharding=ShardingConfig(stage, bucket_numel=64))
    before = [p.detach().clone() for p in model.weights]
    opt.step()
    for param, value in zip(model.weights, before, strict=True):
        assert torch.equal(param, value), "a step without gradients on any rank changed a parameter"
    if dist.get_rank() == 1:
        model.loss([torch.ones(5), torch.ones(70)]).backward()
    opt.step()
    for param, value in zip(model.weights, before, strict=True):
        assert torch.allclose(param, value * (1 - 2**-8) - 2**-7, rtol=0, atol=1e-7)
    assert_same_on_all_ranks(model)


@STAGES
def test_rank_without_a_batch_calls_step_and_takes_part(gloo, stage):
    gloo.run(4, skip_all_batches, stage)


def uneven_no_sync() -> None:
    """Stage 1 with no_sync: ranks may run any number of local passes before the one that is sent."""
    model = GivenGradients((5,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(1))
    with opt.no_sync():
        for _ in range(dist.get_rank()):
            model.loss([torch.ones(5)]).backward()
    model.loss([torch.ones(5)]).backward()
    assert opt.grad_norm().item() == pytest.approx(1.5 * 5**0.5)  # (1 + 2) / 2
    opt.step()


def test_ranks_accumulate_different_numbers_of_local_batches_in_stage_1(gloo):
    gloo.run(2, uneven_no_sync)


# ---- average, sum, count


def norms_of_two_steps(average: bool, divisor: float | torch.Tensor | None) -> list[float]:
    """Gradients are 2 on rank 0 and 4 on rank 1; ``divisor`` is given for the first step and holds for that alone."""
    model = GivenGradients((64,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(average=average))
    norms = []
    for step in range(2):
        model.loss([torch.full((64,), 2.0 + 2 * dist.get_rank())]).backward()
        if divisor is not None and step == 0:
            opt.set_grad_divisor(divisor)
        norms.append(opt.grad_norm().item() / 8)
        opt.step()
    return norms


@pytest.mark.parametrize(
    ("average", "divisor", "expected"),
    [
        (True, None, [3.0, 3.0]),
        (False, None, [6.0, 6.0]),
        (True, 12, [0.5, 3.0]),
        (False, 12, [0.5, 6.0]),
        (True, torch.tensor(12), [0.5, 3.0]),
    ],
    ids=str,
)
def test_gradients_are_averaged_summed_or_divided_by_a_count(gloo, average, divisor, expected):
    assert gloo.run(2, norms_of_two_steps, average, divisor) == [expected] * 2


# ---- several passes per step


def look_at_the_norm_between_passes(stage: int) -> None:
    """grad_norm() after a micro-batch is of what there is so far, and step() takes what came later too."""
    model = GivenGradients((5,), (70,))
    before = [p.detach().clone() for p in model.weights]
    opt = ShardedLion(model.parameters(), lr=2**-7, sharding=ShardingConfig(stage, bucket_numel=64))
    model.loss([torch.ones(5), None]).backward()
    assert opt.grad_norm().item() == pytest.approx(5**0.5)
    model.loss([torch.ones(5), torch.ones(70)]).backward()
    assert opt.grad_norm().item() == pytest.approx((5 * 4 + 70) ** 0.5)
    opt.step()
    for param, value in zip(model.weights, before, strict=True):
        assert torch.equal(param, value - 2**-7)


@STAGES
def test_norm_may_be_read_between_micro_batches(gloo, stage):
    gloo.run(2, look_at_the_norm_between_passes, stage)


def notice_a_bad_gradient_after_the_norm_was_read() -> None:
    model = GivenGradients((5,))
    before = model.weights[0].detach().clone()
    opt = ShardedLion(model.parameters(), lr=2**-7)
    model.loss([torch.ones(5)]).backward()
    assert opt.grad_norm().isfinite()
    model.loss([torch.full((5,), float("nan"))]).backward()
    opt.step()
    assert torch.equal(model.weights[0], before) and opt.skipped_steps() == 1


def test_bad_gradient_after_the_norm_was_read_still_skips_the_step(gloo):
    gloo.run(2, notice_a_bad_gradient_after_the_norm_was_read)


def run_backward_after_clipping() -> None:
    model = GivenGradients((5,))
    opt = ShardedLion(model.parameters())
    model.loss([torch.ones(5)]).backward()
    opt.clip_grad_norm_(1.0)
    model.loss([torch.ones(5)]).backward()
    with pytest.raises(RuntimeError, match="backward.*after clip_grad_norm_"):
        opt.step()
    opt.zero_grad()
    model.loss([torch.ones(5)]).backward()
    opt.step()


def test_backward_between_clipping_and_step_is_refused(gloo):
    gloo.run(2, run_backward_after_clipping)


def forget_gradients(stage: int) -> None:
    model = GivenGradients((5,), (70,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(stage, bucket_numel=64))
    model.loss([torch.full((5,), 100.0), torch.full((70,), 100.0)]).backward()
    opt.zero_grad()
    with opt.no_sync():
        model.loss([torch.full((5,), 100.0), None]).backward()
    opt.zero_grad()
    assert all(p.grad is None for p in model.weights)
    model.loss([torch.ones(5), None]).backward()
    assert opt.grad_norm().item() == pytest.approx(5**0.5)
    before = model.weights[1].detach().clone()
    opt.step()
    assert torch.equal(model.weights[1], before), "a gradient that was zeroed moved a parameter"
    opt.zero_grad()
    assert opt.grad_norm().item() == 0.0


@STAGES
def test_zero_grad_forgets_reduced_and_local_gradients(gloo, stage):
    gloo.run(2, forget_gradients, stage)
