"""ShardedLion over memory that ranks write into, by what the other tests ask of collectives.

Here ranks are processes that map files (``shared_files.py``); ``test_sharded_gpu.py`` is about GPUs.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lion_dist import ShardedLion, ShardingConfig
from lion_dist.sharding import collectives
from tests import test_sharded_update_in_backward as in_backward
from tests.coded_sync import test_sharded_coded as coded
from tests.models import GivenGradients
from tests.shared_files import over_shared_files
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
