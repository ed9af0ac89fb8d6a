"""What programs do around and within backward: hooks of their own, passes that end early, graphs used twice."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion, ShardingConfig
from lion_dist.sharding.bucket import GradState
from tests.models import GivenGradients, mlp
from tests.oracle import Oracle, assert_same_on_all_ranks, assert_same_params

STAGES = pytest.mark.parametrize("stage", [1, 2])
SETTINGS = dict(lr=2**-7, weight_decay=0.5)


# ---- hooks that the program registers


def see_gradients_in_hooks(stage: int, in_backward: bool) -> None:
    """Of every parameter, wherever it is in its bucket."""
    model = mlp(8, 8, 8, 8)
    sharding = ShardingConfig(stage, bucket_numel=100, update_in_backward=in_backward)
    opt = ShardedLion(model.parameters(), module=model, sharding=sharding)
    assert len(opt.buckets) > 2
    seen = {}
    for name, param in model.named_parameters():
        param.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad is not None}))
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        assert seen == dict.fromkeys(dict(model.named_parameters()), True)
        opt.step()
        seen.clear()


@pytest.mark.parametrize(("stage", "in_backward"), [(1, False), (2, False), (2, True)])
def test_hooks_registered_after_construction_see_every_gradient(gloo, stage, in_backward):
    gloo.run(2, see_gradients_in_hooks, stage, in_backward)


def double_gradient(param: Tensor) -> None:
    param.grad *= 2


def change_gradients_in_hooks(register: str) -> None:
    """Hooks double every gradient and drop the first bias's."""
    models = [mlp(8, 8, 8), mlp(8, 8, 8)]
    opts: list = [Lion(models[1].parameters(), **SETTINGS)]
    sharding = ShardingConfig(bucket_numel=64, average=False)
    if register == "after":
        opts.insert(0, ShardedLion(models[0].parameters(), sharding=sharding, **SETTINGS))
    for model in models:
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(double_gradient)
        model[0].bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    if register == "before":
        opts.insert(0, ShardedLion(models[0].parameters(), sharding=sharding, **SETTINGS))
    for _ in range(3):
        for model, opt in zip(models, opts, strict=True):
            model(torch.ones(2, 8)).square().sum().backward()
            opt.step()
            opt.zero_grad()
    assert_same_params(*models)
    assert torch.equal(models[0][0].bias, mlp(8, 8, 8)[0].bias), "a gradient that was set to None is none"


@pytest.mark.parametrize("register", ["before", "after"])
def test_hooks_change_gradients_as_with_any_optimizer(gloo, register):
    gloo.run(1, change_gradients_in_hooks, register)


def started_within_backward() -> int:
    """Reductions that have started when the first layer's gradient comes: with no hooks but ours nothing is late."""
    model = mlp(8, 8, 8, 8)
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(bucket_numel=1))
    started = []
    count = lambda _: started.append(sum(b.grad_state is not GradState.EMPTY for b in opt.buckets))  # noqa: E731
    model[0].weight.register_hook(count)
    model(torch.ones(2, 8)).sum().backward()
    return started[0]


def test_without_other_hooks_a_bucket_leaves_at_once(gloo):
    assert set(gloo.run(2, started_within_backward)) <= {4, 5}


def zero_grad_within_backward() -> float:
    """What came before is forgotten on every rank; what comes after counts, once."""
    model = GivenGradients((64,), (64,), (64,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(bucket_numel=64))
    model.weights[1].register_post_accumulate_grad_hook(lambda _: opt.zero_grad())
    model.loss([torch.ones(64)] * 3).backward()
    norm = opt.grad_norm().item()
    opt.step()
    return norm


def test_zero_grad_within_backward_forgets_what_came_before(gloo):
    norms = gloo.run(2, zero_grad_within_backward, timeout=30)
    assert norms == [8.0, 8.0]


# ---- passes that end in an exception


def end_a_pass_early(stage: int, forget: bool) -> str | None:
    """A user's hook raises in the first layer, when the last layer's gradients are on their way."""
    model = mlp(8, 8, 8)
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(stage, bucket_numel=1))

    def explode(_grad):
        raise FloatingPointError

    handle = model[0].weight.register_hook(explode)
    with pytest.raises(FloatingPointError):
        model(torch.ones(2, 8)).sum().backward()
    handle.remove()
    if forget:
        opt.zero_grad()
        model(torch.ones(2, 8)).sum().backward()
        opt.step()
        return None
    with pytest.raises(RuntimeError) as raised:
        model(torch.ones(2, 8)).sum().backward()
    opt.zero_grad()
    model(torch.ones(2, 8)).sum().backward()
    opt.step()
    return str(raised.value)


@STAGES
def test_a_pass_after_one_that_an_exception_ended_says_so(gloo, stage):
    """It once blamed reentrant checkpointing."""
    for message in gloo.run(2, end_a_pass_early, stage, False):
        assert "an exception has ended the last backward pass" in message and "Call zero_grad()" in message
        assert "eentrant" not in message
    gloo.run(2, end_a_pass_early, stage, True)


