"""Does Lion train as well when workers exchange one small integer a weight every H steps? Paired runs on one device.

    python launch/rounds_study.py --seeds 0 1 2 --out runs/rounds         # one process per GPU, other seeds each
    python launch/rounds_study.py --report --out runs/rounds              # the table and the picture

A study that was cut off goes on where it stopped: runs whose result is in --out are not repeated.

A round: K workers start from the same weights `start` and take H steps of Lion at one learning rate, each on its own
K-th of the batch. Worker i moves every weight by lr times an integer k_i in [-H, H], because a step of Lion moves it by
-lr, 0 or +lr and weight decay waits for the round's end. Inside the round its weights are `start + lr * k_i`. At the
round's end all workers take

    start = start * (1 - lr * weight_decay)^H + outer step, which is made of the mean of the integers k_i.

The learning rate of a round is the mean of the schedule over its steps.

The workers of one run are computed together, by batched products: the same arithmetic for each, and one launch for all.
Clipping is per worker, as each would do it alone. Every arm of a seed sees the same batches.

Considered and dropped: ``torch.func.vmap`` of the model. On GPUs torch 2.11 then takes cuDNN's attention, whose
gradients are NaN there, and the model does not compile.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from comparison import study
from train import Transformer, global_batch, lr_factor, rotate

BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        workers, steps: K and H. One worker with H = 1 is synchronous Lion.
        outer: "mean" adds lr times the mean of the integers; "nesterov" is DiLoCo's outer optimizer on it (arXiv
            2311.08105); "sign" moves by the sign of the mean, as far on average as the mean does.
        momentum: at a round's end each worker's is "kept", "averaged" over the workers, or "reset" to zero.
        alone: a single worker that sees 1/K of the batch and never meets the others.
    """

    workers: int = 4
    steps: int = 30
    outer: str = "mean"
    momentum: str = "averaged"
    alone: bool = False

    def __str__(self):
        if self.alone:
            return f"alone on 1/{self.workers} of the batch"
        if (self.workers, self.steps) == (1, 1):
            return "synchronous"
        return f"K = {self.workers}, H = {self.steps}, {self.outer}, momentum {self.momentum}"


BASELINE = Arm(1, 1, momentum="kept")
ARMS = [
    *(BASELINE, Arm(), Arm(momentum="kept"), Arm(momentum="reset"), Arm(outer="nesterov"), Arm(outer="sign")),
    *(Arm(steps=10), Arm(steps=100), Arm(workers=2), Arm(workers=8), Arm(workers=1, momentum="kept")),
    *(Arm(workers=count, steps=1, momentum="kept", alone=True) for count in (4, 8)),
]
BASELINES = dict.fromkeys(map(str, ARMS), str(BASELINE)) | {str(BASELINE): None}


def parse_arguments() -> argparse.Namespace:
    return study.parse_arguments(__doc__.split("\n")[0], "runs/rounds", _add_arguments)


def _add_arguments(add: Callable) -> None:
    add("--arms", type=int, nargs="+", default=range(len(ARMS)), help="which, by their place in ARMS")
    add("--outer-lr", type=float, default=0.7, help="of Nesterov's outer step")
    add("--outer-momentum", type=float, default=0.9, help="of Nesterov's outer step")


def losses_of_all(params: dict[str, Tensor], windows: Tensor, layers: int, heads: int) -> Tensor:
    """``Transformer.forward`` of launch/train.py for K workers at once.

    Args:
        params: of every worker, [K, ...].
        windows: uint8 [K, batch, seq_len + 1].

    Returns:
        [K]: each worker's mean loss in nats.
    """
    workers, batch, seq_len = windows.shape[0], windows.shape[1], windows.shape[2] - 1
    table = params["embedding.weight"]  # [K, 256, dim]
    offsets = 256 * torch.arange(workers, device=windows.device).view(-1, 1, 1)
    x = F.embedding((windows[..., :-1].long() + offsets).flatten(1), table.flatten(0, 1))  # [K, batch * seq_len, dim]

    def norm(x: Tensor, name: str) -> Tensor:
        return (F.rms_norm(x.float(), x.shape[-1:]) * params[name].unsqueeze(1)).to(x.dtype)

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.bmm(x, params[name].mT)

    for i in range(layers):
        block = f"blocks.{i}."
        qkv = linear(norm(x, block + "attention_norm.weight"), block + "qkv.weight")
        q, k, v = qkv.view(workers * batch, seq_len, 3, heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(x.shape), block + "attention_out.weight")
        gate, up = linear(norm(x, block + "mlp_norm.weight"), block + "gate_and_up.weight").chunk(2, dim=-1)
        x = x + linear(F.silu(gate) * up, block + "mlp_out.weight")
    logits = torch.bmm(norm(x, "norm.weight"), table.mT).float()
    targets = windows[..., 1:].long().flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets, reduction="none").view(workers, -1).mean(dim=1)


def params_of_all(start: dict[str, Tensor], counts: dict[str, Tensor], lr: Tensor) -> dict[str, Tensor]:
    """The workers' weights, bf16 [K, ...]: rounded once, from where the round began."""
    return {name: (p + lr * counts[name]).bfloat16() for name, p in start.items()}


