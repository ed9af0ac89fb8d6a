"""Parameters of every kind under ShardedLion: frozen, unfrozen, unused, added later, tied, tiny, empty."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from tests.models import GivenGradients, make_batch, make_model, mlp
from tests.oracle import Oracle, assert_same_on_all_ranks, assert_same_params

LR = 2**-7  # and weights that are multiples of it: steps are exact
STAGES = pytest.mark.parametrize("stage", [1, 2])


def given(*shapes: tuple[int, ...]) -> GivenGradients:
    """Parameters of ones."""
    model = GivenGradients(*shapes)
    for weight in model.weights:
        weight.data.fill_(1.0)
    return model


def ones(model: GivenGradients, *, without: tuple[int, ...] = ()) -> list[Tensor | None]:
    return [None if i in without else torch.ones_like(p) for i, p in enumerate(model.weights)]


def values(model: GivenGradients) -> list[float]:
    """How many steps each parameter has gone down; all its elements the same."""
    steps = [((1.0 - p.detach()) / LR) for p in model.weights]
    for s in steps:
        assert s.numel() == 0 or (s == s.flatten()[0]).all()
    return [s.flatten()[0].item() if s.numel() else 0.0 for s in steps]


# ---- unused


def leave_unused_parameters_alone(stage: int) -> None:
    """Parameter 1 is used in step 0 only: afterwards neither weight decay nor momentum move it."""
    model = given((70,), (70,), (3,))
    sharding = ShardingConfig(stage, bucket_numel=150)  # 0 and 1 share a bucket
    opt = ShardedLion(model.parameters(), lr=LR, weight_decay=0.5, sharding=sharding)
    model.loss(ones(model)).backward()
    opt.step()
    param, momenta = model.weights[1].detach().clone(), [s.exp_avg.clone() for s in opt.shards]
    for _ in range(3):
        model.loss(ones(model, without=(1,))).backward()
        opt.step()
    assert torch.equal(model.weights[1], param)
    assert not torch.equal(model.weights[0], param)
    for shard, before in zip(opt.shards, momenta, strict=True):
        for piece, now, then in zip(
            shard.bucket.slices, shard.slices_of(shard.exp_avg), shard.slices_of(before), strict=True
        ):
            unused = shard.bucket.params[piece.param] is model.weights[1]
            assert torch.equal(now, then) == unused


@STAGES
def test_unused_parameter_is_left_alone_with_weight_decay_and_momentum(gloo, stage):
    gloo.run(2, leave_unused_parameters_alone, stage)


def use_a_parameter_on_one_rank_only(stage: int) -> list[float]:
    """A rank without the gradient counts as zeros; the parameter moves, on every rank."""
    model = given((70,), (70,))
    opt = ShardedLion(model.parameters(), lr=LR, sharding=ShardingConfig(stage, bucket_numel=64))
    model.loss(ones(model, without=() if dist.get_rank() == 1 else (1,))).backward()
    opt.step()
    momentum = torch.zeros(1)
    for shard in opt.shards:
        if shard.bucket.params[0] is model.weights[1] and shard.bucket.slices:
            momentum = shard.slices_of(shard.exp_avg)[0][:1]
    dist.all_reduce(momentum, dist.ReduceOp.MAX)
    assert momentum.item() == torch.tensor(0.25).mul(1 - 0.99).item()  # of the mean over 4 ranks
    return values(model)


@STAGES
def test_parameter_used_on_one_rank_moves_on_all(gloo, stage):
    assert gloo.run(4, use_a_parameter_on_one_rank_only, stage) == [[1.0, 1.0]] * 4


# ---- frozen and unfrozen


def freeze_and_unfreeze(stage: int, unfreeze_with: str) -> None:
    model = given((70,), (5,), (40,))
    model.weights[1].requires_grad_(False)
    opt = ShardedLion(model.parameters(), lr=LR, weight_decay=0.0, module=model, sharding=ShardingConfig(stage, 80))
    buckets = len(opt.buckets)

    def step(without: tuple[int, ...]) -> list[float]:
        model.loss(ones(model, without=without)).backward()
        opt.step()
        opt.finish_param_sync()
        return values(model)

    assert step(without=(1,)) == [1.0, 0.0, 1.0]
    model.weights[1].requires_grad_(True)  # unfrozen: it gets a bucket of its own at the next step
    if unfreeze_with == "zero_grad first":
        opt.zero_grad()
    assert step(without=()) == [2.0, 1.0, 2.0]
    assert len(opt.buckets) == buckets + 1
    assert step(without=()) == [3.0, 2.0, 3.0]
    model.weights[0].requires_grad_(False)  # frozen in the middle of the run: left alone
    assert step(without=(0,)) == [3.0, 3.0, 4.0]
    model.weights[0].requires_grad_(True)
    assert step(without=()) == [4.0, 4.0, 5.0]
    assert all(p.grad is None for p in model.weights)
    assert_same_on_all_ranks(model)


@STAGES
@pytest.mark.parametrize("unfreeze_with", ["nothing", "zero_grad first"])
def test_parameters_freeze_and_unfreeze_in_the_middle_of_a_run(gloo, stage, unfreeze_with):
    gloo.run(2, freeze_and_unfreeze, stage, unfreeze_with)


def unfreeze_where_one_rank_has_no_batch(update_in_backward: bool) -> list[float]:
    model = given((70,), (70,), (3,))
    model.weights[1].requires_grad_(False)
    sharding = ShardingConfig(bucket_numel=64, update_in_backward=update_in_backward)
    opt = ShardedLion(model.parameters(), lr=LR, sharding=sharding)
    for step in range(3):
        if step == 1:
            model.weights[1].requires_grad_(True)
        if dist.get_rank() == 0 or step != 1:
            model.loss(ones(model, without=(1,) if step == 0 else ())).backward()
        opt.step()
    opt.finish_param_sync()
    return values(model)


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_parameters_unfreeze_in_a_step_in_which_one_rank_has_no_batch(gloo, update_in_backward):
    """Ranks must come to the new bucket's broadcast after the same reductions, whoever ran a backward pass."""
    assert gloo.run(2, unfreeze_where_one_rank_has_no_batch, update_in_backward, timeout=30) == [[3.0, 2.0, 3.0]] * 2


