"""``ShardedLion.metrics()``: every element once, whatever rank owns it; and where time and bytes went."""

from __future__ import annotations

import copy
import math
import time

import pytest
import torch
import torch.distributed as dist

from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.sharding import collectives
from lion_dist.sharding.phases import PHASES
from tests.metrics.metrics_oracle import NORMS, SHARES, MeasuredLion, assert_same_metrics
from tests.metrics.test_metrics import BF16, FP32, KEYS, SETTINGS, UNROUNDED, CountWaits
from tests.models import GivenGradients, make_batch, make_model, mlp
from tests.oracle import Oracle


def measure_everything(dtype: torch.dtype, policy: PrecisionPolicy, clip: float | None, cautious: bool) -> None:
    """Unused, frozen, empty and tiny parameters; two micro-batches; parameters that one rank only uses."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = make_model(dtype)
    expected = copy.deepcopy(model)
    options = dict(precision=policy, cautious=cautious, **SETTINGS)
    sharding = ShardingConfig(bucket_numel=100)
    opt = ShardedLion(model.parameters(), module=model, sharding=sharding, metrics_every=1, **options)
    oracle = Oracle(expected, MeasuredLion(expected.parameters(), **options), world_size)
    for step in range(3):
        for micro_batch in range(2):
            batches = [make_batch(step, micro_batch, r, detour=r == 1) for r in range(world_size)]
            batches[rank].loss(model).backward()
            oracle.backward([batch.loss for batch in batches])
        if clip is not None:
            opt.clip_grad_norm_(clip)
        opt.step()
        opt.zero_grad()
        oracle.step(clip=clip)
        result = opt.metrics()
        assert result.keys() == KEYS and result["step"] == step + 1
        assert_same_metrics(result, oracle.lion.expected, but=UNROUNDED if policy.main_params == "none" else ())
        everybody: list = [None] * world_size
        dist.all_gather_object(everybody, result)
        assert all(theirs == result for theirs in everybody)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_metrics_are_those_of_one_process(gloo, world_size):
    gloo.run(world_size, measure_everything, FP32, PrecisionPolicy(), 0.1, False)


@pytest.mark.parametrize("main_params", ["split", "fp32", "none"])
def test_low_precision_parameters(gloo, main_params):
    gloo.run(2, measure_everything, BF16, PrecisionPolicy(main_params, seed=3), None, False)


def test_cautious_steps(gloo):
    gloo.run(2, measure_everything, FP32, PrecisionPolicy(), None, True)


def measure_replicas() -> None:
    """The same gradient everywhere, and a sum of four that is exact in any order."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = GivenGradients((37, 5), (3,), (200,), ())
    expected = copy.deepcopy(model)
    sharding = ShardingConfig(bucket_numel=130)
    opt = ShardedLion(model.parameters(), process_group=mesh, sharding=sharding, metrics_every=1, **SETTINGS)
    lion = MeasuredLion(expected.parameters(), **SETTINGS)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randint(-9, 9, p.shape, generator=generator).float() for p in model.weights]
        model.loss(grads).backward()
        opt.step()
        for param, grad in zip(expected.weights, grads, strict=True):
            param.grad = grad
        lion.step()
        assert_same_metrics(opt.metrics(), lion.expected)


def test_replicas_of_a_shard_are_counted_once(gloo):
    gloo.run(4, measure_replicas)


