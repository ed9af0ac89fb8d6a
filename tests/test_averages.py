"""``ema_decay`` of ``Lion``: the average of the weights, and the context that puts it into the model."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lion_dist.checkpoint
from lion_dist import Lion, PrecisionPolicy
from lion_dist.kernels.reference import random_bits, update_average

FP32, BF16 = torch.float32, torch.bfloat16
DECAY = 0.9
POLICIES = {
    "fp32": (FP32, PrecisionPolicy()),
    "split": (BF16, PrecisionPolicy("split")),
    "fp32 main": (BF16, PrecisionPolicy("fp32")),
    "none, bf16 average": (BF16, PrecisionPolicy("none", ema_dtype=BF16, seed=3)),
    "split, bf16 average, stochastic momentum": (
        BF16,
        PrecisionPolicy("split", momentum_rounding="stochastic", ema_dtype=BF16),
    ),
}
policies = pytest.mark.parametrize("policy", POLICIES)


def mlp(dtype: torch.dtype = FP32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 6, generator=generator).to(next(model.parameters()).dtype)
    model(x).float().square().sum().backward()


def train(model: nn.Module, opt: Lion, steps: range) -> None:
    for step in steps:
        backward(model, step)
        opt.step()
        opt.zero_grad()


def bits_of(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone().view(torch.uint8) for p in module.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def make(policy: str, **options) -> tuple[nn.Module, Lion]:
    dtype, precision = POLICIES[policy]
    model = mlp(dtype)
    settings = {"lr": 0.01, "weight_decay": 0.1, "precision": precision, "ema_decay": DECAY} | options
    return model, Lion(model.parameters(), **settings)


def averages(opt: Lion) -> list[torch.Tensor]:
    return [state["weight_avg"] for state in opt.state.values()]


@policies
def test_the_average_follows_the_weights_as_the_reference_says(policy):
    model, opt = make(policy)
    expected = [p.detach().to(opt.precision.ema_dtype, copy=True) for p in model.parameters()]
    for step in range(4):
        backward(model, step)
        opt.step()
        start = 0
        for i, param in enumerate(model.parameters()):
            index = torch.arange(start, start + param.numel())
            start += param.numel()
            bits = random_bits(index, opt.precision.seed, torch.tensor(step)).view_as(param)
            weights = param.detach(), opt.state[param].get("main_param")
            expected[i] = update_average(expected[i], *weights, param.grad, DECAY, bits=bits)
        opt.zero_grad()
        assert all(map(torch.equal, averages(opt), expected))


@policies
def test_weights_and_momentum_are_what_they_are_without_an_average(policy):
    dtype, precision = POLICIES[policy]
    if precision.ema_dtype is not None:
        precision = PrecisionPolicy(precision.main_params, None, precision.momentum_rounding, precision.seed)
    model, opt = make(policy)
    other = mlp(dtype)
    plain = Lion(other.parameters(), lr=0.01, weight_decay=0.1, precision=precision)
    train(model, opt, range(4))
    train(other, plain, range(4))
    assert same(bits_of(model), bits_of(other))
    for mine, theirs in zip(opt.state.values(), plain.state.values(), strict=True):
        assert all(torch.equal(mine[kind], theirs[kind]) for kind in theirs)


@policies
def test_inside_the_context_parameters_are_averages_and_afterwards_what_they_were(policy):
    model, opt = make(policy)
    train(model, opt, range(3))
    before = bits_of(model)
    with opt.averaged_parameters():
        for param, average in zip(model.parameters(), averages(opt), strict=True):
            assert torch.equal(param, average.to(param.dtype))
        assert not same(bits_of(model), before)
    assert same(bits_of(model), before)


def test_parameters_come_back_after_an_exception():
    model, opt = make("split")
    train(model, opt, range(3))
    before = bits_of(model)
    with pytest.raises(KeyError, match="of the evaluation"), opt.averaged_parameters():
        raise KeyError("of the evaluation")
    assert same(bits_of(model), before)
    train(model, opt, range(3, 4))


@policies
def test_training_goes_on_as_if_nobody_had_looked(policy):
    """With fp32 main params a swap that counted as somebody else's write would change them."""
    (model, opt), (other, untouched) = make(policy), make(policy)
    for step in range(4):
        for pair in ((model, opt), (other, untouched)):
            train(*pair, range(step, step + 1))
        with opt.averaged_parameters():
            model(torch.ones(1, 6).to(next(model.parameters()).dtype))
    assert same(bits_of(model), bits_of(other))
    for mine, theirs in zip(opt.state.values(), untouched.state.values(), strict=True):
        assert all(torch.equal(mine[kind], theirs[kind]) for kind in theirs)


