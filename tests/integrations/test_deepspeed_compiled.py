"""DeepSpeed's ``engine.compile()``: Lion's weights and momenta are those of an uncompiled engine, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.integrations.deepspeed_ranks import Words, assert_same, ds_config, full_tensors, make_engine, words

pytest.importorskip("deepspeed")

STEPS, MICRO_BATCHES = 3, 2


class Graphs:
    """torch's "aot_eager", which counts its graphs: of forward and backward, as inductor's, with eager operations."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.count += 1
        return aot_eager(graph, inputs)


def train(stage: int, precision: str, backend: Graphs | None) -> tuple[dict, list[float]]:
    config = ds_config(stage, precision, gradient_clipping=0.5, gradient_accumulation_steps=MICRO_BATCHES)
    engine = make_engine(Words(), config)
    if backend is not None:
        engine.compile(backend=backend)
        assert engine.is_compiled
    losses = []
    for step in range(STEPS * MICRO_BATCHES):
        loss = engine(words(step, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return full_tensors(engine), losses


def compare(stage: int, precision: str) -> int:
    expected, graphs = train(stage, precision, None), Graphs()
    found = train(stage, precision, graphs)
    torch.compiler.reset()
    assert_same(found[0], expected[0])
    assert found[1] == expected[1] and found[1][-1] < found[1][0]
    return graphs.count


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (1, "bf16_acc"), (2, "bf16"), (3, "bf16")])
def test_a_compiled_engine_trains_to_the_bits_of_one_that_is_not(gloo, stage, precision):
    """With clipping and two micro-batches a step."""
    counts = gloo.run(2, compare, stage, precision)
    assert min(counts) > 0, "nothing was compiled"