def measure_experts() -> None:
    """Ranks 0, 2 share one expert, ranks 1, 3 another; all four share the rest."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    shared, expert = torch.nn.Parameter(torch.full((70,), 2.0)), torch.nn.Parameter(torch.full((130,), 3.0 + rank % 2))
    params = [{"params": [shared]}, {"params": [expert], "process_group": groups[rank % 2]}]
    opt = ShardedLion(params, metrics_every=1)
    (shared.sum() + expert.sum()).backward()
    opt.step()
    result = opt.metrics()
    assert result["param_norm"] == math.sqrt(70 * 4 + 130 * 9 + 130 * 16)
    assert result["agreement_share"] == 1.0 and result["zero_share"] == 0.0


def test_experts_count_once_each(gloo):
    gloo.run(4, measure_experts)


def skip_a_step() -> None:
    model = GivenGradients((5,))
    opt = ShardedLion(model.parameters(), metrics_every=1)
    results = []
    for value in (1.0, float("nan") if dist.get_rank() == 1 else 1.0, 1.0):
        model.loss([torch.full((5,), value)]).backward()
        opt.step()
        results.append(opt.metrics())
    assert [result["step"] for result in results] == [1, 1, 3]
    assert [result["skipped_steps"] for result in results] == [0, 1, 1]
    assert [results[0][key] for key in (*NORMS, *SHARES)] == [results[1][key] for key in (*NORMS, *SHARES)]
    assert results[2]["grad_norm"] == math.sqrt(5)


def test_a_skipped_step_is_counted_and_leaves_the_last_metrics(gloo):
    gloo.run(2, skip_a_step)


def resume() -> None:
    model = GivenGradients((5,))
    opt = ShardedLion(model.parameters(), metrics_every=2)
    assert opt.metrics()["step"] == 0 and math.isnan(opt.metrics()["rank_ms"][0])
    assert opt.metrics()["slowest_rank"] is None
    state = opt.state_dict()
    opt.load_state_dict({**state, "counters": torch.tensor([40, 2])})
    for _ in range(2):
        model.loss([torch.ones(5)]).backward()
        opt.step()
    assert opt.metrics()["step"] == 44 and opt.metrics()["skipped_steps"] == 2


def test_the_number_of_the_step_goes_on_from_a_checkpoint(gloo):
    gloo.run(2, resume)


def count_waits(every: int) -> int:
    model = mlp(8, 8)
    opt = ShardedLion(model.parameters(), metrics_every=every)
    model(torch.ones(2, 8)).sum().backward()
    opt.clip_grad_norm_(1.0)
    with CountWaits() as waits:
        opt.step()
    return waits.count


def test_measuring_reads_nothing_on_the_host(gloo):
    assert gloo.run(1, count_waits, 0) == gloo.run(1, count_waits, 1)


def refuse_other_intervals() -> None:
    with pytest.raises(ValueError, match="rank 1 differs from rank 0"):
        ShardedLion(mlp(4, 4).parameters(), metrics_every=dist.get_rank())


def test_ranks_that_would_measure_other_steps_are_refused(gloo):
    gloo.run(2, refuse_other_intervals)


# ---- time and bytes


def count_bytes(zero_stage: int) -> None:
    """Two micro-batches of one bucket of 128 fp32 elements."""
    world_size = dist.get_world_size()
    model = GivenGradients((100,), (20,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(zero_stage=zero_stage), metrics_every=2)
    numel = opt.buckets[0].layout.numel
    before = collectives.sent_bytes
    for _ in range(2):
        with opt.no_sync():
            model.loss([torch.ones(100), torch.ones(20)]).backward()
        model.loss([torch.ones(100), torch.ones(20)]).backward()
        opt.step()
    sent = opt.metrics()["bytes_by_phase"]
    reductions = {1: 1, 2: 2}[zero_stage]
    share = (world_size - 1) / world_size
    assert sent["grad_sync"] == reductions * 4 * numel * share and sent["param_sync"] == 4 * numel * share
    # A sum of squares, two uses and what ranks compare, in fp64, there and back.
    assert sent["norm"] == 2 * 8 * (1 + 2 + (world_size > 1)) * share
    assert sent["update"] == sent["measure"] == sent["elsewhere"] == 0
    assert 2 * sum(sent.values()) == collectives.sent_bytes - before - opt_message(world_size)


def opt_message(world_size: int) -> int:
    """What reading the metrics sends: step, sums, rank, two numbers a phase; fp64, to each other rank."""
    return 8 * (1 + 9 + 1 + 2 * len(PHASES)) * (world_size - 1)


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bytes_are_what_the_collectives_were_handed(gloo, world_size, zero_stage):
    gloo.run(world_size, count_bytes, zero_stage)


SLOW_RANK, NAP = 1, 1.0


def one_rank_is_slow(with_module: bool) -> dict:
    model = mlp(8, 8, 8)
    opt = ShardedLion(model.parameters(), module=model if with_module else None, metrics_every=2)
    for _ in range(2):
        if dist.get_rank() == SLOW_RANK:
            time.sleep(NAP)  # a slow loader, a throttled GPU
        model(torch.ones(2, 8)).sum().backward()
        opt.step()
        opt.zero_grad()
    return opt.metrics()


@pytest.mark.parametrize("with_module", [True, False])
def test_the_slow_rank_is_named(gloo, with_module):
    for result in gloo.run(4, one_rank_is_slow, with_module):
        own = result["rank_ms"]
        assert result["slowest_rank"] == SLOW_RANK and own[SLOW_RANK] >= 1e3 * NAP
        others = [ms for rank, ms in enumerate(own) if rank != SLOW_RANK]
        assert sum(others) / 3 < own[SLOW_RANK] - 500 * NAP  # they waited, and that is not their own time
        assert result["ms_by_phase"]["norm"] + result["ms_by_phase"]["grad_sync"] > 500 * NAP * 3 / 4


def use_every_phase() -> dict:
    model = mlp(64, 64, 64)
    opt = ShardedLion(model.parameters(), module=model, metrics_every=2)
    for _ in range(4):
        model(torch.ones(2, 64)).sum().backward()
        opt.step()
        opt.zero_grad()
    return opt.metrics()["ms_by_phase"]


def test_every_phase_of_a_step_takes_its_time(gloo):
    for ms in gloo.run(2, use_every_phase):
        assert ms.keys() == set(PHASES) and all(value > 0 for value in ms.values())