def test_fp32_main_params_that_differ_from_their_parameter_are_not_taken_for_an_outside_write():
    model, opt = make("fp32 main")
    train(model, opt, range(2))
    for param in model.parameters():  # as an element that had no finite gradient may be
        opt.state[param]["main_param"].add_(0.5)
    before = [state["main_param"].clone() for state in opt.state.values()]
    with opt.averaged_parameters():
        pass
    opt.param_groups[0]["lr"] = 0.0
    opt.param_groups[0]["weight_decay"] = 0.0
    train(model, opt, range(2, 3))
    assert all(map(torch.equal, [state["main_param"] for state in opt.state.values()], before))


def test_an_outside_write_before_the_context_still_counts_after_it():
    model, opt = make("fp32 main")
    train(model, opt, range(2))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    with opt.averaged_parameters():
        pass
    opt.param_groups[0]["lr"] = 0.0
    opt.param_groups[0]["weight_decay"] = 0.0
    train(model, opt, range(2, 3))
    assert torch.allclose(opt.state[model[0].weight]["main_param"], torch.tensor(2.0), atol=0.01)


def test_a_graph_does_not_cross_the_border():
    model, opt = make("fp32")
    train(model, opt, range(2))
    x = torch.ones(1, 6, requires_grad=True)
    outside = model(x).sum()
    with opt.averaged_parameters():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(outside, x)
        inside = model(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


@pytest.mark.parametrize("what", ["step", "state_dict", "load_state_dict", "averaged_parameters"])
def test_what_needs_the_weights_is_refused_inside(what):
    model, opt = make("split")
    train(model, opt, range(2))
    saved, before = copy.deepcopy(opt.state_dict()), bits_of(model)
    with opt.averaged_parameters():
        with pytest.raises(RuntimeError, match=rf"{what}\(\) inside averaged_parameters\(\).*Leave the context first"):
            if what == "averaged_parameters":
                with opt.averaged_parameters():
                    pass
            else:
                getattr(opt, what)(*([saved] if what == "load_state_dict" else []))
    assert same(bits_of(model), before)


INSIDE = r"a backward pass inside averaged_parameters\(\).*Leave the context first"


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_backward_inside_is_refused_before_it_leaves_a_gradient(accumulates):
    model, opt = make("fp32")
    train(model, opt, range(2))
    if accumulates:
        backward(model, 2)
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with opt.averaged_parameters():
        with pytest.raises(RuntimeError, match=INSIDE):
            backward(model, 3)
    for param, grad in zip(model.parameters(), before, strict=True):
        assert param.grad is grad is None or torch.equal(param.grad, grad)
    train(model, opt, range(2, 4))


def test_a_backward_of_a_graph_from_before_is_refused_inside_even_where_autograd_does_not_notice():
    """The gradient of a first layer needs no weights."""
    model, opt = make("fp32")
    train(model, opt, range(2))
    outside = model[0](torch.ones(1, 6)).sum()
    with opt.averaged_parameters():
        with pytest.raises(RuntimeError, match=INSIDE):
            outside.backward()
    assert model[0].weight.grad is None


def test_gradients_that_are_only_asked_for_are_those_of_the_average():
    model, opt = make("fp32")
    train(model, opt, range(2))
    other = mlp()
    with torch.no_grad():
        for param, average in zip(other.parameters(), averages(opt), strict=True):
            param.copy_(average)
    x, same_x = torch.ones(1, 6, requires_grad=True), torch.ones(1, 6, requires_grad=True)
    with opt.averaged_parameters():
        found = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
        model(x).sum().backward(inputs=[x])
    assert same(found, torch.autograd.grad(other(same_x).sum(), [same_x, *other.parameters()]))
    assert torch.equal(x.grad, found[0]) and all(p.grad is None for p in model.parameters())


def test_the_context_may_be_entered_in_inference_mode():
    model, opt = make("fp32")
    train(model, opt, range(2))
    before = bits_of(model)
    with torch.inference_mode(), opt.averaged_parameters():
        assert all(map(torch.equal, model.parameters(), averages(opt)))
    assert same(bits_of(model), before)
    train(model, opt, range(2, 3))


@pytest.mark.parametrize("how", ["save", "load"])
def test_checkpoints_are_refused_inside(tmp_path, how):
    model, opt = make("split")
    train(model, opt, range(2))
    lion_dist.checkpoint.save(tmp_path / "a", model=model, optimizer=opt)
    before = bits_of(model)
    call = {"save": lion_dist.checkpoint.save, "load": lion_dist.checkpoint.load}[how]
    with opt.averaged_parameters(), pytest.raises(RuntimeError, match=r"inside averaged_parameters\(\), "):
        call(tmp_path / ("a" if how == "load" else "b"), model=model, optimizer=opt)
    assert same(bits_of(model), before) and not (tmp_path / "b").exists()


def test_a_skipped_step_leaves_the_average_as_it_was():
    model, opt = make("none, bf16 average")
    train(model, opt, range(2))
    before = [average.clone() for average in averages(opt)]
    backward(model, 2)
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    opt.step()
    assert all(map(torch.equal, averages(opt), before))


@policies
def test_a_state_dict_carries_the_average(policy):
    model, opt = make(policy)
    train(model, opt, range(3))
    other, second = make(policy)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(opt.state_dict()))
    for pair in ((model, opt), (other, second)):
        train(*pair, range(3, 5))
    assert same(bits_of(model), bits_of(other)) and all(map(torch.equal, averages(opt), averages(second)))


