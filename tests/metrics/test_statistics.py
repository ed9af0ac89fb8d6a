"""The statistics of a step are those of the step that the update then takes, on every backend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lion_dist.kernels.reference import StepScalars, read_main
from lion_dist.metrics import statistics
from lion_dist.metrics.statistics import COLUMNS, measure
from lion_dist.triton_backend import blocks, launch
from tests.kernels.cases import BF16, FP32, STORAGES, Case, Storage
from tests.kernels.strategies import cases

BLOCK = 64
COUNTS = ("numel", "flipped", "agreement", "zero", "lost")


@pytest.fixture(params=["cpu", "triton"])
def backend(request, monkeypatch):
    if request.param == "triton" and not blocks.INTERPRETED.value:
        pytest.skip("the kernels are compiled here: test_statistics_gpu.py compares them")
    monkeypatch.setattr(launch, "INTERPRETER_BLOCK", BLOCK)
    monkeypatch.setattr(launch, "SEARCH_STRIDE", 2)
    monkeypatch.setattr(statistics, "CPU_CHUNK", BLOCK)
    return request.param


def measured(case: Case, backend: str, misalignment: int = 0) -> dict[str, float]:
    arguments = {name: value for name, value in case.arguments().items() if name != "skip"}
    return dict(zip(COLUMNS, measure(case.tensors(misalignment), backend=backend, **arguments).tolist(), strict=True))


def expected(case: Case) -> dict[str, float]:
    """From the step that is really taken: what is stored before and after it."""
    case = replace(case, skip=None)
    before, after = case.tensors(), case.expected()
    total = dict.fromkeys(COLUMNS, 0.0)
    for i, grad in enumerate(case.grads):
        if not case.takes_part(i):
            continue
        m, g = before.exp_avgs[i].float(), grad.float()
        if case.grad_scale is not None:
            g = g * case.grad_scale
        c = m * case.scalars.beta1 + g * (1.0 - case.scalars.beta1)
        u = torch.where(g.isfinite() & ~c.isnan(), c.sign(), 0.0)
        if case.cautious_lrs is not None and case.cautious_lrs[i, 1] == 0:
            u = torch.where(u * g.sign() > 0, u, 0.0)
        old, new = (stored(tensors, i) for tensors in (before, after))
        total["numel"] += grad.numel()
        total["grad_squares"] += squares(g)
        total["param_squares"] += squares(value(before, i))
        total["update_squares"] += squares(value(after, i).double() - value(before, i).double())
        total["exp_avg_squares"] += squares(m)
        total["flipped"] += ((u * m.sign()) < 0).sum().item()
        total["agreement"] += ((u * g.sign()) > 0).sum().item()
        total["zero"] += (u == 0).sum().item()
        total["lost"] += ((u != 0) & (old == new)).sum().item()
    return total


def value(tensors, i: int) -> Tensor:
    return read_main(tensors.params[i], None if tensors.mains is None else tensors.mains[i])


def stored(tensors, i: int) -> Tensor:
    return tensors.params[i] if tensors.mains is None else value(tensors, i)


def squares(x: Tensor) -> float:
    return x.double().square().sum().item()


def assert_same(actual: dict[str, float], wanted: dict[str, float]) -> None:
    for name, number in wanted.items():
        if name in COUNTS:
            assert actual[name] == number, name
        else:
            assert actual[name] == pytest.approx(number, rel=1e-13, abs=0, nan_ok=True), name


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_they_are_those_of_the_step_that_is_taken(backend, storage):
    case = Case.make(storage, BF16, [2 * BLOCK + 5, 0, 1, BLOCK], index_start=2**32 - 70, step=3, seed=7)
    wanted = expected(case)
    if case.storage == Storage(BF16, None, storage.exp_avg, storage.stochastic_momentum):
        del wanted["update_squares"]  # of the step before it is rounded stochastically
    assert_same(measured(case, backend), wanted)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(BLOCK), misalignment=st.sampled_from([0, 0, 1, 8]))
def test_anything(backend, case, misalignment):
    wanted = expected(case)
    if case.storage.param == BF16 and case.storage.main is None:
        del wanted["update_squares"]
    assert_same(measured(case, backend, misalignment), wanted)


def test_each_column_by_hand(backend):
    """Five elements: against the momentum, with it, nothing at all, lost in a large weight, and no finite gradient."""
    case = Case.make(Storage(FP32, None, FP32), FP32, [5], scalars=StepScalars.from_group(1e-4, (0.5, 0.9), 0.0))
    case = replace(
        case,
        params=[torch.tensor([1.0, 2.0, 3.0, 1e6, 4.0])],
        exp_avgs=[torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])],
        grads=[torch.tensor([-3.0, 3.0, 0.0, -0.5, float("nan")])],
    )
    result = measured(case, backend)
    assert {name: result[name] for name in COUNTS} == dict(numel=5, flipped=1, agreement=2, zero=2, lost=1)
    assert result["param_squares"] == 1.0 + 4.0 + 9.0 + 1e12 + 16.0 and result["exp_avg_squares"] == 4.0
    assert result["update_squares"] == pytest.approx(2e-8, rel=1e-3)
    assert math.isnan(result["grad_squares"])


def test_a_bf16_step_below_half_an_ulp_is_lost_without_stochastic_rounding_and_seldom_with_it(backend):
    """lr 1e-3 under weights of 1.0 (ulp 2**-7): 1 in 8 moves, so that nothing is lost on average."""
    numel = 4096
    case = Case.make(Storage(BF16, None, BF16), BF16, [numel], scalars=StepScalars.from_group(1e-3, (0.9, 0.99), 0.0))
    ones = torch.ones(numel, dtype=BF16)
    case = replace(case, params=[ones], exp_avgs=[ones.clone()], grads=[ones.clone()])
    moved = numel - measured(case, backend)["lost"]
    assert moved == (case.expected().params[0] != 1).sum()
    assert 0.2 < moved / numel < 0.3  # 1e-3 of the 2**-8 below 1


def test_cautious_steps_count_as_zero_where_they_are_not_taken():
    case = Case.make(Storage(FP32, None, FP32), FP32, [2])
    case = replace(case, params=[torch.ones(2)], exp_avgs=[torch.ones(2)], grads=[torch.tensor([1.0, -1.0])])
    lrs = torch.tensor([[0.5, 0.0]])
    total = measure(case.tensors(), case.grads, case.scalars, cautious_lrs=lrs, backend="triton")
    result = dict(zip(COLUMNS, total.tolist(), strict=True))
    assert (result["zero"], result["agreement"], result["flipped"]) == (1, 1, 0)
    assert result["update_squares"] == pytest.approx((0.5 + 1e-4) ** 2 + 1e-8, rel=1e-3)  # decay everywhere


def test_measuring_changes_nothing(backend):
    case = Case.make(Storage(BF16, None, BF16, True), BF16, [100, 30])
    tensors, before = case.tensors(), case.tensors()
    arguments = {name: value for name, value in case.arguments().items() if name != "skip"}
    measure(tensors, backend=backend, **arguments)
    for column in ("params", "exp_avgs", "steps"):
        for mine, theirs in zip(getattr(tensors, column), getattr(before, column), strict=True):
            assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
