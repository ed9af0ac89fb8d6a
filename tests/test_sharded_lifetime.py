"""What happens to a model around its ShardedLion: memory taken away and given back, one optimizer after another."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig, this_ranks_part
from lion_dist.sharding.bucket import ParamState
from tests.models import make_batch, make_model, mlp
from tests.oracle import assert_same_on_all_ranks

BF16 = torch.bfloat16


def step(model: nn.Module, opt, number: int) -> None:
    """The same batch on every rank."""
    opt.zero_grad()
    make_batch(number, 0, 0, detour=True).loss(model).backward()
    opt.step()


def params_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ---- parameters that are given other memory


def by_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, model.parameters())


def by_data(model: nn.Module) -> None:
    for param in model.parameters():
        param.data = param.data * 0.5


def by_set(model: nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.set_(param.detach() * 0.5)


MOVES = {"vector_to_parameters": by_vector, "data": by_data, "set_": by_set}


def train_through(move: str, dtype: torch.dtype, main_params: str, with_module: bool) -> None:
    """Halved in the middle, ShardedLion goes on as Lion does, whose parameters may lie anywhere."""
    models = make_model(dtype), make_model(dtype)
    policy = PrecisionPolicy(main_params=main_params)
    opt = ShardedLion(models[0].parameters(), lr=1e-2, module=models[0] if with_module else None, precision=policy)
    lion = Lion(models[1].parameters(), lr=1e-2, precision=policy)
    for number in range(4):
        if number == 2:
            for model in models:
                opt.finish_param_sync()
                MOVES[move](model)
        step(models[0], opt, number)
        step(models[1], lion, number)
    opt.finish_param_sync()
    for (name, mine), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, expected), name
    assert_same_on_all_ranks(models[0])


@pytest.mark.parametrize("with_module", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_parameters_that_are_given_other_memory_train_on_from_there(gloo, move, with_module):
    """They once did not: the optimizer went on updating memory that the model no longer read."""
    gloo.run(2, train_through, move, torch.float32, "auto", with_module)


@pytest.mark.parametrize("main_params", ["split", "fp32"])
def test_main_params_follow_parameters_that_are_given_other_memory(gloo, main_params):
    gloo.run(2, train_through, "data", BF16, main_params, True)


def convert_after_construction(update_in_backward: bool) -> str:
    model = mlp(8, 8, 8)
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(update_in_backward=update_in_backward))
    model.to(BF16)
    with pytest.raises(RuntimeError) as raised:
        model(torch.ones(2, 8, dtype=BF16)).sum().backward()
        opt.step()
    return str(raised.value)


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_a_model_converted_after_construction_is_refused_with_the_remedy(gloo, update_in_backward):
    (message,) = gloo.run(1, convert_after_construction, update_in_backward)
    assert "is torch.bfloat16 (8, 8) on cpu now and was torch.float32" in message
    assert "construct the optimizer after" in message


# ---- one optimizer after another


def construct_a_second() -> str:
    model = mlp(8, 8)
    first = ShardedLion(model.parameters(), module=model)
    with pytest.raises(ValueError) as raised:
        ShardedLion(model.parameters(), module=model)
    model(torch.ones(2, 8)).sum().backward()
    first.step()  # and is none the worse
    return str(raised.value)


def test_a_second_optimizer_over_the_same_parameters_is_refused(gloo):
    """It would step by zeros: the first one's hooks take every gradient."""
    for message in gloo.run(2, construct_a_second):
        assert "parameter '0.weight' belongs to another ShardedLion" in message and "close()" in message


def one_after_another(how: str) -> None:
    model, expected = make_model(), make_model()
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model)
    lion = Lion(expected.parameters(), lr=1e-2)
    for number in range(2):
        step(model, opt, number)
        step(expected, lion, number)
    if how == "closed":
        opt.close()
        with pytest.raises(RuntimeError, match="closed"):
            opt.step()
    del opt
    opt, lion = ShardedLion(model.parameters(), lr=1e-2, module=model), Lion(expected.parameters(), lr=1e-2)
    for number in range(2, 4):
        step(model, opt, number)
        step(expected, lion, number)
    opt.finish_param_sync()
    for mine, theirs in zip(params_of(model), params_of(expected), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_another_optimizer_can_follow_one_that_is(gloo, how):
    gloo.run(2, one_after_another, how)


def close() -> None:
    model = make_model()
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model)
    step(model, opt, 0)
    opt.close()
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert all(type(module._parameters) is dict for module in model.modules())
    assert_same_on_all_ranks(model)
    make_batch(1, 0, 0, detour=True).loss(model).backward()
    assert all(p.grad is not None for p in model.up.parameters())


