"""Gradients that the program writes into ``p.grad`` count as with torch's optimizers, or an error says why not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import GradScaler, Lion, ShardedLion, ShardingConfig
from tests.models import GivenGradients, mlp
from tests.oracle import Oracle, assert_same_on_all_ranks, assert_same_params
from tests.shared_files import over_shared_files

STAGES = pytest.mark.parametrize("stage", [1, 2])
SETTINGS = dict(lr=2**-7, weight_decay=0.5)
WIDTHS = (8, 24, 8)


def batch_of(step: int, rank: int) -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    return model(batch_of(step, rank)).square().mean()


def write_gradients(model: nn.Module, loss: Tensor) -> None:
    params = list(model.parameters())
    for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
        param.grad = grad if param.grad is None else param.grad + grad


def train_by_hand(stage: int, writers: tuple[int, ...], clip: float | None, in_backward: bool = False) -> None:
    """The ranks in ``writers`` write their gradients, the others run backward."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = mlp(*WIDTHS)
    expected = copy.deepcopy(model)
    sharding = ShardingConfig(stage, bucket_numel=100, update_in_backward=in_backward)
    opt = ShardedLion(model.parameters(), module=model, sharding=sharding, **SETTINGS)
    oracle = Oracle(expected, Lion(expected.parameters(), **SETTINGS), world_size)
    for step in range(3):
        if rank in writers:
            write_gradients(model, loss_of(model, step, rank))
        else:
            loss_of(model, step, rank).backward()
        oracle.backward([lambda m, r=r, s=step: loss_of(m, s, r) for r in range(world_size)])
        norm = None if clip is None else opt.clip_grad_norm_(clip)
        opt.step()
        expected_norm = oracle.step(clip=clip)
        assert norm is None or torch.equal(norm, expected_norm)
        assert all(p.grad is None for p in model.parameters())
    opt.finish_param_sync()
    assert_same_params(model, expected)
    assert_same_on_all_ranks(model)


@STAGES
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("writers", [(0, 1), (0,), (1,)])
def test_written_gradients_count_on_all_ranks_or_some(gloo, writers, clip, stage):
    gloo.run(2, train_by_hand, stage, writers, clip, timeout=60)


def test_written_gradients_count_over_peer_memory(gloo):
    gloo.run(2, over_shared_files, train_by_hand, 2, (1,), 0.1, timeout=60)


@pytest.mark.parametrize("writers", [(0, 1), (1,)])
def test_written_gradients_count_with_update_in_backward(gloo, writers):
    gloo.run(2, train_by_hand, 2, writers, None, True, timeout=60)


def mix_with_backward(stage: int, when: str) -> None:
    """The first weight's gradient is written, the second's comes by backward; the third has none."""
    model = GivenGradients((40, 3), (5,), (70,))
    before = [p.detach().clone() for p in model.weights]
    opt = ShardedLion(model.parameters(), lr=2**-7, sharding=ShardingConfig(stage, bucket_numel=64))
    if when == "before":
        model.weights[0].grad = torch.full((40, 3), 2.0)
    if when == "in a hook":
        model.weights[1].register_hook(lambda _: setattr(model.weights[0], "grad", torch.full((40, 3), 2.0)))
    if when == "in no_sync":
        with opt.no_sync():
            model.loss([None, torch.ones(5), None]).backward()
            model.weights[0].grad = torch.full((40, 3), 2.0)
    else:
        model.loss([None, torch.ones(5), None]).backward()
    assert opt.grad_norm().item() == pytest.approx((4 * 120 + 5) ** 0.5)
    opt.step()
    for param, value, moved in zip(model.weights, before, (2**-7, 2**-7, 0), strict=True):
        assert torch.equal(param, value - moved)


@pytest.mark.parametrize(
    ("stage", "when"), [(1, "before"), (2, "before"), (1, "in a hook"), (2, "in a hook"), (1, "in no_sync")]
)
def test_written_gradients_mix_with_those_of_backward(gloo, stage, when):
    gloo.run(2, mix_with_backward, stage, when)


