"""Composed jobs: the part of the model that the rank with the most has, and what that rank holds and sends."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from lion_dist import values
from lion_dist.planning.estimates import Collective, EnginePlan, Job, plan
from lion_dist.planning.model_shapes import BLOCK, ModelShapes

ENGINES = ("Lion", "DDP + Lion", "ShardedLion", "FSDP2")  # those that go with parts of a model here
EXPERTS = ".experts."  # in the names of experts' parameters


@dataclass(frozen=True)
class Axes:
    """The ranks along each axis but the data-parallel one. Neighbours are tensor-parallel; stages are farthest apart.

    Args:
        context: of the data-parallel ranks, so many share a sequence.
        expert: of the data-parallel ranks, so many divide the experts.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            remedy = "Pass a number of ranks."
            values.whole_number(field.name, getattr(self, field.name), "at least 1", least=1, remedy=remedy)

    @property
    def is_one(self) -> bool:
        return self == Axes()

    def data_parallel(self, job: Job) -> Job:
        """The ranks that share a part of the model: those of ``context`` are among them."""
        parts = self.tensor * self.pipeline
        if job.ranks % parts or job.ranks // parts % math.lcm(self.context, self.expert):
            raise ValueError(
                f"{job.ranks} ranks are not a multiple of {self.tensor} tensor-parallel x {self.pipeline} stages x "
                f"{self.context} context-parallel ranks, and {self.expert} expert-parallel ones. Pass axes that divide "
                "them."
            )
        return _spread(job, job.ranks // parts, self.tensor)


def _spread(job: Job, ranks: int, stride: int) -> Job:
    """A job of ``ranks`` that are ``stride`` apart on the nodes of ``job``."""
    nodes = math.ceil(ranks * stride / job.ranks_per_node)
    return dataclasses.replace(job, ranks=ranks, nodes=nodes if nodes < ranks and ranks % nodes == 0 else ranks)


def plan_composed(
    model: ModelShapes, job: Job, axes: Axes, precision: str, average: torch.dtype | None = None
) -> list[EnginePlan]:
    """``estimates.plan`` for the rank with the largest part of ``model``. ``job``: of all ranks."""
    if axes.is_one:
        return plan(model, job, precision, average)
    sharing = axes.data_parallel(job)
    part = heaviest_part(model, axes.tensor, axes.pipeline)
    found = [
        p for p in plan(part, sharing, precision, average) if p.engine.startswith(ENGINES) and "ZeRO" not in p.engine
    ]
    if axes.expert == 1:
        return found
    dense, experts = divide_experts(part, axes.expert)
    own = _spread(job, sharing.ranks // axes.expert, axes.tensor * axes.expert)
    of_experts = {p.engine: p for p in plan(experts, own, precision, average)}
    of_dense = {p.engine: p for p in plan(dense, sharing, precision, average)}
    return [
        _together(of_dense[p.engine], of_experts[p.engine])
        for p in found
        if p.engine in of_experts and not p.engine.startswith(("DDP", "Lion"))
    ]


def _together(dense: EnginePlan, experts: EnginePlan) -> EnginePlan:
    memory = {kind: nbytes + experts.memory[kind] for kind, nbytes in dense.memory.items()}
    traffic = tuple(dataclasses.replace(c, what=f"{c.what} of experts") for c in experts.traffic)
    return dataclasses.replace(dense, memory=memory, traffic=dense.traffic + traffic)


def activation_traffic(part: ModelShapes, job: Job, axes: Axes, tokens: int, itemsize: int) -> tuple[Collective, ...]:
    """What the axes of the model send for ``tokens`` of each micro-batch on a rank.

    Tensor parallel: two all-reduces a layer in forward and two in backward, or as many bytes by sequence parallel.
    Pipeline: activations to the next stage, and their gradients back. Context and expert parallel are left out.
    """
    values_sent = job.micro_batches * tokens * part.hidden * itemsize
    reduced = 4 * 2 * values_sent * (axes.tensor - 1) // axes.tensor * part.layers
    found = [
        ("all-reduce activations (tensor parallel)", reduced, axes.tensor > job.ranks_per_node),
        ("send activations (pipeline)", 2 * values_sent if axes.pipeline > 1 else 0, job.nodes > 1),
    ]
    return tuple(Collective(*each) for each in found if each[1])


def divide_experts(model: ModelShapes, ranks: int) -> tuple[ModelShapes, ModelShapes]:
    """What is not an expert, and the experts of one of ``ranks``."""
    experts = [(name, shape) for name, shape in model.params if EXPERTS in name]
    if not experts or any(shape[0] % ranks for _, shape in experts if len(shape) == 3):
        raise ValueError(
            f"{ranks} expert-parallel ranks, and {model.name} has no stack of experts that they can divide: "
            f"{[shape for _, shape in experts[:2]]}. Pass a model with experts, such as mixtral-8x7b, and ranks that "
            "divide their number."
        )
    # As matrices, or FSDP2 would pad the first dimension of a few experts to many ranks.
    own = [(name, (math.ceil(math.prod(shape[:-1]) / ranks), shape[-1])) for name, shape in experts]
    dense = [param for param in model.params if EXPERTS not in param[0]]
    return dataclasses.replace(model, params=tuple(dense)), dataclasses.replace(model, params=tuple(own))


def heaviest_part(model: ModelShapes, tensor: int, pipeline: int) -> ModelShapes:
    """What the largest of ``pipeline`` stages keeps on each of ``tensor`` ranks.

    Stages have equal numbers of blocks, as far as that goes; what comes before the first block is on the first stage
    and what comes after the last on the last one, with a copy of an embedding that is the head, too. Matrices are cut,
    stacks of experts along their second dimension, and vectors are copied.
    """
    values.instance("model", model, ModelShapes, 'Pass model_shapes.read_shapes("7b"), for example.')
    first, blocks, last = _cut_into_blocks(model, pipeline)
    if pipeline > max(1, len(blocks)):
        raise ValueError(f"{pipeline} pipeline stages, but the model has {len(blocks)} blocks. Pass fewer stages.")
    stages = []
    for stage in range(pipeline):
        own = blocks[len(blocks) * stage // pipeline : len(blocks) * (stage + 1) // pipeline]
        params = [param for block in own for param in block]
        params = (first if stage == 0 else []) + params + (last if stage == pipeline - 1 else [])
        cut = tuple((name, _cut(shape, tensor)) for name, shape in params)
        stages.append(dataclasses.replace(model, params=cut, layers=model.layers * len(own) // max(1, len(blocks))))
    return max(stages, key=lambda stage: stage.numel)


def _cut(shape: tuple[int, ...], tensor: int) -> tuple[int, ...]:
    if len(shape) < 2:
        return shape
    dim = 1 if len(shape) == 3 else 0
    return *shape[:dim], math.ceil(shape[dim] / tensor), *shape[dim + 1 :]


def _cut_into_blocks(model: ModelShapes, pipeline: int) -> tuple[list, list[list], list]:
    """Parameters before the blocks, of each block, and after them."""
    first, last = [], []
    blocks: dict[str, list] = {}
    for name, shape in model.params:
        match = BLOCK.match(name)
        if match is not None:
            blocks.setdefault(match[0], []).append((name, shape))
        else:
            (last if blocks else first).append((name, shape))
    table = (model.vocab, model.hidden)
    if pipeline > 1 and table in [s for _, s in first] and table not in [s for _, s in last]:
        last.append(("head, tied to the embedding", table))
    return first, list(blocks.values()), last
