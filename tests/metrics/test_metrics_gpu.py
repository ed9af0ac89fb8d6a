"""Measuring on a GPU: nothing waits until somebody reads, and the numbers are those of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.replica_check import Holding, Piece, make_weights
from lion_dist.sharding.phases import PHASES
from tests.metrics.metrics_oracle import MeasuredLion, assert_same_metrics
from tests.models import mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SETTINGS = dict(lr=2e-3, weight_decay=0.1)


class NoWaiting:
    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


def give_gradients(models, step: int) -> None:
    for param, *others in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step)).to(param.dtype)
        for p in (param, *others):
            p.grad = grad.to(p.device)


@pytest.mark.parametrize("use_triton", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_metrics_are_those_of_the_step_and_measuring_waits_for_nothing(dtype, use_triton):
    expected = mlp(64, 300, 7).to(dtype)
    model = copy.deepcopy(expected).cuda()
    opt = Lion(model.parameters(), metrics_every=1, use_triton=use_triton, **SETTINGS)
    oracle = MeasuredLion(expected.parameters(), **SETTINGS)
    for step in range(4):
        give_gradients([model, expected], step)
        oracle.step()
        if step == 0:
            opt.step()  # compiles, and builds tables
        else:
            with NoWaiting():
                opt.step()
        result = opt.metrics()
        assert_same_metrics(result, oracle.expected)
    assert all(ms > 0 for ms in result["ms_by_phase"].values())


@pytest.mark.parametrize("main_params", ["split", "none"])
def test_a_sharded_step_that_measures_and_checks_replicas_waits_for_nothing(main_params):
    torch.manual_seed(0)
    model = mlp(64, 300, 7).to("cuda", torch.bfloat16)
    sharding, policy = ShardingConfig(check_replicas_every=1), PrecisionPolicy(main_params)
    options = dict(module=model, sharding=sharding, precision=policy, metrics_every=1)
    opt = ShardedLion(model.parameters(), **options, **SETTINGS)
    x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    for step in range(4):
        model(x).float().square().mean().backward()
        opt.clip_grad_norm_(1.0)
        if step < 2:
            opt.step()
        else:
            with NoWaiting():
                opt.step()
        opt.zero_grad()
    result = opt.metrics()
    assert result["step"] == 4 and result["grad_norm"] <= 1.0 + 1e-2
    assert result["ms_by_phase"].keys() == set(PHASES) and result["slowest_rank"] == 0
    assert sum(result["ms_by_phase"].values()) > 0
    opt.check_replicas()


def test_checksums_are_those_of_the_cpu():
    flat = torch.randn(3_000_001)
    pieces = [Piece("a", 0, 1_000_000, 0), Piece("b", 1_000_064, 3_000_001, 1)]
    sums = []
    for device in ("cpu", "cuda"):
        here = flat.to(device)
        sums.append(Holding("", here, pieces).checksums(make_weights(1 << 21, here.device)).tolist())
    assert sums[0] == sums[1]


def test_a_captured_step_is_refused():
    param = torch.nn.Parameter(torch.ones(100, device="cuda"))
    param.grad = torch.ones_like(param)
    opt = Lion([param], metrics_every=2)
    opt.step()
    with pytest.raises(RuntimeError, match="metrics_every=2, but a CUDA graph is captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            opt.step()