def unfreeze_with_accumulation(stage: int) -> None:
    """The first step after unfreezing averages the micro-batches of all ranks, as any other step."""
    model = given((3,), (5,))
    model.weights[1].requires_grad_(False)
    opt = ShardedLion(model.parameters(), lr=LR, sharding=ShardingConfig(stage))
    model.loss(ones(model, without=(1,))).backward()
    opt.step()
    model.weights[1].requires_grad_(True)
    rank = dist.get_rank()
    for sign in (1, 2):
        grads = [torch.ones(3), torch.full((5,), float(sign * (1 + rank)))]
        model.loss(grads).backward()
    norm = opt.grad_norm()
    assert norm.item() == pytest.approx((3 * 2.0**2 + 5 * 4.5**2) ** 0.5)  # (1 + 2) * (1 + 2) / 2 = 4.5
    opt.step()
    assert values(model) == [2.0, 1.0]


@STAGES
def test_unfrozen_parameter_takes_part_in_its_first_step(gloo, stage):
    gloo.run(2, unfreeze_with_accumulation, stage)


def frozen_parameters_cost_nothing() -> None:
    model = mlp(64, 64, 64)
    model[0].requires_grad_(False)
    opt = ShardedLion(model.parameters(), module=model)
    memory = opt.memory_bytes()
    trained = sum(p.numel() for p in model[2].parameters())
    assert trained * 4 // 2 <= memory["exp_avg"] < trained * 4 // 2 + 4 * 128
    assert memory["params"] >= 4 * (trained + 64 * 64 + 64)


def test_frozen_parameter_has_no_momentum(gloo):
    gloo.run(2, frozen_parameters_cost_nothing)


# ---- small, scalar, empty


def train_the_smallest_models(shapes: tuple) -> list[float]:
    model = given(*shapes)
    opt = ShardedLion(model.parameters(), lr=LR, module=model)
    for _ in range(2):
        model.loss(ones(model)).backward()
        assert opt.clip_grad_norm_(1e9).item() == pytest.approx(sum(p.numel() for p in model.weights) ** 0.5)
        opt.step()
    opt.finish_param_sync()
    assert [tuple(p.shape) for p in model.weights] == list(shapes)
    return values(model)


