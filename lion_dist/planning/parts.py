"""The part of a model that the rank with the most has, under tensor and pipeline parallel."""

from __future__ import annotations

import dataclasses
import math

from lion_dist import values
from lion_dist.planning.model_shapes import BLOCK, ModelShapes


def heaviest_part(model: ModelShapes, tensor: int, pipeline: int) -> ModelShapes:
    """What the largest of ``pipeline`` stages keeps on each of ``tensor`` ranks.

    Stages have equal numbers of blocks, as far as that goes; what comes before the first block is on the first stage
    and what comes after the last on the last one, with a copy of an embedding that is the head, too. Matrices are cut,
    vectors are copied.
    """
    values.instance("model", model, ModelShapes, 'Pass model_shapes.read_shapes("7b"), for example.')
    for name, count in (("tensor", tensor), ("pipeline", pipeline)):
        values.whole_number(name, count, "at least 1", least=1, remedy="Pass a number of ranks.")
    first, blocks, last = _cut_into_blocks(model)
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
    return (math.ceil(shape[0] / tensor), *shape[1:]) if len(shape) > 1 else shape


def _cut_into_blocks(model: ModelShapes) -> tuple[list, list[list], list]:
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
    if table in [shape for _, shape in first] and table not in [shape for _, shape in last] and len(blocks) > 1:
        last.append(("head, tied to the embedding", table))
    return first, list(blocks.values()), last
