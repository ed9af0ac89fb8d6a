"""The average of the weights: its equation, and what its storage keeps."""

import numpy as np
import pytest
import torch

from lion_dist.kernels.reference import StepScalars, join_main, random_bits, split_main, update_average
from lion_dist.kernels.update import LionTensors, lion_update_
from tests.kernels.cases import BF16, FP32, INT16

N = 4096


def normal(seed: int) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


def test_every_operation_is_rounded_once():
    average, weight, decay = normal(1), normal(2), 0.999
    expected = average.numpy() * np.float32(decay) + weight.numpy() * np.float32(1 - decay)
    result = update_average(average, weight, None, torch.zeros(N), decay)
    assert expected.dtype == np.float32 and np.array_equal(result.numpy(), expected)


def test_the_weight_is_the_value_of_the_main_param():
    average, value = normal(1), normal(2)
    expected = update_average(average, value, None, torch.zeros(N), 0.9)
    rounded, remainder = split_main(value)
    assert torch.equal(join_main(rounded, remainder), value)
    for main in (value, remainder):
        assert torch.equal(update_average(average, rounded, main, torch.zeros(N), 0.9), expected)
    assert not torch.equal(update_average(average, rounded, None, torch.zeros(N), 0.9), expected)


def test_without_main_params_the_weight_is_the_stored_one():
    """Elements that a step moves by a fraction of bf16's spacing: the average follows what the model reads."""
    params, exp_avgs = [torch.ones(N).bfloat16()], [torch.zeros(N).bfloat16()]
    tensors = LionTensors(params, exp_avgs, None, [0], torch.zeros(1, dtype=torch.int64), False, [torch.zeros(N)], 0.0)
    lion_update_(tensors, [torch.ones(N).bfloat16()], StepScalars.from_group(1e-3, (0.9, 0.99), 0.0))
    assert torch.equal(tensors.averages[0], params[0].float()) and params[0].unique().numel() == 2


def test_a_bf16_average_follows_weights_that_move_by_far_less_than_its_spacing():
    """(1 - 0.9999) * 0.01 is far below bf16's 2**-8: rounded to nearest, the average would stay at 1.0 for ever."""
    average, weight, index = torch.ones(N, dtype=BF16), torch.full((N,), 1.01), torch.arange(N)
    for step in range(2000):
        bits = random_bits(index, 0, torch.tensor(step))
        average = update_average(average, weight, None, torch.zeros(N), 0.9999, bits=bits)
    right = 1 + 0.01 * (1 - 0.9999**2000)
    assert abs(average.double().mean().item() - right) < 3e-4  # 5 standard deviations of that many roundings


@pytest.mark.parametrize("wrong", [torch.float16, INT16])
def test_an_average_in_another_dtype_is_refused(wrong):
    with pytest.raises(TypeError, match="averages must be fp32 or bf16"):
        LionTensors([normal(1)], [normal(2)], averages=[normal(3).to(wrong)], ema_decay=0.9)


def test_averages_and_their_decay_go_together():
    with pytest.raises(ValueError, match="averages and ema_decay go together"):
        LionTensors([normal(1)], [normal(2)], ema_decay=0.9)
    with pytest.raises(ValueError, match="averages and ema_decay go together"):
        LionTensors([normal(1)], [normal(2)], averages=[normal(3)])
    with pytest.raises(ValueError, match="stochastic rounding needs steps"):
        LionTensors([normal(1)], [normal(2)], averages=[normal(3).to(BF16)], ema_decay=0.9)
    assert LionTensors([normal(1)], [normal(2)], averages=[normal(3)], ema_decay=0.9).averages[0].dtype == FP32
