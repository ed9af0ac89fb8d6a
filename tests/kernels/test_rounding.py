"""The rounding of the reference implementation, on its own: what it must keep, and what it must be on average."""

import pytest
import torch

from lion_dist.kernels.reference import (
    BF16_NAN,
    StepScalars,
    float_to_bits,
    join_main,
    lion_step,
    random_bits,
    round_half_up,
    round_nearest_even,
    round_stochastic,
    split_main,
)
from lion_dist.kernels.update import LionTensors, lion_update_


def every_bf16() -> torch.Tensor:
    """[65536], every bf16 there is."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


def fp32_around_every_bf16() -> torch.Tensor:
    """[65536 * 25] fp32: each upper half with lower halves at and around the tie, at both ends, and at random."""
    upper = torch.arange(2**16).to(torch.int32) << 16
    chosen = [0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF]
    lower = torch.tensor(chosen, dtype=torch.int32).expand(2**16, -1)
    generator = torch.Generator().manual_seed(0)
    lower = torch.cat([lower, torch.randint(2**16, (2**16, 15), generator=generator, dtype=torch.int32)], dim=1)
    return (upper[:, None] | lower).view(torch.float32).reshape(-1)


def test_join_is_the_inverse_of_split():
    x = fp32_around_every_bf16()
    joined = join_main(*split_main(x))
    assert torch.equal(float_to_bits(joined)[~x.isnan()], float_to_bits(x)[~x.isnan()])
    assert joined[x.isnan()].isnan().all()


def test_split_is_the_inverse_of_join_on_what_split_makes():
    """So that an update that changes nothing leaves both halves as they were."""
    param, remainder = split_main(fp32_around_every_bf16())
    again = split_main(join_main(param, remainder))
    assert torch.equal(again[0].view(torch.int16), param.view(torch.int16)) and torch.equal(again[1], remainder)


def test_nearest_even_is_torchs_own_cast():
    x = fp32_around_every_bf16()
    mine, torchs = round_nearest_even(x), x.bfloat16()
    assert torch.equal(mine[~x.isnan()].view(torch.int16), torchs[~x.isnan()].view(torch.int16))
    assert (mine[x.isnan()].view(torch.int16) == BF16_NAN).all()


def test_half_up_differs_from_nearest_even_only_in_ties():
    x = fp32_around_every_bf16()
    x = x[~x.isnan()]
    differ = round_half_up(x).view(torch.int16) != round_nearest_even(x).view(torch.int16)
    assert ((float_to_bits(x)[differ] & 0xFFFF) == 0x8000).all() and differ.any()


def test_a_parameter_that_somebody_sets_to_zero_is_zero_whatever_its_remainder():
    """The sum of the integers would be a NaN: 0x00000000 - 5 is 0xFFFFFFFB."""
    remainders = torch.tensor([-0x8000, -5, -1, 0, 1, 0x7FFF]).to(torch.int16)
    for zero in (0.0, -0.0):
        joined = join_main(torch.full((6,), zero, dtype=torch.bfloat16), remainders)
        assert (joined.abs() < 2**-133).all()  # half of bf16's least number, which rounds to zero
        assert (joined[:4] == 0).all()


def test_every_rounding_keeps_what_bf16_holds_exactly():
    x = every_bf16()
    x = x[~x.isnan()]
    for random16 in (0, 1, 0x8000, 0xFFFF):
        rounded = round_stochastic(x.float(), torch.full(x.shape, random16, dtype=torch.int32))
        assert torch.equal(rounded.view(torch.int16), x.view(torch.int16))
    for rounding in (round_nearest_even, round_half_up):
        assert torch.equal(rounding(x.float()).view(torch.int16), x.view(torch.int16))


def test_no_rounding_makes_a_number_of_a_nan():
    """A carry out of the lower half of 0x7FFFFFFF would make -0 of it."""
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -8388607], dtype=torch.int32).view(torch.float32)
    most = torch.full(nans.shape, 0xFFFF, dtype=torch.int32)
    rounded = (round_nearest_even(nans), round_half_up(nans), round_stochastic(nans, most))
    assert all(x.isnan().all() for x in rounded)


def test_stochastic_rounding_is_unbiased():
    """Over all 65,536 random numbers the mean is the value itself, and only the two neighbours occur."""
    random16 = torch.arange(2**16, dtype=torch.int32)
    for value in (1.001, -3.14159, 1e-40, 2.0**-126, 65280.5, 1.0):
        x = torch.full(random16.shape, value)
        rounded = round_stochastic(x, random16).double()
        assert rounded.unique().numel() <= 2
        assert torch.isclose(rounded.mean(), x[0].double(), rtol=1e-12, atol=0)


@pytest.mark.slow
def test_20000_steps_of_decay_alone_survive_without_main_params():
    """lr * wd = 1e-5 is far below bf16's 2**-8: rounded to nearest, the weights would stay at 1.0 for ever."""
    numel, lr, weight_decay = 2000, 1e-4, 0.1
    param, exp_avg, grad = (torch.full((numel,), x).bfloat16() for x in (1.0, 0.0, 0.0))
    tensors = LionTensors([param], [exp_avg], index_starts=[0], steps=torch.zeros(1, dtype=torch.int64))
    scalars = StepScalars.from_group(lr, (0.9, 0.99), weight_decay)
    for _ in range(20_000):
        lion_update_(tensors, [grad], scalars, seed=1)
    right = (1 - lr * weight_decay) ** 20_000  # 0.8187
    assert abs(param.double().mean().item() / right - 1) < 0.01


def test_a_step_smaller_than_half_a_unit_is_taken_on_average_without_main_params():
    numel = 1 << 16
    param, exp_avg, grad = (torch.full((numel,), x).bfloat16() for x in (1.0, 0.0, 1.0))
    bits = random_bits(torch.arange(numel), 3, torch.tensor(0))
    new_param, _, _ = lion_step(param, None, exp_avg, grad, StepScalars.from_group(1e-4, (0.9, 0.99), 0.0), bits=bits)
    taken = 1.0 - new_param.double().mean().item()
    spread = 2**-8 * (1e-4 / 2**-8) ** 0.5 / numel**0.5  # of the mean of that many Bernoulli trials
    assert abs(taken - 1e-4) < 5 * spread