def update_in_place(grads: dict[str, Tensor], counts: dict[str, Tensor], momenta: dict[str, Tensor]) -> Tensor:
    """Lion on every worker, all [K, ...]: ``counts`` move by -1, 0 or 1. Each worker clips its own norm to 1.

    Returns:
        [] bool: all norms are finite.
    """
    squares = sum(grad.float().flatten(1).square().sum(dim=1) for grad in grads.values())
    factors = (1.0 / squares.sqrt()).clamp(max=1.0)  # [K]
    for name, grad in grads.items():
        momentum = momenta[name]
        grad = grad.float() * factors.view(-1, *[1] * (grad.dim() - 1))
        counts[name].sub_(torch.sign(momentum * BETAS[0] + grad * (1 - BETAS[0])))
        momentum.mul_(BETAS[1]).add_(grad * (1 - BETAS[1]))
    return squares.isfinite().all()


class Workers:
    """K workers of one run. ``start``: fp32, one tensor a parameter; ``counts``, ``momenta``: [K, ...] of each."""

    def __init__(self, model: Transformer, arm: Arm, args: argparse.Namespace):
        self.model, self.arm, self.args = model, arm, args
        self.count = 1 if arm.alone else arm.workers
        self.start = {name: p.detach().float() for name, p in model.named_parameters()}
        stacked = {name: p.new_zeros(self.count, *p.shape) for name, p in self.start.items()}
        self.counts = stacked
        self.momenta = {name: torch.zeros_like(x) for name, x in stacked.items()}
        self.velocity = {name: torch.zeros_like(p) for name, p in self.start.items()}
        wrap = (lambda f: f) if args.no_compile else lambda f: torch.compile(f, dynamic=False)  # K is a shape
        self._losses, self._params_of_all, self._update = map(wrap, (losses_of_all, params_of_all, update_in_place))
        self.grads_are_finite = torch.ones((), dtype=torch.bool, device=next(model.parameters()).device)

    def step(self, windows: Tensor, lr: Tensor) -> Tensor:
        """One step of every worker on ``windows`` [K, batch, seq_len + 1]; ``lr``: []. Returns the mean loss."""
        params = {name: p.requires_grad_() for name, p in self._params_of_all(self.start, self.counts, lr).items()}
        losses = self._losses(params, windows, len(self.model.blocks), self.args.heads)
        # The sum of all workers' losses: each worker's own gradient, because no worker's loss depends on another's.
        grads = torch.autograd.grad(losses.sum(), list(params.values()))
        self.grads_are_finite &= self._update(dict(zip(params, grads, strict=True)), self.counts, self.momenta)
        return losses.detach().mean()

    def end_round(self, lr: float, steps: int) -> None:
        """Weight decay, then the outer step; all workers go on from the same weights."""
        for name, start in self.start.items():
            counts = self.counts[name]
            if start.dim() == 2:
                start.mul_((1.0 - lr * self.args.weight_decay) ** steps)
            start.add_(self._outer_step(name, lr * counts.mean(dim=0)))
            counts.zero_()
            if self.arm.momentum == "averaged":
                self.momenta[name].copy_(self.momenta[name].mean(dim=0, keepdim=True).expand_as(counts))
            elif self.arm.momentum == "reset":
                self.momenta[name].zero_()

    def _outer_step(self, name: str, mean: Tensor) -> Tensor:
        if self.arm.outer == "mean":
            return mean
        if self.arm.outer == "sign":
            return mean.sign() * mean.abs().mean()
        velocity = self.velocity[name].mul_(self.args.outer_momentum).add_(mean)
        return self.args.outer_lr * (mean + self.args.outer_momentum * velocity)


def run(args: argparse.Namespace, text: tuple[Tensor, Tensor], device: torch.device, seed: int, arm: Arm) -> dict:
    torch.manual_seed(seed)
    model = Transformer(args.layers, args.dim, args.heads).to(device, torch.bfloat16)
    workers, losses, started = Workers(model, arm, args), [], time.perf_counter()
    rows = args.batch_size // arm.workers
    in_round, lr = 0, 0.0
    for step in range(args.steps):
        if in_round == 0:  # a schedule moves between rounds: the mean of what it gives to the steps of this one
            ahead = range(step, min(step + arm.steps, args.steps))
            lr = args.lr * statistics.mean(lr_factor(i, args.warmup, args.steps) for i in ahead)
        windows = global_batch(text[0], args.batch_size, args.seq_len, seed, step)
        windows = windows[: rows * workers.count].view(workers.count, rows, -1).to(device, non_blocking=True)
        loss = workers.step(windows, torch.tensor(lr, device=device))
        in_round += 1
        if in_round == arm.steps or step == args.steps - 1:
            workers.end_round(lr, in_round)
            in_round = 0
        if step % study.EVERY == 0:
            losses.append(loss)
    if not workers.grads_are_finite:
        raise FloatingPointError(f"seed {seed}, {arm}: a gradient was not finite, and the run measures nothing.")
    params = {name: p.bfloat16() for name, p in workers.start.items()}
    return study.result_of(args, lambda part: functional_call(model, params, (part,)), text, losses, device, started)


def train(args: argparse.Namespace) -> None:
    arms = {str(ARMS[i]): ARMS[i] for i in args.arms}
    study.train(args, arms, lambda *given: functools.partial(run, *given))


def main() -> None:
    args = parse_arguments()
    study.report(args, BASELINES, "rounds-study.png") if args.report else train(args)


if __name__ == "__main__":
    main()
