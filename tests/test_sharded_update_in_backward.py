"""``update_in_backward=True`` arrives at the bits of the ordinary step, earlier."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lion_dist
from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig

BF16, FP32 = torch.bfloat16, torch.float32
WIDTH, LAYERS, STEPS = 12, 4, 4


@dataclass(frozen=True)
class Case:
    name: str
    stage: int = 2
    micro_batches: int = 1
    dtype: torch.dtype = FP32
    with_module: bool = True
    precision: PrecisionPolicy = field(default_factory=PrecisionPolicy)


CASES = [
    Case("stage 2"),
    Case("stage 1", stage=1),
    Case("stage 2, accumulated", micro_batches=3),
    Case("stage 1, accumulated", stage=1, micro_batches=3),
    Case("split, accumulated", dtype=BF16, micro_batches=2),
    Case("fp32 main params", dtype=BF16, precision=PrecisionPolicy(main_params="fp32")),
    Case("none, stochastic", dtype=BF16, precision=PrecisionPolicy("none", momentum_rounding="stochastic", seed=3)),
    Case("without module", with_module=False),
]


def make_model(dtype: torch.dtype = FP32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh()))).to(dtype)


def make_optimizer(model: nn.Module, case: Case = CASES[0], in_backward: bool = True, **arguments) -> ShardedLion:
    sharding = ShardingConfig(zero_stage=case.stage, bucket_numel=WIDTH * WIDTH, update_in_backward=in_backward)
    module = model if case.with_module else None
    settings = dict(lr=1e-2, weight_decay=0.1, precision=case.precision)
    return ShardedLion(model.parameters(), module=module, sharding=sharding, **settings | arguments)


def batch(step: int, micro_batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_batch + dist.get_rank())
    return torch.randn(5, WIDTH, generator=generator)


def backward(model: nn.Module, step: int, micro_batch: int = 0) -> None:
    x = batch(step, micro_batch).to(next(model.parameters()).dtype)
    (model(x) - x).float().square().mean().backward()


def train(case: Case, in_backward: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    model = make_model(case.dtype)
    optimizer = make_optimizer(model, case, in_backward)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for i in range(case.micro_batches - 1):
            with optimizer.no_sync():
                backward(model, step, i)
        backward(model, step, case.micro_batches - 1)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish_param_sync()
    momenta = [shard.exp_avg.clone() for shard in optimizer.shards]
    return [p.detach().clone() for p in model.parameters()], momenta, optimizer.taken_steps()


def train_both_ways(case: Case) -> None:
    (params, momenta, steps), (expected, expected_momenta, _) = train(case, True), train(case, False)
    assert steps == STEPS
    for found, wanted in zip(params + momenta, expected + expected_momenta, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_are_those_of_the_ordinary_step(gloo, case, ranks):
    gloo.run(ranks, train_both_ways, case)


def last_layer_when_the_first_has_its_gradient() -> bool:
    model = make_model()
    optimizer = make_optimizer(model)
    last = model[-2].weight
    before, seen = last.detach().clone(), []
    bucket = optimizer.grad_scheduler.bucket_of(last)
    start, stop = bucket.layout.shard_range(bucket.groups.shard_rank)
    model[0].weight.register_hook(lambda _: seen.append(bucket.flat_params[start:stop].clone()))
    own = bucket.flat_params[start:stop].clone()
    backward(model, 0)
    optimizer.step()
    optimizer.finish_param_sync()
    assert not torch.equal(last, before)
    return not torch.equal(seen[0], own)


def test_the_last_layer_is_updated_before_backward_reaches_the_first(gloo):
    assert all(gloo.run(2, last_layer_when_the_first_has_its_gradient))


def step_with_and_without_a_batch() -> list[torch.Tensor]:
    model = make_model()
    optimizer = make_optimizer(model)
    for step in range(3):
        if dist.get_rank() == 0 or step != 1:
            backward(model, step)
        optimizer.step()
    optimizer.finish_param_sync()
    return [p.detach().clone() for p in model.parameters()]


def test_a_rank_without_a_batch_takes_part_with_zeros(gloo):
    first, second = gloo.run(2, step_with_and_without_a_batch)
    assert all(map(torch.equal, first, second))


def misuse(what: str) -> str:
    model = make_model()
    optimizer = make_optimizer(model)
    backward(model, 0)
    try:
        if what == "clip":
            optimizer.clip_grad_norm_(1.0)
        elif what == "second backward":
            backward(model, 1)
        elif what == "scaler":
            scaler = lion_dist.GradScaler("cpu")
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
        else:
            with optimizer.no_sync():
                optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("clip", "no norm to clip by"),
        ("second backward", "inside no_sync"),
        ("scaler", "no norm to clip by, to read or to scale by"),
        ("step inside no_sync", "has to run outside of it"),
    ],
)
def test_what_needs_a_verdict_is_refused(gloo, what, says):
    assert says in gloo.run(1, misuse, what)[0]


def construct(arguments: dict) -> str:
    try:
        make_optimizer(make_model(), **arguments)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("arguments", [{"cautious": True}, {"metrics_every": 5}], ids=str)
def test_what_needs_the_whole_step_is_refused(gloo, arguments):
    assert "need update_in_backward=False" in gloo.run(1, construct, arguments)[0]


@pytest.mark.parametrize("arguments", [{"param_sync": "coded"}, {"check_replicas_every": 3}], ids=str)
def test_what_needs_a_moment_between_old_and_new_is_refused(arguments):
    with pytest.raises(ValueError, match="update_in_backward=False"):
        ShardingConfig(update_in_backward=True, **arguments)


def freeze_in_the_middle() -> None:
    """A frozen layer shares its bucket with one that trains; it stays, and so do the gradients that pass through it."""
    models = [make_model(), make_model()]
    optimizers = [
        ShardedLion(model.parameters(), lr=1e-2, weight_decay=0.1, module=model, sharding=sharding)
        for model, sharding in zip(models, (ShardingConfig(update_in_backward=True), ShardingConfig()), strict=True)
    ]
    assert len(optimizers[0].buckets) == 1
    for step in range(4):
        if step == 1:
            for model in models:
                model[0].requires_grad_(False)
        before = models[0][0].weight.detach().clone()
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.finish_param_sync()
        assert torch.equal(models[0][0].weight, before) == (step > 0)
    for mine, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_parameter_that_is_frozen_after_construction_stays(gloo, ranks):
    """It has momentum and weight decay, and its bucket is updated."""
    gloo.run(ranks, freeze_in_the_middle)


def zero_grad_between_backward_and_step() -> None:
    """What backward has begun to update is finished, not left for the next backward to trip over."""
    model = make_model()
    optimizer = make_optimizer(model)
    for step in range(3):
        backward(model, step)
        optimizer.zero_grad()
    backward(model, 3)
    optimizer.step()
    optimizer.finish_param_sync()


def test_zero_grad_between_backward_and_step_leaves_whole_updates(gloo):
    gloo.run(2, zero_grad_between_backward_and_step)
