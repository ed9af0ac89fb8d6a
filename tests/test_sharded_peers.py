"""ShardedLion over memory that ranks write into, by what the other tests ask of collectives.

Here ranks are processes that map files (``shared_files.py``); ``test_sharded_gpu.py`` is about GPUs.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from lion_dist import ShardedLion, ShardingConfig
from lion_dist.sharding import collectives
from tests import test_sharded_update_in_backward as in_backward
from tests.coded_sync import test_sharded_coded as coded
from tests.models import GivenGradients
from tests.oracle import assert_same_on_all_ranks
from tests.reduced_gradients import reduced_gradients
from tests.shared_files import LATE_BY, over_shared_files, over_shared_files_with_one_late
from tests.test_sharded_accumulation import run_out_of_batches, run_out_of_batches_inside_no_sync, skip_all_batches
from tests.test_sharded_bad_input import skip_a_step_with_a_bad_gradient
from tests.test_sharded_groups import train_a_model_on_a_mesh, train_experts
from tests.test_sharded_params import (
    add_a_group_in_the_middle,
    train_parameters_of_several_dtypes,
    train_tied_weights,
    unfreeze_with_accumulation,
    use_a_parameter_on_one_rank_only,
)
from tests.test_sharded_parity import CASES, train_beside_the_oracle, train_on_given_sums

PARITY = {
    "stage1-3x-no_sync-clip": (2, 4),
    "stage2-3x-clip": (2, 4),
    "stage2-bf16-auto": (2, 4),
    "detour-sometimes": (2, 4),
    "wire-fp32": (2,),
    "wire-bf16": (4,),
    "one-bucket": (4,),
    "bucket-per-parameter": (2,),
    "triton-stochastic": (2,),
}


@pytest.mark.parametrize(
    ("case", "ranks"),
    [pytest.param(c, ranks, id=f"{c.name}-{ranks}") for c in CASES for ranks in PARITY.get(c.name, ())],
)
def test_ranks_arrive_at_the_bits_of_a_single_process(gloo, case, ranks):
    gloo.run(ranks, over_shared_files, train_beside_the_oracle, case)


def accumulate_on_replicas() -> float:
    """2 x 2 (replicate, shard): replicas are added to what the shard's ranks have summed, then micro-batches."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = GivenGradients((70,), (3, 5))
    opt = ShardedLion(model.parameters(), process_group=mesh, sharding=ShardingConfig(average=False))
    for _ in range(3):
        for micro_batch in (1, 2):
            value = float(micro_batch * (1 + dist.get_rank()))
            model.loss([torch.full((70,), value), torch.full((3, 5), -value)]).backward()
        norm = opt.grad_norm().item()
        opt.step()
    return norm


def test_micro_batches_on_replicas_are_added_up(gloo):
    assert gloo.run(4, over_shared_files, accumulate_on_replicas) == [pytest.approx(30 * 85**0.5)] * 4


SITUATIONS = {
    "replicas": (4, train_a_model_on_a_mesh, 2, 0.3),
    "experts": (4, train_experts, 2),
    "ranks run out of batches": (4, run_out_of_batches, 2, False),
    "a rank without a batch inside no_sync": (2, run_out_of_batches_inside_no_sync, 1),
    "no rank has a batch": (4, skip_all_batches, 2),
    "a bad gradient": (4, skip_a_step_with_a_bad_gradient, float("nan"), "last rank", 2),
    "buckets that come later, and are larger": (2, add_a_group_in_the_middle, 2, "auto"),
    "parameters unfrozen": (2, unfreeze_with_accumulation, 1),
    "a parameter that one rank uses": (4, use_a_parameter_on_one_rank_only, 2),
    "tied weights": (2, train_tied_weights, 2),
    "several dtypes": (2, train_parameters_of_several_dtypes),
    "updates in backward": (4, in_backward.train_both_ways, in_backward.CASES[0]),
    "codes": (2, coded.compare_strategies, coded.CASES[0]),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_collectives_do_is_done(gloo, situation):
    ranks, function, *arguments = SITUATIONS[situation]
    gloo.run(ranks, over_shared_files, function, *arguments, timeout=60)


def train_without_collectives() -> list[torch.Tensor]:
    """Parameters and gradients by gloo would be an error."""
    kept = collectives.reduce_scatter, collectives.all_gather
    collectives.reduce_scatter = collectives.all_gather = None
    try:
        return train_on_given_sums(stage=2)
    finally:
        collectives.reduce_scatter, collectives.all_gather = kept


def test_no_collective_moves_gradients_or_parameters(gloo):
    by_files = gloo.run(2, over_shared_files, train_without_collectives)
    for mine, other in zip(by_files, gloo.run(2, train_on_given_sums, 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def train_with_one_rank_late(late: int) -> None:
    """Gradients are read when all have been sent, none is written over before it has been summed up, and parameters may
    be written as soon as they are whole: whoever is late then must not read that as another rank's update."""
    rank, ranks, shapes = dist.get_rank(), dist.get_world_size(), ((70,), (3, 50), (200,), (64,), ())

    def wait_for_the_late_one() -> None:
        if rank == late:
            time.sleep(LATE_BY)

    model = GivenGradients(*shapes)
    opt = ShardedLion(model.parameters(), lr=0.5, sharding=ShardingConfig(bucket_numel=64, average=False))
    for step in range(3):
        wait_for_the_late_one()
        model.loss([torch.full(shape, 1.0 + 10 * step + i + rank) for i, shape in enumerate(shapes)]).backward()
        opt.grad_norm()
        found = reduced_gradients(opt)
        for i, param in enumerate(model.weights):
            assert (found[param] == ranks * (1 + 10 * step + i) + sum(range(ranks))).all(), (step, i)
        wait_for_the_late_one()
        opt.step()
        opt.finish_param_sync()
        kept = [param.detach().clone() for param in model.weights]
        with torch.no_grad():
            for param in model.weights:
                param.fill_(torch.nan)
            dist.barrier()
            for param, value in zip(model.weights, kept, strict=True):
                assert not value.isnan().any(), step
                param.copy_(value)
        assert_same_on_all_ranks(model)


@pytest.mark.parametrize("late", [0, 1])
def test_nothing_is_read_too_early_or_written_too_soon_when_a_rank_is_late(gloo, late):
    gloo.run(2, over_shared_files_with_one_late, late, train_with_one_rank_late, late)