def write_before_backward() -> None:
    model = GivenGradients((5,))
    opt = ShardedLion(model.parameters())
    model.weights[0].grad = torch.ones(5)
    model.loss([torch.full((5,), 2.0)]).backward()
    assert opt.grad_norm().item() == pytest.approx(3 * 5**0.5)
    opt.zero_grad()
    model.weights[0].grad = torch.ones(5)
    opt.zero_grad()
    assert model.weights[0].grad is None and opt.grad_norm().item() == 0.0


def test_backward_adds_to_what_was_written_and_zero_grad_forgets_it(gloo):
    gloo.run(2, write_before_backward)


def replace_local_gradients(how: str) -> float:
    """Stage 1: what no_sync() has left in ``p.grad`` is the program's to replace, change or drop."""
    model = GivenGradients((64,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(1))
    (weight,) = model.weights
    with opt.no_sync():
        model.loss([torch.full((64,), 2.0)]).backward()
    if how == "replaced":
        weight.grad = torch.ones(64)
    if how == "changed":
        weight.grad *= 3
    if how == "clipped by torch":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 4.0)
    if how == "dropped":
        weight.grad = None
    before = weight.detach().clone()
    norm = opt.grad_norm().item()
    opt.step()
    assert torch.equal(weight, before) == (how == "dropped"), "a gradient that was set to None is none"
    return norm


@pytest.mark.parametrize(
    ("how", "norm"), [("replaced", 8.0), ("changed", 48.0), ("clipped by torch", 4.0), ("dropped", 0.0)]
)
def test_local_gradients_of_stage_1_are_the_programs(gloo, how, norm):
    assert gloo.run(2, replace_local_gradients, how) == [pytest.approx(norm, rel=1e-6)] * 2


def write_odd_gradients() -> None:
    """Strided, stride 0, of another dtype, with a graph of their own."""
    model = GivenGradients((4, 6), (6,), (3,), (5,))
    before = [p.detach().clone() for p in model.weights]
    opt = ShardedLion(model.parameters(), lr=2**-7)
    model.weights[0].grad = torch.ones(6, 4).t()
    model.weights[1].grad = torch.ones(()).expand(6)
    model.weights[2].grad_dtype = torch.bfloat16
    model.weights[2].grad = torch.ones(3, dtype=torch.bfloat16)
    model.weights[3].grad = torch.ones(5, requires_grad=True) * 1
    opt.step()
    for param, value in zip(model.weights, before, strict=True):
        assert torch.equal(param, value - 2**-7)


def test_written_gradients_need_no_particular_memory(gloo):
    gloo.run(2, write_odd_gradients)
    gloo.run(2, over_shared_files, write_odd_gradients)


# ---- too late


def write_after_reduction(what: str, in_backward: bool = False) -> str:
    model = GivenGradients((5,), (70,))
    sharding = ShardingConfig(bucket_numel=64, update_in_backward=in_backward)
    opt = ShardedLion(model.parameters(), lr=2**-7, sharding=sharding)
    model.loss([torch.ones(5), None]).backward()
    if what == "after clip":
        opt.clip_grad_norm_(1.0)
    before = [p.detach().clone() for p in model.weights]
    model.weights[1].grad = torch.ones(70)
    with pytest.raises(RuntimeError) as raised:
        opt.grad_norm() if what == "grad_norm" else opt.step()
    if not in_backward:
        for param, value in zip(model.weights, before, strict=True):
            assert torch.equal(param, value)
    opt.zero_grad()
    model.loss([torch.ones(5), torch.ones(70)]).backward()
    opt.step()
    return str(raised.value)


@pytest.mark.parametrize("what", ["step", "grad_norm", "after clip"])
def test_gradients_written_after_their_bucket_was_reduced_are_refused(gloo, what):
    for message in gloo.run(2, write_after_reduction, what):
        assert "'param.1' has a gradient again after those of this step had been reduced" in message
        assert "backward_without_batch()" in message and "set_full_grad()" in message


