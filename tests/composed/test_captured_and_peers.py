"""Captured steps and peer memory beside tensor, pipeline and expert parallel: the bits of eager steps over collectives.

Here peer memory is files that ranks map, and replays are eager calls that move parameters as a graph does.
``test_composed_gpu.py`` has the real ones.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lion_dist.checkpoint
from lion_dist import ModelParallel, ShardedLion, ShardingConfig, TwoLevels
from tests.composed import test_axes_together as together
from tests.composed import test_pipeline as pipeline
from tests.composed import test_pipelining as pipelining
from tests.composed import test_tensor as tensor
from tests.composed.jobs import mesh_of, place_on
from tests.composed.replays import Replays
from tests.integrations.fsdp_ranks import Net, full, inputs
from tests.shared_files import over_shared_files, over_shared_files_with_one_late

SETTINGS = dict(lr=2e-3, weight_decay=0.1)
STEPS = 5

# ---- peer memory

OVER_PEERS = {
    "tensor parallel, DTensors": (tensor.train, "dtensor", "split", 2, 1.0, tensor.CUTS, {}),
    "tensor parallel, plain tensors, stage 1": (tensor.train, "plain", "fp32", 1, 1.0, tensor.CUTS, {}),
    "tensor parallel, cautious": (tensor.train, "dtensor", "fp32", 2, 1.0, tensor.CUTS, {"cautious": True}),
    "pipeline": (pipeline.train, "split", 2, 1.0),
    "pipeline, stage 1": (pipeline.train, "fp32", 1, None),
    "a tied parameter": (pipeline.train_tied, "fp32"),
    "1F1B": (pipelining.train, "1f1b", 1, "last backward"),
    "codes along data-parallel ranks": (together.train_on, {"pp": 1, "dp": 2, "tp": 2}, {"param_sync": "coded"}),
}


def check_it_is_used(function, *args) -> None:
    """``function(*args)``, which makes one optimizer or more, all over the memory that ranks share."""
    made = []
    build = ShardedLion._build

    def watched(self, groups):
        build(self, groups)
        made.extend(self.buckets)

    ShardedLion._build = watched
    try:
        function(*args)
    finally:
        ShardedLion._build = build
    assert made and all(bucket._params_buffer.peers for bucket in made)


@pytest.mark.parametrize("case", OVER_PEERS)
def test_over_peer_memory_parts_of_a_model_equal_one_process(gloo, case):
    """Each data-parallel group has memory of its own; what goes along the other axes, goes by collectives."""
    gloo.run(4, over_shared_files, check_it_is_used, *OVER_PEERS[case])


def test_over_peer_memory_a_late_rank_of_each_stage_changes_nothing(gloo):
    late = 1  # of its group: the second data-parallel rank of each stage
    gloo.run(4, over_shared_files_with_one_late, late, pipeline.train, "fp32", 2, 1.0)


def find_experts(tokens_on: tuple[int, ...]) -> dict:
    return together.train_experts(True, tokens_on)


def test_over_peer_memory_experts_have_the_norm_and_the_updates_of_collectives(gloo):
    over_files = gloo.run(4, over_shared_files, find_experts, (0, 1, 2))
    for mine, other in zip(over_files, gloo.run(4, find_experts, (0, 1, 2)), strict=True):
        assert (mine["norm"], mine["moved"], mine["metrics"]) == (other["norm"], other["moved"], other["metrics"])


# ---- captured steps


class WholeModel:
    """A real model on each rank, whose state is shared on two levels."""

    def __init__(self, zero_stage: int):
        mesh = mesh_of(node=2, local=2)
        self.dp, self.model = dist.get_rank(), Net()
        self.make(zero_stage, process_group=TwoLevels(mesh))

    def make(self, zero_stage: int, **ranks) -> None:
        sharding = ShardingConfig(zero_stage, bucket_numel=300)
        self.opt = ShardedLion(self.model.parameters(), module=self.model, sharding=sharding, **ranks, **SETTINGS)

    def step(self, step: int) -> Tensor:
        with self.opt.no_sync():
            self.model(inputs(2 * step, self.dp)).backward()
        self.model(inputs(2 * step + 1, self.dp)).backward()
        norm = self.opt.clip_grad_norm_(0.05)
        self.opt.step()
        self.opt.zero_grad()
        return norm

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        return self.model(inputs(99, self.dp)).detach()


class PipelineParallel(pipelining.Job):
    """PP 2 x DP 2 under a schedule of torch's."""

    def __init__(self, zero_stage: int):
        super().__init__("1f1b", zero_stage)
        numbers = map(str, self.numbers)
        self.model = nn.ModuleDict(zip(numbers, self.module, strict=True))  # its names are those of the whole model

    def step(self, step: int) -> Tensor:
        self.run(step)
        self.opt.set_grad_divisor(2 * pipelining.MICRO_BATCHES)
        norm = self.opt.clip_grad_norm_(0.05)
        self.opt.step()
        self.opt.zero_grad()
        return norm

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        return self.module[0](pipelining.batch(99, self.dp)[0])


