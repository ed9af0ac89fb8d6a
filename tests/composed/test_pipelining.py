"""Schedules of ``torch.distributed.pipelining`` on PP 2 x DP 2, against one process by bits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from lion_dist import Lion, ModelParallel, ShardedLion, ShardingConfig
from lion_dist.integrations.pipelining import reduce_in_last_backward
from lion_dist.sharding import collectives
from tests.composed.jobs import mesh_of, place_on
from tests.integrations.fsdp_ranks import WIDTH, Block
from tests.oracle import Oracle

MICRO_BATCHES = 4
SETTINGS = dict(lr=2e-3, weight_decay=0.1)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


def batch(step: int, dp: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [examples, length, WIDTH] of a data-parallel rank; two examples a micro-batch."""
    generator = torch.Generator().manual_seed(100 * step + dp)
    return tuple(torch.randn(2 * MICRO_BATCHES, 3, WIDTH, generator=generator) for _ in range(2))


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


class Job:
    """This rank's part of the four blocks, its optimizer and its schedule."""

    def __init__(self, schedule: str, zero_stage: int, dividing: bool = True):
        mesh = mesh_of(pp=2, dp=2)
        self.pp, self.dp = place_on(mesh, "pp"), place_on(mesh, "dp")
        group = mesh["pp"].get_group()
        whole = make_model()
        if schedule == "1f1b":
            self.numbers = [range(0, 2), range(2, 4)][self.pp]
            parts = [nn.Sequential(*(whole[i] for i in self.numbers))]
            stages = [PipelineStage(parts[0], self.pp, 2, torch.device("cpu"), group=group)]
            self.schedule = Schedule1F1B(stages[0], MICRO_BATCHES, loss_of, scale_grads=False)
        else:
            self.numbers = [self.pp, self.pp + 2]
            parts = [whole[i] for i in self.numbers]
            stages = [
                PipelineStage(part, i, 4, torch.device("cpu"), group=group)
                for part, i in zip(parts, self.numbers, strict=True)
            ]
            self.schedule = ScheduleInterleaved1F1B(stages, MICRO_BATCHES, loss_of, scale_grads=False)
        self.module = nn.ModuleList([whole[i] for i in self.numbers])
        self.opt = ShardedLion(
            self.module.parameters(),
            module=self.module,
            process_group=mesh["dp"],
            model_parallel=ModelParallel(pipeline=mesh["pp"]),
            sharding=ShardingConfig(zero_stage, bucket_numel=300),
            **SETTINGS,
        )
        if dividing:
            reduce_in_last_backward(self.opt, *stages)

    def run(self, step: int) -> None:
        inputs, targets = batch(step, self.dp)
        arguments = (inputs,) if self.pp == 0 else ()
        self.schedule.step(*arguments, **({"target": targets} if self.pp == 1 else {}))

    def assert_equals(self, model: nn.Sequential) -> None:
        self.opt.finish_param_sync()
        expected = (p for i in self.numbers for p in model[i].parameters())
        for (name, mine), theirs in zip(self.module.named_parameters(), expected, strict=True):
            assert torch.equal(mine, theirs), name


class OneProcess:
    def __init__(self, zero_stage: int):
        self.model, self.zero_stage = make_model(), zero_stage
        self.oracle = Oracle(self.model, Lion(self.model.parameters(), **SETTINGS), 2)

    def step(self, step: int) -> Tensor:
        batches = [[part.chunk(MICRO_BATCHES) for part in batch(step, dp)] for dp in range(2)]
        for m in range(MICRO_BATCHES):
            losses = [lambda model, b=b, m=m: loss_of(model(b[0][m]), b[1][m]) for b in batches]
            self.oracle.backward(losses, reduce=self.zero_stage == 2 or m == MICRO_BATCHES - 1)
        return self.oracle.step(divisor=2 * MICRO_BATCHES, clip=0.05)


def train(schedule: str, zero_stage: int, how: str) -> list[int]:
    """How many reductions each step started on this rank, over those of one pass."""
    job, one = Job(schedule, zero_stage, how == "last backward"), OneProcess(zero_stage)
    counts = []
    reduce_scatter = collectives.reduce_scatter

    def counted(*args, **kwargs):
        counts[-1] += 1
        return reduce_scatter(*args, **kwargs)

    collectives.reduce_scatter = counted
    try:
        for step in range(2):
            counts.append(0)
            if how == "last backward":
                job.run(step)
            else:
                with job.opt.no_sync():
                    job.run(step)
                job.opt.backward_without_batch()
            job.opt.set_grad_divisor(2 * MICRO_BATCHES)
            assert torch.equal(job.opt.clip_grad_norm_(0.05), one.step(step))
            job.opt.step()
            job.opt.zero_grad()
    finally:
        collectives.reduce_scatter = reduce_scatter
    job.assert_equals(one.model)
    return [count // len(job.opt.buckets) for count in counts]


@pytest.mark.parametrize("how", ["last backward", "no_sync"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_stage_1_reduces_once_a_step_and_equals_one_process(gloo, schedule, how):
    assert gloo.run(4, train, schedule, 1, how) == [[1, 1]] * 4


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_stage_2_reduces_in_every_backward_and_equals_one_process(gloo, schedule):
    passes = MICRO_BATCHES * (1 if schedule == "1f1b" else 2)
    assert gloo.run(4, train, schedule, 2, "last backward") == [[passes] * 2] * 4


def undo() -> None:
    job = Job("1f1b", 1, dividing=False)
    (stage,) = [job.schedule._stage]
    before = stage.backward_maybe_with_nosync
    reduce_in_last_backward(job.opt, stage)()
    assert stage.backward_maybe_with_nosync == before
    with pytest.raises(TypeError, match="a stage of torch.distributed.pipelining"):
        reduce_in_last_backward(job.opt, job.module)
    assert copy.copy(stage.__dict__).get("backward_maybe_with_nosync") is None
    dist.barrier()


def test_what_lets_the_last_backward_reduce_can_be_undone(gloo):
    gloo.run(4, undo)
