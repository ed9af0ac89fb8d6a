"""Loading into another precision: exact where it can be, else rounded once, and said."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from lion_dist import Lion, PrecisionPolicy, checkpoint
from lion_dist.checkpoint.conversion import exact_value

KEPT = {  # parameter dtype, main params: what keeps fp32 precision, and what does not
    "own": (torch.float32, "auto"),
    "split": (torch.bfloat16, "split"),
    "fp32": (torch.bfloat16, "fp32"),
    "none": (torch.bfloat16, "none"),
}


def trained(kind, steps, momentum_dtype=torch.float32):
    dtype, main_params = KEPT[kind]
    torch.manual_seed(0)
    model = nn.Linear(9, 5, dtype=dtype)
    policy = PrecisionPolicy(main_params=main_params, momentum_dtype=momentum_dtype)
    optimizer = Lion(model.parameters(), lr=1e-3, weight_decay=0.1, precision=policy)
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(param.dtype)
        optimizer.step()


def values(model, optimizer):
    """fp32: what the parameters stand for."""
    mains = [optimizer.state_of(p).get("main_param") for p in model.parameters()]
    return [
        exact_value(p.detach().clone(), main if main is None else main.clone())
        for p, main in zip(model.parameters(), mains, strict=True)
    ]


@pytest.mark.parametrize("saved, loaded", list(itertools.permutations(["own", "split", "fp32"], 2)))
def test_what_keeps_fp32_precision_moves_exactly_and_goes_on_with_the_same_bits(tmp_path, saved, loaded):
    model, optimizer = trained(saved, range(4))
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    other, other_optimizer = trained(loaded, range(50, 51))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.load(tmp_path / "c", model=other, optimizer=other_optimizer)
    for _ in range(2):
        assert all(
            torch.equal(a, b) for a, b in zip(values(model, optimizer), values(other, other_optimizer), strict=True)
        )
        train(model, optimizer, range(4, 8))
        train(other, other_optimizer, range(4, 8))


@pytest.mark.parametrize("saved", ["own", "split", "fp32"])
def test_dropping_the_main_params_rounds_once_and_says_so(tmp_path, saved):
    model, optimizer = trained(saved, range(4))
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    other, other_optimizer = trained("none", range(1))
    with pytest.warns(UserWarning, match="in fp32 precision are rounded to torch.bfloat16 here, once"):
        checkpoint.load(tmp_path / "c", model=other, optimizer=other_optimizer)
    for value, param in zip(values(model, optimizer), other.parameters(), strict=True):
        half_step = torch.finfo(torch.bfloat16).eps / 2
        assert ((value - param.float()).abs() <= half_step * value.abs()).all()
        assert not torch.equal(value, param.float())


@pytest.mark.parametrize("loaded", ["own", "split", "fp32"])
def test_parameters_without_main_params_give_exact_ones(tmp_path, loaded):
    model, optimizer = trained("none", range(4))
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    other, other_optimizer = trained(loaded, range(50, 53))
    checkpoint.load(tmp_path / "c", model=other, optimizer=other_optimizer)
    for param, value in zip(model.parameters(), values(other, other_optimizer), strict=True):
        assert torch.equal(param.float(), value)


def test_a_momentum_becomes_bf16_once_and_says_so(tmp_path):
    model, optimizer = trained("own", range(4))
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    other, other_optimizer = trained("own", range(1), momentum_dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="the saved exp_avg is torch.float32; it is kept as torch.bfloat16"):
        checkpoint.load(tmp_path / "c", model=other, optimizer=other_optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["exp_avg"].bfloat16(), other_optimizer.state[b]["exp_avg"])


def test_state_that_the_checkpoint_lacks_starts_at_zero_and_says_so(tmp_path):
    model, optimizer = trained("own", range(4))
    model.bias.requires_grad_(False)
    fresh = Lion(model.parameters(), lr=1e-3)
    checkpoint.save(tmp_path / "c", model=model, optimizer=fresh)
    model.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"starts at zero: exp_avg \(1: bias"):
        checkpoint.load(tmp_path / "c", model=model, optimizer=optimizer)
    assert not optimizer.state[model.bias]["exp_avg"].any()


def test_state_of_a_parameter_that_is_frozen_here_is_left_out_and_that_is_said(tmp_path):
    model, optimizer = trained("own", range(4))
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    model.bias.requires_grad_(False)
    with pytest.warns(UserWarning, match="of parameters that this optimizer does not hold is left out"):
        checkpoint.load(tmp_path / "c", model=model, optimizer=Lion(model.parameters()))


def test_parameters_frozen_after_training_keep_their_state(tmp_path):
    model, optimizer = trained("own", range(4))
    model.bias.requires_grad_(False)
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    expected = optimizer.state[model.bias]["exp_avg"].clone()
    other, other_optimizer = trained("own", range(1))
    checkpoint.load(tmp_path / "c", model=other, optimizer=other_optimizer)
    assert torch.equal(other_optimizer.state[other.bias]["exp_avg"], expected)


@pytest.mark.parametrize("saved", ["split", "fp32"])
def test_a_parameter_that_is_frozen_here_takes_the_exact_value(tmp_path, saved):
    model, optimizer = trained(saved, range(4))
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    other = nn.Linear(9, 5).requires_grad_(False)
    with pytest.warns(UserWarning, match="of parameters that this optimizer does not hold is left out"):
        checkpoint.load(tmp_path / "c", model=other, optimizer=Lion(other.parameters()))
    for value, param in zip(values(model, optimizer), other.parameters(), strict=True):
        assert torch.equal(value, param)
        assert not torch.equal(value, value.bfloat16().float())