@pytest.mark.parametrize("shapes", [((),), ((1,),), ((3,),), ((0, 4), (2,)), ((0,), (), (65,))], ids=str)
def test_parameters_smaller_than_the_number_of_ranks(gloo, shapes):
    expected = [0.0 if 0 in shape else 2.0 for shape in shapes]
    assert gloo.run(4, train_the_smallest_models, shapes) == [expected] * 4


def train_nothing_but_an_empty_parameter() -> None:
    model = given((0, 4))
    opt = ShardedLion(model.parameters(), lr=LR)
    model.loss(ones(model)).backward()
    assert opt.grad_norm().item() == 0.0
    opt.step()


def test_model_of_an_empty_parameter_alone(gloo):
    gloo.run(2, train_nothing_but_an_empty_parameter)


# ---- tied


def train_tied_weights(stage: int) -> None:
    """Tied by one nn.Parameter in two modules: one place, one gradient, the sum of both uses."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    expected = copy.deepcopy(model)
    assert expected[2].weight is expected[0].weight
    opt = ShardedLion(model.parameters(), lr=LR, module=model, sharding=ShardingConfig(stage))
    oracle = Oracle(expected, Lion(expected.parameters(), lr=LR), dist.get_world_size())
    for step in range(3):
        batches = [torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(2)]
        losses = [lambda m, x=x: m(x).square().mean() for x in batches]
        losses[dist.get_rank()](model).backward()
        oracle.backward(losses)
        opt.step()
        oracle.step()
    opt.finish_param_sync()
    assert model[2].weight is model[0].weight
    assert_same_params(model, expected)


@STAGES
def test_tied_weight_gets_the_sum_of_its_gradients(gloo, stage):
    gloo.run(2, train_tied_weights, stage)


# ---- param groups


def add_a_group_in_the_middle(stage: int, main_params: str) -> None:
    """The appended group's parameters are broadcast, trained with its own lr, and index after the others."""
    dtype = torch.float32 if main_params == "auto" else torch.bfloat16
    policy = PrecisionPolicy(main_params=main_params, momentum_rounding="stochastic", seed=2)
    model = make_model(dtype)
    extra = nn.Linear(8, 8).to(dtype)
    with torch.no_grad():
        for p in extra.parameters():
            p.fill_(0.125 * (1 + dist.get_rank()))  # rank 0's values hold
    expected, expected_extra = copy.deepcopy(model), nn.Linear(8, 8).to(dtype)
    with torch.no_grad():
        for p in expected_extra.parameters():
            p.fill_(0.125)
    settings = dict(lr=2e-3, weight_decay=0.1, precision=policy)
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(stage, bucket_numel=100), **settings)
    lion = Lion(expected.parameters(), **settings)
    world_size = dist.get_world_size()

    def train(step: int, oracle: Oracle) -> None:
        batches = [make_batch(step, 0, r) for r in range(world_size)]

        def loss(m, batch, e):
            return batch.loss(m) + (e(m.embedding.weight[:3]).float().square().mean() if step else 0.0)

        loss(model, batches[dist.get_rank()], extra).backward()
        oracle.backward([lambda m, b=b: loss(m, b, expected_extra) for b in batches])
        opt.step()
        opt.finish_param_sync()
        oracle.step()

    train(0, Oracle(expected, lion, world_size))
    opt.add_param_group({"params": list(extra.parameters()), "lr": 5e-3})
    lion.add_param_group({"params": list(expected_extra.parameters()), "lr": 5e-3})
    for step in (1, 2, 3):
        train(step, Oracle(expected, lion, world_size))
    assert_same_params(model, expected)
    assert_same_params(extra, expected_extra)


@STAGES
@pytest.mark.parametrize("main_params", ["auto", "none"])
def test_param_group_added_in_the_middle_of_a_run(gloo, stage, main_params):
    gloo.run(2, add_a_group_in_the_middle, stage, main_params)


def schedule_each_group() -> list[float]:
    """lr_scheduler changes group["lr"] in place; the next step reads it."""
    model = given((3,), (70,))
    opt = ShardedLion([{"params": [model.weights[0]]}, {"params": [model.weights[1]], "lr": 2 * LR}], lr=LR)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for _ in range(2):
        model.loss(ones(model)).backward()
        opt.step()
        scheduler.step()
    return values(model)


def test_learning_rates_follow_a_scheduler(gloo):
    assert gloo.run(2, schedule_each_group) == [[1.5, 3.0]] * 2


