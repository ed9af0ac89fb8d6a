"""The compiled statistics kernel: the reference's numbers, the same ones each time, no waiting, little memory."""

from __future__ import annotations

import pytest
import torch

from lion_dist.metrics.statistics import COLUMNS, measure
from lion_dist.metrics.statistics_triton import LAUNCH_SHAPE
from tests.kernels.cases import BF16, FP32, GRAD_DTYPES, STORAGES, Case, Storage
from tests.metrics.test_statistics import assert_same, measured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

NUMELS = [3 * LAUNCH_SHAPE.block + 5, 0, 1, LAUNCH_SHAPE.block, 100_003]


def on_gpu(case: Case, misalignment: int = 0) -> torch.Tensor:
    moved = case.to("cuda")
    arguments = {name: value for name, value in moved.arguments().items() if name != "skip"}
    return measure(moved.tensors(misalignment), backend="triton", **arguments)


@pytest.mark.parametrize("misalignment", [0, 1])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_every_storage(storage, grad_dtype, misalignment):
    active = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    case = Case.make(storage, grad_dtype, NUMELS, index_start=2**32 - 9000, step=3, seed=7, active=active)
    result = dict(zip(COLUMNS, on_gpu(case, misalignment).tolist(), strict=True))
    assert_same(result, measured(case, "cpu"))


def test_squares_of_numbers():
    generator = torch.Generator().manual_seed(0)
    case = Case.make(Storage(FP32, None, FP32), FP32, [1_000_003])
    for column in (case.params, case.exp_avgs, case.grads):
        column[0].copy_(torch.randn(1_000_003, generator=generator))
    first, second = on_gpu(case), on_gpu(case)
    assert torch.equal(first, second)
    assert_same(dict(zip(COLUMNS, first.tolist(), strict=True)), measured(case, "cpu"))


def test_nothing_waits_and_temporaries_are_a_hundredth_of_what_is_read():
    numel = 1 << 24
    case = Case.make(Storage(BF16, None, BF16), BF16, [numel // 2, numel // 2]).to("cuda")
    tensors = case.tensors()
    arguments = {name: value for name, value in case.arguments().items() if name != "skip"}
    measure(tensors, backend="triton", **arguments)  # compiles, and builds the table
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        measure(tensors, backend="triton", **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - held < 6 * numel / 50
