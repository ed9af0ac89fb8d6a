"""Small models with every kind of parameter, and batches that any rank can make for any other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH = 29, 8


class Everything(nn.Module):
    """A language model in miniature. Beside ordinary weights it has a parameter

    * used twice, the second time functionally (``embedding.weight``, also the output projection),
    * that only batches with ``detour`` use (``detour``), and one that nothing uses (``unused``),
    * that is frozen (``frozen``), of no dimensions (``gain``), of no elements (``empty``), and
    * of fewer elements than there are ranks (``tiny``).
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.detour = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, 3)
        self.frozen = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.tiny = nn.Parameter(torch.tensor([0.25, -0.5, 0.75]))
        self.register_buffer("mask", torch.ones(WIDTH))

    def forward(self, tokens: Tensor, detour: bool = False) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        x = self.norm(x) * self.gain + self.frozen * self.mask + self.empty.sum()
        if detour:
            x = x + self.detour(x)
        return F.linear(x, self.embedding.weight) + self.tiny.mean()


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # [examples, length] int64
    targets: Tensor  # [examples, length] int64
    detour: bool = False

    def loss(self, model: nn.Module) -> Tensor:
        logits = model(self.tokens, self.detour)
        return F.cross_entropy(logits.flatten(0, -2).float(), self.targets.flatten())


def make_batch(step: int, micro_batch: int, rank: int, detour: bool = False) -> Batch:
    """The batch that ``rank`` gets; any rank can make it."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * micro_batch + rank)
    tokens = torch.randint(VOCABULARY, (3, 6), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:], detour)


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Everything:
    torch.manual_seed(seed)
    return Everything().to(dtype)


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o) for i, o in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])


class GivenGradients(nn.Module):
    """``loss(gradients)`` has exactly these gradients, so a test decides them by the bit."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    def loss(self, gradients: list[Tensor | None]) -> Tensor:
        return given_loss(self.weights, gradients)


def given_loss(weights: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> Tensor:
    """0, with exactly these gradients for ``weights``."""
    terms = [_LinearIn.apply(weight, grad) for weight, grad in zip(weights, gradients, strict=True) if grad is not None]
    return torch.stack(terms).sum()


class _LinearIn(torch.autograd.Function):
    """(weight, grad) -> 0, with the gradient ``grad`` for ``weight``."""

    @staticmethod
    def forward(ctx, weight: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return weight.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return ctx.saved_tensors[0] * upstream.to(ctx.saved_tensors[0].dtype), None
