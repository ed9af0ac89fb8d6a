"""What N ranks must arrive at, computed by one process: ``Lion`` fed the ranks' gradients summed in rank order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion

Loss = Callable[[nn.Module], Tensor]


def sum_in_order(addends: list[Tensor]) -> Tensor:
    """In fp32."""
    total = addends[0].float()
    for addend in addends[1:]:
        total = total + addend.float()
    return total


class Oracle:
    """Replays the ranks' micro-batches on a copy of the model.

    Gradients are summed over ranks in fp32, ((g0 + g1) + g2) + ..., a rank without one counting as zeros, and
    micro-batches that were reduced one by one are added up in fp32. ``wire``: the dtype that gradients are cast to
    before they are summed; None: the parameter's.
    """

    def __init__(self, model: nn.Module, lion: Lion, world_size: int, wire: torch.dtype | None = None):
        self.model, self.lion, self.world_size, self.wire = model, lion, world_size, wire
        self.params = [p for group in lion.param_groups for p in group["params"]]
        self._totals: dict[Tensor, Tensor] = {}
        self._local: list[dict[Tensor, Tensor]] = [{} for _ in range(world_size)]

    def backward(self, losses: Sequence[Loss | None], reduce: bool = True) -> None:
        """One micro-batch: ``losses[rank]`` of the model, None for a rank without a batch.

        ``reduce`` False: gradients stay on their ranks and add up in the parameter's dtype, as autograd's do.
        """
        for rank, loss in enumerate(losses):
            self._set_grads(self._local[rank])
            if loss is not None:
                loss(self.model).backward()
            self._local[rank] = {p: p.grad for p in self.params if p.grad is not None}
            self._set_grads({})
        if reduce:
            self._reduce()

    def _reduce(self) -> None:
        for param in self.params:
            grads = [local.get(param) for local in self._local]
            if all(grad is None for grad in grads):
                continue
            wire = self.wire or param.dtype
            addends = [torch.zeros_like(param, dtype=wire) if g is None else g.to(wire) for g in grads]
            total = self._sum(addends)
            self._totals[param] = self._totals[param] + total if param in self._totals else total
        self._local = [{} for _ in range(self.world_size)]

    def _sum(self, addends: list[Tensor]) -> Tensor:
        """fp32, of every rank's gradient as it is sent."""
        return sum_in_order(addends)

    def step(self, divisor: float | None = None, clip: float | None = None) -> Tensor:
        """One step of ``Lion`` with the gradients divided by ``divisor`` (None: the number of ranks) and clipped.

        Returns the norm before clipping, [] fp32.
        """
        unscaling = torch.tensor(1 / (self.world_size if divisor is None else divisor), dtype=torch.float64)
        squares = [total.double().square().sum() for total in self._totals.values()]
        norm = (torch.stack(squares).sum().sqrt() * unscaling).float()
        scale = unscaling.float()
        if clip is not None:
            scale = scale * (clip / (norm + 1e-6)).clamp(max=1.0)
        for param in self.params:
            param.grad_dtype = torch.float32
        self._set_grads(self._totals)
        self.lion.grad_scale = scale.double().reciprocal()  # GradScaler's protocol: gradients are divided by it
        self.lion.step()
        self._set_grads({})
        for param in self.params:
            param.grad_dtype = param.dtype
        self._totals = {}
        return norm

    def _set_grads(self, grads: dict[Tensor, Tensor]) -> None:
        for param in self.params:
            param.grad = grads.get(param)


def assert_same_params(model: nn.Module, expected: nn.Module) -> None:
    """Bit for bit, name by name."""
    theirs = dict(expected.named_parameters())
    for name, param in model.named_parameters():
        count = (param != theirs[name]).sum().item()
        assert count == 0, f"{name}: {count} of {param.numel()} elements differ from the expected"


def assert_same_state(opt: ShardedLion, model: nn.Module, lion: Lion, expected: nn.Module) -> None:
    """This rank's slices of momentum, main params and step counts are those of the unsharded Lion."""
    counterpart = dict(zip(model.parameters(), expected.parameters(), strict=True))
    for shard in opt.shards:
        parts = shard.bucket.slices
        columns = {"exp_avg": shard.slices_of(shard.exp_avg)}
        if shard.main_param is not None:
            columns["main_param"] = shard.slices_of(shard.main_param)
        if shard.steps is not None:
            columns["step"] = list(shard.steps)
        for key, pieces in columns.items():
            for part, piece in zip(parts, pieces, strict=True):
                param = shard.bucket.params[part.param]
                state = lion.state.get(counterpart[param])
                if not state:  # it never had a gradient
                    assert key == "main_param" or not piece.any(), f"{key} of {shard.bucket.names[part.param]} moved"
                    continue
                full = state[key]
                dims = shard.bucket.formats[part.param].dims  # slices count in memory order
                in_memory = full if dims is None or key == "step" else full.permute(dims)
                mine = full if key == "step" else in_memory.flatten()[part.param_start : part.param_stop]
                assert piece.dtype == mine.dtype
                assert torch.equal(piece, mine), f"{key} of {shard.bucket.names[part.param]} differs"


def assert_same_on_all_ranks(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        assert not param.isnan().any(), f"{name} holds a NaN"
    mine = {name: digest(p.detach()) for name, p in model.named_parameters()}
    everybody: list = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    for rank, theirs in enumerate(everybody):
        for name, expected in mine.items():
            assert theirs[name] == expected, f"{name} on this rank differs from rank {rank}'s"


def digest(tensor: Tensor) -> bytes:
    """Of dtype, shape and bits. (Tensors sent by pickle to be compared took 8% of the parity tests.)"""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + data.tobytes()).digest()