def test_gradients_written_after_their_bucket_was_updated_are_refused(gloo):
    assert "'param.1' has a gradient again" in gloo.run(2, write_after_reduction, "step", True)[0]


def add_gradients_after_backward(stage: int) -> None:
    """backward_without_batch() sends what only rank 0 has written, as one more micro-batch."""
    model = GivenGradients((5,), (70,))
    before = [p.detach().clone() for p in model.weights]
    opt = ShardedLion(model.parameters(), lr=2**-7, sharding=ShardingConfig(stage, bucket_numel=64, average=False))
    model.loss([torch.ones(5), None]).backward()
    if dist.get_rank() == 0:
        for param in model.weights:
            param.grad = torch.ones_like(param)
    opt.backward_without_batch()
    assert opt.grad_norm().item() == pytest.approx((9 * 5 + 70) ** 0.5)
    opt.step()
    for param, value in zip(model.weights, before, strict=True):
        assert torch.equal(param, value - 2**-7)


@STAGES
def test_gradients_are_added_after_backward_where_all_ranks_say_so(gloo, stage):
    gloo.run(2, add_gradients_after_backward, stage, timeout=60)


def write_to_a_frozen_parameter() -> str:
    model = mlp(4, 4)
    model[0].bias.requires_grad_(False)
    opt = ShardedLion(model.parameters(), module=model)
    model[0].bias.grad = torch.ones(4)
    with pytest.raises(RuntimeError) as raised:
        opt.step()
    opt.zero_grad()
    opt.step()
    return str(raised.value)


def test_a_gradient_of_a_frozen_parameter_is_refused(gloo):
    assert "'0.bias' has a gradient and does not require one" in gloo.run(1, write_to_a_frozen_parameter)[0]


def run_a_local_pass_on_one_rank() -> float:
    """Stage 1: after a pass that was sent, a local one on rank 0; rank 1 says that it has no batch for it."""
    model = GivenGradients((64,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(1, average=False))
    model.loss([torch.ones(64)]).backward()
    with opt.no_sync():
        if dist.get_rank() == 0:
            model.loss([torch.ones(64)]).backward()
        else:
            opt.backward_without_batch()
    return opt.grad_norm().item()


def test_a_rank_without_a_batch_sends_with_the_others_what_a_local_pass_left(gloo):
    assert gloo.run(2, run_a_local_pass_on_one_rank, timeout=30) == [24.0, 24.0]


def run_a_local_pass_after_an_update() -> str:
    model = GivenGradients((5,), (70,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(2, bucket_numel=64, update_in_backward=True))
    model.loss([torch.ones(5), torch.ones(70)]).backward()
    with opt.no_sync():
        model.loss([torch.ones(5), torch.ones(70)]).backward()
    with pytest.raises(RuntimeError) as raised:
        opt.step()
    opt.zero_grad()
    model.loss([torch.ones(5), torch.ones(70)]).backward()
    opt.step()
    return str(raised.value)


def test_a_local_pass_after_the_update_in_backward_is_refused(gloo):
    """Its gradients once leaked into the next step."""
    assert "inside no_sync() followed the one that updated" in gloo.run(2, run_a_local_pass_after_an_update)[0]


def scale_by_hand() -> None:
    model = GivenGradients((5,))
    opt = ShardedLion(model.parameters(), lr=2**-7)
    before = model.weights[0].detach().clone()
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    scaler.scale(torch.ones(()))
    model.weights[0].grad = torch.full((5,), 8.0)
    scaler.unscale_(opt)
    assert opt.clip_grad_norm_(1.0).item() == pytest.approx(2 * 5**0.5)
    scaler.step(opt)
    scaler.update()
    assert torch.equal(model.weights[0], before - 2**-7)


def test_written_gradients_are_unscaled(gloo):
    gloo.run(2, scale_by_hand)
