"""Gradients that peers have sent, summed without Triton."""

from __future__ import annotations

import sys

import pytest
import torch

from lion_dist import ShardedLion, ShardingConfig
from lion_dist.peer_memory.ordered_sum import OrderedSum
from tests.models import GivenGradients
from tests.shared_files import over_shared_files

PIECES = [(0, 5), (64, 1), (128, 64)]


def addends(dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(3, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[:, 64] = -0.0
    return values


@pytest.mark.parametrize("adds_up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_in_fp32_in_rank_order_and_leaves_padding_alone(dtype, adds_up):
    of_ranks, output = addends(dtype), torch.full((192,), 7.0)
    total = OrderedSum(PIECES, torch.device("cpu"))
    own = [of_ranks[1, start : start + numel] for start, numel in PIECES]
    squares = total.squares()
    total(output, squares, of_ranks[[0, 2]], own, 1, adds_up=adds_up)
    wanted, expected = (of_ranks[0].float() + of_ranks[1].float()) + of_ranks[2].float(), torch.full((192,), 7.0)
    for start, numel in PIECES:
        place = slice(start, start + numel)
        expected[place] = 7.0 + wanted[place] if adds_up else wanted[place]
    assert torch.equal(output, expected) and output[64].signbit() == (not adds_up)
    in_pieces = torch.cat([output[start : start + numel] for start, numel in PIECES])
    torch.testing.assert_close(squares.sum(), in_pieces.double().square().sum(), rtol=1e-14, atol=0)


def test_a_piece_without_a_gradient_is_zeros():
    of_ranks, output = addends(torch.bfloat16), torch.empty(192, dtype=torch.bfloat16)
    total = OrderedSum(PIECES, torch.device("cpu"))
    total(output, total.squares(), of_ranks[:1], [None, None, None], 0)
    for start, numel in PIECES:
        assert torch.equal(output[start : start + numel], of_ranks[0, start : start + numel])


def train_without_triton() -> list[torch.Tensor]:
    """Two micro-batches a step, one parameter without a gradient, a transposed one: no Triton kernel of any room."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[-1].endswith("_triton")}
    model = GivenGradients((33, 7), (5,), (130,), dtype=torch.bfloat16)
    opt = ShardedLion(model.parameters(), lr=1e-2, use_triton=False, sharding=ShardingConfig(bucket_numel=64))
    for step in range(3):
        for micro_batch in range(2):
            generator = torch.Generator().manual_seed(10 * step + micro_batch)
            grads = [torch.randint(-8, 9, tuple(w.shape), generator=generator).bfloat16() for w in model.weights]
            model.loss(grads).backward()
        opt.clip_grad_norm_(0.5)
        opt.step()
    used = [name for name in sys.modules if name == "lion_dist.peer_memory.ordered_sum_triton"]
    sys.modules.update(kept)
    assert not used
    return [p.detach().clone() for p in model.parameters()]


def test_without_triton_peers_gradients_are_summed_by_pytorch(gloo):
    peers, collectives = gloo.run(2, over_shared_files, train_without_triton), gloo.run(2, train_without_triton)
    for mine, others in zip(peers, collectives, strict=True):
        assert all(map(torch.equal, mine, others))