def take_a_tensor_as_learning_rate() -> list[float]:
    model = given((3,), (70,))
    opt = ShardedLion(model.parameters(), lr=torch.tensor(LR), weight_decay=0.0)
    for factor in (1.0, 2.0):
        opt.param_groups[0]["lr"].fill_(LR * factor)
        model.loss(ones(model)).backward()
        opt.step()
    return values(model)


def test_learning_rate_may_be_a_tensor(gloo):
    assert gloo.run(2, take_a_tensor_as_learning_rate) == [[3.0, 3.0]] * 2


def step_with_a_closure() -> float:
    model = given((3,))
    opt = ShardedLion(model.parameters(), lr=LR)

    def closure():
        opt.zero_grad()
        loss = model.loss(ones(model)) + 17
        loss.backward()
        return loss

    assert opt.step(closure).item() == 17
    return values(model)[0]


def test_closure_is_run_and_its_loss_returned(gloo):
    assert gloo.run(2, step_with_a_closure) == [1.0, 1.0]


def train_parameters_of_several_dtypes() -> None:
    """One param group, three dtypes: buckets of their own, in which each is updated as by Lion."""
    model = GivenGradients((70,), (70,), (70,), (5,))
    for weight, dtype in zip(
        model.weights, (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16), strict=True
    ):
        weight.data = weight.data.to(dtype)
    expected = copy.deepcopy(model)
    opt = ShardedLion(model.parameters(), lr=1e-2, weight_decay=0.1)
    lion = Lion(expected.parameters(), lr=1e-2, weight_decay=0.1)
    for bucket in opt.buckets:
        assert len({p.dtype for p in bucket.params}) == 1
    assert len(opt.buckets) == 3
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randint(-4, 5, p.shape, generator=generator).to(p.dtype) for p in model.weights]
        for m, o in ((model, opt), (expected, lion)):
            o.zero_grad()
            m.loss(grads).backward()
            o.step()
    assert_same_params(model, expected)


def test_parameters_of_several_dtypes_in_one_group(gloo):
    gloo.run(2, train_parameters_of_several_dtypes)


# ---- what ranks start from


def start_from_different_values() -> None:
    rank = dist.get_rank()
    model = make_model(seed=rank)
    model.mask.fill_(1.0 + rank)
    model.frozen.data.fill_(5.0 + rank)
    stranger = nn.Parameter(torch.full((3,), float(rank)))
    model.register_parameter("stranger", stranger)  # the module's, but not the optimizer's
    reference = make_model(seed=0)
    ShardedLion([p for n, p in model.named_parameters() if n != "stranger"], module=model)
    assert model.mask[0].item() == 1.0 and model.frozen[0].item() == 5.0 and stranger[0].item() == 0.0
    assert torch.equal(model.up.weight, reference.up.weight)
    assert_same_on_all_ranks(model)


def test_parameters_and_buffers_start_as_those_of_rank_0(gloo):
    gloo.run(4, start_from_different_values)


def test_one_process_needs_no_torch_distributed():
    assert not dist.is_initialized()
    model = make_model()
    expected = copy.deepcopy(model)
    opt = ShardedLion(
        model.parameters(), lr=2e-3, weight_decay=0.1, module=model, sharding=ShardingConfig(bucket_numel=99)
    )
    oracle = Oracle(expected, Lion(expected.parameters(), lr=2e-3, weight_decay=0.1), 1)
    for step in range(3):
        for i in range(2):
            batch = make_batch(step, i, 0, detour=step == 1)
            batch.loss(model).backward()
            oracle.backward([batch.loss])
        assert torch.equal(opt.clip_grad_norm_(0.3), oracle.step(clip=0.3))
        opt.step()
    opt.finish_param_sync()
    assert_same_params(model, expected)


# ---- parameters are still the user's


def test_channels_last_parameter_keeps_identity_shape_and_values():
    """In the bucket it is contiguous, as every view there is."""
    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    weight, value = model.weight, model.weight.detach().clone()
    assert not weight.is_contiguous()
    opt = ShardedLion(model.parameters(), lr=LR, module=model)
    assert model.weight is weight and torch.equal(weight, value)
    expected = copy.deepcopy(model)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(expected(x).square().sum(), [expected.weight])
    model(x).square().sum().backward()
    opt.step()
    opt.finish_param_sync()
    assert torch.equal(model.weight, value - LR * grad.sign())
