"""``full_grad()`` and ``set_full_grad()``: a gradient is read whole after backward, and replaced, before step()."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lion_dist import GradScaler, ShardedLion, ShardingConfig
from tests.models import GivenGradients, mlp
from tests.oracle import assert_same_on_all_ranks
from tests.shared_files import over_shared_files

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = ((40, 3), (5,), (), (70,), (0, 3))


def gradients(seed: int, dtype: torch.dtype = FP32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def make(dtype: torch.dtype = FP32, **sharding) -> tuple[GivenGradients, ShardedLion]:
    model = GivenGradients(*SHAPES, dtype=dtype)
    return model, ShardedLion(model.parameters(), lr=2**-7, sharding=ShardingConfig(bucket_numel=100, **sharding))


def read_gradients(dtype: torch.dtype, average: bool, micro_batches: int) -> None:
    ranks = range(dist.get_world_size())
    model, opt = make(dtype, average=average)
    total = [torch.zeros(shape) for shape in SHAPES]
    for i in range(micro_batches):
        model.loss(gradients(10 * i + dist.get_rank(), dtype)).backward()
        of_ranks = [gradients(10 * i + rank, dtype) for rank in ranks]
        for t, addends in zip(total, zip(*of_ranks, strict=True), strict=True):
            summed = addends[0].float()
            for addend in addends[1:]:
                summed += addend.float()
            t += summed
    divisor = len(ranks) if average else 1
    for param, expected in zip(model.weights, total, strict=True):
        grad = opt.full_grad(param)
        assert grad.shape == param.shape and grad.dtype == torch.float64
        assert torch.equal((grad * divisor).float(), expected)
    norm = torch.cat([opt.full_grad(p).flatten() for p in model.weights]).norm()
    assert opt.grad_norm().item() == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "average", "micro_batches"), [(FP32, True, 1), (FP32, False, 2), (BF16, True, 2)])
def test_every_rank_reads_the_whole_gradient(gloo, ranks, dtype, average, micro_batches):
    gloo.run(ranks, read_gradients, dtype, average, micro_batches)


def write_back_what_was_read(micro_batches: int) -> None:
    model, opt = make()
    for i in range(micro_batches):
        model.loss(gradients(10 * i + dist.get_rank())).backward()
    before = [bucket.finish_grad_sync().clone() for bucket in opt.buckets]
    norm = opt.grad_norm()
    for param in model.weights:
        opt.set_full_grad(param, opt.full_grad(param))
    for bucket, expected in zip(opt.buckets, before, strict=True):
        assert torch.equal(bucket.finish_grad_sync(), expected)
    assert torch.equal(opt.grad_norm(), norm)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_writing_back_what_was_read_changes_no_bit(gloo, ranks, micro_batches):
    """Three ranks too: a third, and three times that, is not the same in fp32."""
    gloo.run(ranks, write_back_what_was_read, micro_batches)


def zero_rows() -> None:
    """Rows of an embedding that are not to move; the norm and the clipping know of them."""
    model, opt = make()
    before = [p.detach().clone() for p in model.weights]
    model.loss([torch.ones(shape) for shape in SHAPES]).backward()
    assert opt.grad_norm().item() == pytest.approx(196**0.5)
    grad = opt.full_grad(model.weights[0])
    grad[10:] = 0
    opt.set_full_grad(model.weights[0], grad)
    assert opt.clip_grad_norm_(1.0).item() == pytest.approx(106**0.5)
    opt.step()
    assert torch.equal(model.weights[0][:10], before[0][:10] - 2**-7)
    assert torch.equal(model.weights[0][10:], before[0][10:])
    assert torch.equal(model.weights[3], before[3] - 2**-7)
    assert_same_on_all_ranks(model)
    model.loss([torch.ones(shape) for shape in SHAPES]).backward()
    assert opt.grad_norm().item() == pytest.approx(196**0.5)  # the next step's are its own


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_that_are_zeroed_stay(gloo, ranks):
    gloo.run(ranks, zero_rows)


def test_gradients_are_replaced_over_peer_memory(gloo):
    gloo.run(2, over_shared_files, zero_rows)
    gloo.run(2, over_shared_files, write_back_what_was_read, 2)


def write_where_there_was_none() -> None:
    model, opt = make()
    before = [p.detach().clone() for p in model.weights]
    model.loss([None, torch.ones(5), None, None, None]).backward()
    assert not opt.full_grad(model.weights[3]).any()
    opt.set_full_grad(model.weights[3], torch.ones(70))
    opt.step()
    assert torch.equal(model.weights[3], before[3] - 2**-7)
    assert torch.equal(model.weights[0], before[0])
    opt.set_full_grad(model.weights[0], torch.ones(40, 3))  # in a step without any backward
    opt.step()
    assert torch.equal(model.weights[0], before[0] - 2**-7)


def test_a_parameter_without_a_gradient_is_given_one(gloo):
    gloo.run(2, write_where_there_was_none)


def write_a_bad_gradient() -> None:
    model, opt = make()
    before = [p.detach().clone() for p in model.weights]
    model.loss([torch.ones(shape) for shape in SHAPES]).backward()
    assert opt.grad_norm().isfinite()
    opt.set_full_grad(model.weights[1], torch.full((5,), float("nan")))
    opt.step()
    assert opt.skipped_steps() == 1 and all(map(torch.equal, model.weights, before))


def test_a_written_gradient_that_is_not_finite_skips_the_step(gloo):
    gloo.run(2, write_a_bad_gradient)


def read_unscaled() -> None:
    model, opt = make()
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    scaler.scale(torch.ones(()))
    model.loss([torch.full(shape, 16.0) for shape in SHAPES]).backward()
    assert opt.full_grad(model.weights[1]).tolist() == [16.0] * 5
    scaler.unscale_(opt)
    assert opt.full_grad(model.weights[1]).tolist() == [2.0] * 5
    opt.zero_grad()
    model.loss([torch.full(shape, 16.0) for shape in SHAPES]).backward()
    opt.set_grad_divisor(32)
    assert opt.full_grad(model.weights[1]).tolist() == [1.0] * 5


def test_it_is_in_the_unit_of_grad_norm(gloo):
    gloo.run(2, read_unscaled)


def misuse() -> None:
    model, opt = make()
    model.loss([torch.ones(shape) for shape in SHAPES]).backward()
    weight = model.weights[1]
    for bad in (torch.ones(6), torch.ones(5, dtype=torch.int64), 1.0):
        with pytest.raises(ValueError, match=r"takes a floating-point tensor of the parameter's shape \(5,\)"):
            opt.set_full_grad(weight, bad)
    for call in (opt.full_grad, lambda p: opt.set_full_grad(p, torch.ones(3))):
        with pytest.raises(ValueError, match="'.unknown.' is frozen or not this optimizer's"):
            call(torch.nn.Parameter(torch.ones(3)))
    with opt.no_sync(), pytest.raises(RuntimeError, match="Leave the no_sync"):
        opt.full_grad(weight)
    opt.clip_grad_norm_(1.0)
    assert opt.full_grad(weight).tolist() == [1.0] * 5
    with pytest.raises(RuntimeError, match=r"set_full_grad\(\) comes before clip_grad_norm_"):
        opt.set_full_grad(weight, torch.ones(5))
    opt.step()
    _, opt = make(update_in_backward=True)
    with pytest.raises(RuntimeError, match="update_in_backward=False"):
        opt.full_grad(opt.param_groups[0]["params"][0])
    frozen = mlp(4, 4)
    frozen[0].bias.requires_grad_(False)
    opt = ShardedLion(frozen.parameters())
    with pytest.raises(ValueError, match="'param.1' is frozen"):
        opt.full_grad(frozen[0].bias)


def test_what_cannot_be_read_or_written_is_refused(gloo):
    gloo.run(2, misuse)