class TensorParallel(WholeModel):
    """DP 2 x TP 2, where norms are copies whose gradients come as addends."""

    def __init__(self, zero_stage: int):
        mesh = mesh_of(dp=2, tp=2)
        self.dp, self.model = place_on(mesh, "dp"), tensor.parallelize(Net(), mesh["tp"])
        self.make(zero_stage, process_group=mesh["dp"], model_parallel=ModelParallel(tensor=mesh["tp"]))


JOBS = {"two levels": WholeModel, "tensor": TensorParallel, "pipeline": PipelineParallel}


def everything(job) -> list[Tensor]:
    job.opt.finish_param_sync()
    params = [full(param).detach().clone() for param in job.model.parameters()]
    return params + [shard.exp_avg.clone() for shard in job.opt.shards]


def replay_beside_eager(axis: str, zero_stage: int) -> None:
    eager, captured = JOBS[axis](zero_stage), JOBS[axis](zero_stage)
    replay = Replays(captured.step, captured.opt)
    for step in range(STEPS):
        assert torch.equal(eager.step(step), replay(step))
        if step == 2:  # between two replays parameters are whole for whoever asks
            assert torch.equal(eager.evaluate(), captured.evaluate())
        if step == 3:
            assert torch.equal(eager.step(100), captured.step(100))  # an eager step
            captured.opt.finish_param_sync()
    assert all(map(torch.equal, everything(captured), everything(eager)))


@pytest.mark.parametrize(("axis", "zero_stage"), [("two levels", 2), ("tensor", 1), ("tensor", 2), ("pipeline", 1)])
def test_replays_beside_other_parts_of_the_model_have_the_bits_of_eager_steps(gloo, axis, zero_stage):
    """With micro-batches, one norm over all parts, an evaluation and an eager step in between."""
    gloo.run(4, replay_beside_eager, axis, zero_stage)


@pytest.mark.parametrize("axis", JOBS)
def test_replays_over_peer_memory_have_the_bits_of_eager_steps_over_it(gloo, axis):
    gloo.run(4, over_shared_files, replay_beside_eager, axis, 2)


def save_between_replays(axis: str, folder: str) -> None:
    captured, resumed = JOBS[axis](2), JOBS[axis](2)
    replay = Replays(captured.step, captured.opt)
    for step in range(3):
        replay(step)
    lion_dist.checkpoint.save(f"{folder}/saved", model=captured.model, optimizer=captured.opt)
    lion_dist.checkpoint.load(f"{folder}/saved", model=resumed.model, optimizer=resumed.opt)
    assert torch.equal(replay(3), resumed.step(3))
    assert all(map(torch.equal, everything(captured), everything(resumed)))


@pytest.mark.parametrize("axis", JOBS)
def test_a_checkpoint_between_replays_holds_all_parts_of_the_step(gloo, tmp_path, axis):
    gloo.run(4, save_between_replays, axis, str(tmp_path))
