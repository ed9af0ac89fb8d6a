"""Compiled models cost nothing more: their graphs stay whole, and Dynamo looks at no frame again after warm-up."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lion_dist import Lion, ShardedLion, ShardingConfig
from tests.models import mlp

BLOCKS = 3


class Block(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks, and a head that reads the embedding's weight, as tied weights do."""

    def __init__(self, recomputes: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.recomputes = recomputes

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
        return F.linear(x, self.embedding.weight)


class Graphs:
    """A backend that counts what it compiles."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list):
        self.count += 1
        return graph.forward


HOW = [
    "blocks in place before",
    "blocks in place after",
    "blocks in place between steps",
    "whole in place before",
    "whole in place after",
    "whole before",
    "whole after",
    "blocks replaced after",
]


def compile_model(model: nn.Module, how: str, graphs: Graphs) -> nn.Module:
    """Returns what the loop calls."""
    if how.startswith("blocks in place"):
        for block in model.blocks:
            block.compile(backend=graphs)
    elif how.startswith("whole in place"):
        model.compile(backend=graphs)
    elif how.startswith("whole"):
        return torch.compile(model, backend=graphs)
    else:
        model.blocks = nn.ModuleList(torch.compile(block, backend=graphs) for block in model.blocks)
    return model


def looks_of(function) -> int:
    """How often Dynamo is asked about a frame while ``function()`` runs."""
    looks = 0

    def count(frame, event, _argument):
        nonlocal looks
        looks += event == "call" and frame.f_code.co_name == "__call__" and "convert_frame" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return looks


def train(how: str, recomputes: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, graphs = Model(recomputes), Graphs()
    expected = copy.deepcopy(model)
    call = compile_model(model, how, graphs) if how.endswith("before") else model
    opt = ShardedLion(model.parameters(), lr=1e-2, module=call, sharding=ShardingConfig(bucket_numel=200))
    if how.endswith("after"):
        call = compile_model(model, how, graphs)
    lion = Lion(expected.parameters(), lr=1e-2)
    tokens = torch.arange(6).view(2, 3)

    def step() -> None:
        call(tokens).square().mean().backward()
        opt.step()
        opt.zero_grad()

    for i in range(6):
        if i == 2 and how.endswith("between steps"):
            compile_model(model, how, graphs)
        step()
    graphs_after_warm_up = graphs.count
    assert looks_of(lambda: [step() for _ in range(3)]) == 0, f"{how}: frames are looked at again"
    assert graphs.count == graphs_after_warm_up
    if how.endswith("before"):  # others are compiled again when their hooks have been moved
        assert graphs.count == 1, f"{how}: {graphs.count} graphs, where equal blocks share one"

    for _ in range(9):
        expected(tokens).square().mean().backward()
        lion.step()
        lion.zero_grad()
    opt.finish_param_sync()
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)  # the mean of two equal gradients is exact


@pytest.mark.parametrize("recomputes", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("how", HOW)
def test_no_frame_is_looked_at_again(gloo, how, recomputes):
    gloo.run(2, train, how, recomputes)


def compile_with_fullgraph(whole: bool) -> None:
    torch._dynamo.reset()
    model = Model()
    for module in [model] if whole else model.blocks:
        module.compile(backend="eager", fullgraph=True)
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model)
    for _ in range(2):
        model(torch.arange(6).view(2, 3)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    assert opt.taken_steps() == 2


@pytest.mark.parametrize("whole", [False, True])
def test_fullgraph_compiles(gloo, whole):
    gloo.run(1, compile_with_fullgraph, whole)


def close_over_compiled_blocks() -> None:
    torch._dynamo.reset()
    model = mlp(4, 4, 4)
    model[0].compile(backend="eager")
    compiled = model[0]._compiled_call_impl
    opt = ShardedLion(model.parameters(), module=model)
    assert model[0]._compiled_call_impl is not compiled
    assert copy.deepcopy(model)[0]._compiled_call_impl is None
    opt.close()
    assert model[0]._compiled_call_impl is compiled


def test_close_gives_the_compiled_call_back(gloo):
    gloo.run(1, close_over_compiled_blocks)