def test_without_one_in_the_file_the_average_begins_at_the_parameters():
    model, plain = make("fp32", ema_decay=None)
    train(model, plain, range(3))
    opt = Lion(model.parameters(), lr=0.01, ema_decay=DECAY)
    opt.load_state_dict(plain.state_dict())
    assert all(map(torch.equal, averages(opt), model.parameters()))


def test_a_loaded_average_that_nobody_keeps_is_said_to_be_left_out():
    model, opt = make("fp32")
    train(model, opt, range(1))
    _, plain = make("fp32", ema_decay=None)
    with pytest.warns(UserWarning, match="has an average of the weights, which is left out.*ema_decay"):
        plain.load_state_dict(opt.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("fp32")[1].load_state_dict(opt.state_dict())


def test_a_parameter_that_was_never_trained_stays_as_it_is():
    model, opt = make("fp32")
    model[2].weight.requires_grad_(False)
    train(model, opt, range(2))
    with opt.averaged_parameters():
        assert torch.equal(model[2].weight, mlp()[2].weight)


def test_a_copied_optimizer_goes_on():
    model, opt = make("split")
    train(model, opt, range(2))
    both = copy.deepcopy((model, opt))
    for pair in (both, (model, opt)):
        train(*pair, range(2, 4))
    assert same(bits_of(model), bits_of(both[0])) and all(map(torch.equal, averages(opt), averages(both[1])))


@pytest.mark.parametrize("wrong", [1.0, -0.1, "0.9", float("nan"), True])
def test_a_decay_outside_of_0_to_1_is_refused(wrong):
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got .*Pass 0.999"):
        Lion(mlp().parameters(), ema_decay=wrong)


def test_a_dtype_without_an_average_is_refused():
    with pytest.raises(ValueError, match="ema_dtype=torch.bfloat16, but no average.*Pass ema_decay=0.999"):
        Lion(mlp().parameters(), precision=PrecisionPolicy(ema_dtype=BF16))
    with pytest.raises(ValueError, match="ema_dtype must be"):
        PrecisionPolicy(ema_dtype=torch.float16)


def test_a_decay_in_a_param_group_is_refused():
    with pytest.raises(ValueError, match="ema_decay=0.9, which is a setting of the whole optimizer"):
        Lion([{"params": list(mlp().parameters()), "ema_decay": 0.9}])


def test_the_context_of_an_optimizer_without_an_average_is_refused():
    with pytest.raises(RuntimeError, match="averaged_parameters.. is for ema_decay"):
        with make("fp32", ema_decay=None)[1].averaged_parameters():
            pass
