"""What is reduced is the sum of all ranks' gradients, computed apart. ``test_sharded_gpu.py`` asks NCCL the same."""

from __future__ import annotations

import pytest
import torch

from tests.reduced_gradients import Sums, check_sums

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("wire", [None, FP32])
def test_sums_in_rank_order_are_exact(gloo, wire, ranks):
    gloo.run(ranks, check_sums, CPU, Sums(BF16, ordered=True, wire=wire))


def test_sums_over_replicas_are_exact(gloo):
    gloo.run(4, check_sums, CPU, Sums(BF16, ordered=True, replicas=2))


@pytest.mark.parametrize(
    "sums", [Sums(BF16, ordered=False), Sums(FP32, ordered=False), Sums(BF16, ordered=False, replicas=2)], ids=str
)
def test_the_backends_own_sums_are_as_close_as_rounding_allows(gloo, sums):
    gloo.run(4, check_sums, CPU, sums)