def test_closing_leaves_a_whole_model_without_hooks(gloo):
    gloo.run(2, close)


def share_a_model() -> None:
    """Half of the parameters each. Readers wait for both, until one lets go; then for the other."""
    model = mlp(8, 8)
    opts = [ShardedLion([param], lr=0.1, module=model) for param in model.parameters()]
    for closed in ([], [0], [0, 1]):
        for i in closed:
            opts[i].close()
        model(torch.ones(2, 8)).sum().backward()
        for opt in opts[len(closed) :]:
            opt.step()
        [model[0].weight, model[0].bias]
        assert all(bucket.param_state is ParamState.FULL for opt in opts for bucket in opt.buckets)
    assert type(model[0]._parameters) is dict


def test_two_optimizers_share_a_model(gloo):
    gloo.run(2, share_a_model)


def test_a_model_with_an_optimizer_is_copied_and_pickled_without_it(tmp_path):
    model = mlp(4, 4)
    opt = ShardedLion(model.parameters(), module=model)
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), twin):
        ShardedLion(other.parameters(), module=other)  # its parameters belong to nobody
    opt.close()


# ---- graphs that outlive a step


def backward_through_an_old_graph(optimizer: type) -> str:
    model = mlp(8, 8, 8)
    opt = optimizer(model.parameters(), lr=0.1)
    loss = model(torch.ones(2, 8)).square().sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError) as raised:
        loss.backward()
    return str(raised.value)


@pytest.mark.parametrize("optimizer", [Lion, ShardedLion])
def test_backward_through_a_graph_from_before_the_step_is_refused_by_autograd(gloo, optimizer):
    """Its weights have changed since: the gradients would be wrong, in silence."""
    assert "modified by an inplace operation" in gloo.run(1, backward_through_an_old_graph, optimizer)[0]


# ---- names


def same_names_twice() -> str:
    actor, critic = mlp(4, 4), mlp(4, 4)
    with pytest.raises(ValueError) as raised:
        ShardedLion([*actor.named_parameters(), *critic.named_parameters()])
    return str(raised.value)


def test_two_parameters_of_one_name_are_refused(gloo):
    """State goes by name: one would overwrite the other in every checkpoint."""
    assert "two parameters are called '0.weight'" in gloo.run(1, same_names_twice)[0]


def load_with_the_default_of_torch(path: str) -> None:
    model = mlp(8, 8)
    opt = ShardedLion(model.parameters(), lr=0.1)
    model(torch.ones(2, 8)).sum().backward()
    opt.step()
    path = f"{path}.{dist.get_rank()}"
    torch.save(this_ranks_part(opt.state_dict()), path)
    momenta = [shard.exp_avg.clone() for shard in opt.shards]
    opt.close()
    other = ShardedLion(mlp(8, 8).parameters())
    other.load_state_dict(torch.load(path))  # weights_only=True
    assert all(torch.equal(shard.exp_avg, m) for shard, m in zip(other.shards, momenta, strict=True))


def test_a_state_dict_is_read_back_by_torch_load_without_unpickling_code(gloo, tmp_path):
    gloo.run(2, load_with_the_default_of_torch, str(tmp_path / "state"))


def broadcast_a_strided_buffer() -> list[float]:
    model = mlp(4, 4)
    model.register_buffer("every_other", (torch.arange(8.0) + 10 * dist.get_rank())[::2])
    ShardedLion(model.parameters(), module=model)
    gc.collect()
    return model.every_other.tolist()


def test_buffers_with_gaps_in_memory_become_the_first_ranks_too(gloo):
    assert gloo.run(2, broadcast_a_strided_buffer) == [[0.0, 2.0, 4.0, 6.0]] * 2