def end_a_pass_before_anything_is_reduced() -> None:
    """Then the next pass adds to it, as with any optimizer."""
    model = GivenGradients((64,), (64,))
    opt = ShardedLion(model.parameters())  # one bucket
    handle = model.weights[0].register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.loss([torch.ones(64)] * 2).backward()
    handle.remove()
    assert model.weights[1].grad is not None, "autograd comes to the last parameter first"
    for _ in range(2):
        model.loss([torch.ones(64)] * 2).backward()
    assert opt.grad_norm().item() == pytest.approx((64 * 4 + 64 * 9) ** 0.5)
    opt.step()


def test_a_pass_adds_to_one_that_an_exception_ended_before_anything_was_reduced(gloo):
    gloo.run(2, end_a_pass_before_anything_is_reduced)


def give_a_parameter_two_gradients() -> str:
    model = GivenGradients((64,), (64,), (64,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(bucket_numel=64))

    def run_backward_within(_grad: Tensor) -> None:
        with torch.enable_grad():
            model.loss([None, None, torch.ones(64)]).backward()

    handle = model.weights[1].register_hook(run_backward_within)
    with pytest.raises(RuntimeError) as raised:
        model.loss([torch.ones(64)] * 3).backward()
    handle.remove()
    opt.zero_grad()
    model.loss([torch.ones(64), None, torch.ones(64)]).backward()
    opt.step()
    return str(raised.value)


def test_a_second_gradient_within_one_pass_is_refused_with_its_cause(gloo):
    for says in gloo.run(2, give_a_parameter_two_gradients):
        assert "'param.2' received a second gradient in one backward pass" in says and "use_reentrant=False" in says


# ---- graphs


def train_beside_the_oracle(backward) -> None:
    model = mlp(8, 8, 8)
    expected = copy.deepcopy(model)
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(bucket_numel=64), **SETTINGS)
    oracle = Oracle(expected, Lion(expected.parameters(), **SETTINGS), dist.get_world_size())
    for step in range(3):
        x = [torch.full((2, 8), 1.0 + step + rank) for rank in range(dist.get_world_size())]
        backward(model, model(x[dist.get_rank()]).square().mean())
        for _ in range(2 if backward is twice else 1):
            oracle.backward([lambda m, x=x: m(x).square().mean() for x in x])
        if backward is of_some:
            for param in expected[0].parameters():
                oracle._totals.pop(param)
        opt.step()
        oracle.step()
    opt.finish_param_sync()
    assert_same_params(model, expected)
    assert_same_on_all_ranks(model)


def twice(_model: nn.Module, loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def of_some(model: nn.Module, loss: Tensor) -> None:
    loss.backward(inputs=list(model[2].parameters()))


def with_a_graph(_model: nn.Module, loss: Tensor) -> None:
    loss.backward(create_graph=True)


def through_autograd_grad(model: nn.Module, loss: Tensor) -> None:
    for param, grad in zip(
        model.parameters(), torch.autograd.grad(loss, list(model.parameters()), create_graph=True), strict=True
    ):
        param.grad = grad


@pytest.mark.parametrize("backward", [twice, of_some, with_a_graph, through_autograd_grad])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_every_way_to_run_backward_counts(gloo, backward):
    gloo.run(2, train_beside_the_oracle, backward)


# ---- sparse


def train_a_sparse_embedding(with_module: bool) -> str:
    model = nn.Sequential(nn.Embedding(5, 8, sparse=True), nn.Linear(8, 8))
    before = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    with pytest.raises(TypeError) as raised:
        opt = ShardedLion(model.parameters(), module=model if with_module else None)
        model(torch.tensor([1])).sum().backward()
        opt.step()
    for param, (pointer, value) in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, value) and (not with_module or param.data_ptr() == pointer)
    return str(raised.value)


@pytest.mark.parametrize("with_module", [False, True])
def test_a_sparse_embedding_is_refused_before_anything_moves(gloo, with_module):
    for message in gloo.run(2, train_a_sparse_embedding, with_module):
        assert "is sparse" in message and "sparse=False" in message


def write_a_sparse_gradient(in_backward: bool) -> None:
    """The first parameter's is sparse; its bucket is the last to leave. The others are not updated before it."""
    model = GivenGradients((8, 8), (64,), (64,))
    before = [p.detach().clone() for p in model.weights]
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(bucket_numel=64, update_in_backward=in_backward))
    for param in model.weights:
        param.grad = torch.ones_like(param)
    model.weights[0].grad = torch.eye(8).to_sparse()
    with pytest.raises(TypeError, match="gradient of 'param.0' is sparse"):
        opt.step()
    opt.zero_grad()
    for param, value in zip(model.weights, before, strict=True):
        assert torch.equal(param, value)
    model.loss([torch.ones(8, 8), torch.ones(64), torch.ones(64)]).backward()
    opt.step()


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_sparse_gradient_is_refused_before_others_are_used(gloo, in_backward):
    gloo.run(2, write_a_sparse_gradient, in_backward)


def test_sparse_parameters_are_refused_before_anything_moves():
    model = nn.Linear(4, 4)
    sparse = nn.Parameter(torch.eye(4).to_sparse())
    pointer = model.weight.data_ptr()
    with pytest.raises(TypeError, match="'param.2' has the layout torch.sparse_coo.*dense"):
        ShardedLion([*model.parameters(), sparse])
    assert model.weight.data_ptr() == pointer
