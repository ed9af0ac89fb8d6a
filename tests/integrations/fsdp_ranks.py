"""What the ranks of the FSDP tests run: models to shard, and the plain ``Lion`` that is fed the engine's gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lion_dist import Lion, PrecisionPolicy

BF16, FP32 = torch.bfloat16, torch.float32
SETTINGS = dict(lr=2e-3, weight_decay=0.1)
WIDTH = 8

POLICIES = {  # dtype of the parameters, policy
    "fp32": (FP32, PrecisionPolicy()),
    "fp32, bf16 momentum": (FP32, PrecisionPolicy(momentum_dtype=BF16)),
    "split": (BF16, PrecisionPolicy("split")),
    "split, fp32 momentum": (BF16, PrecisionPolicy("split", FP32)),
    "fp32 main": (BF16, PrecisionPolicy("fp32")),
    "none, stochastic": (BF16, PrecisionPolicy("none", BF16, "stochastic", seed=5)),
}


class Block(nn.Module):
    """A norm, a widening and a narrowing layer; 5 * WIDTH hidden rows, which four ranks do not share evenly by 16."""

    def __init__(self, width: int = WIDTH, hidden: int = 5 * WIDTH):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks and a head of 3 rows: uneven on two ranks, absent from the fourth of four."""

    def __init__(self, dtype: torch.dtype = FP32, blocks: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).float().square().mean()


class NetWithSpares(Net):
    """With a layer that nothing uses, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.unused, self.frozen = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.frozen(x).mean()


def inputs(step: int, rank: int | None = None, micro_batch: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    """[examples, length, WIDTH], other ones for every rank."""
    seed = 1000 * step + 10 * micro_batch + (dist.get_rank() if rank is None else rank)
    return torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mesh_of(**axes: int) -> DeviceMesh:
    """``mesh_of(replicate=2, shard=2)``

    DTensor remembers placements by the mesh's shape, with the groups of the mesh it saw first; those are gone when
    another test comes with a like mesh.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def shard(model: Net, mesh: DeviceMesh, tensor_parallel: bool = False, **options) -> Net:
    """FSDP2 over all axes of ``mesh``, but the one named "tensor": that one splits the blocks' layers."""
    if tensor_parallel:
        plan = {
            "blocks.*.norm": SequenceParallel(),
            "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
            "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
            "head": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(model, mesh["tensor"], plan)
        mesh = mesh[tuple(name for name in mesh.mesh_dim_names if name != "tensor")]
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor. gloo and NCCL move no int16: a remainder travels as the bf16 of the same bits."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    if tensor.dtype == torch.int16:
        return tensor.view(BF16).full_tensor().view(torch.int16)
    return tensor.detach().full_tensor().clone()


class Twin:
    """A plain ``Lion`` over a copy of the unsharded model, fed the gradients that the engine has reduced."""

    def __init__(self, model: nn.Module, **settings):
        self.model = copy.deepcopy(model)
        self.opt = Lion(self.model.parameters(), **settings)

    def step(self, sharded: nn.Module) -> None:
        for mine, theirs in zip(self.model.parameters(), sharded.parameters(), strict=True):
            mine.grad = None if theirs.grad is None else full(theirs.grad)
        self.opt.step()

    def assert_equal(self, sharded: nn.Module, opt: Lion, but: tuple[str, ...] = ()) -> None:
        """Parameters and state, bit for bit; of those whose names end with ``but`` nothing is said."""
        named = zip(self.model.named_parameters(), sharded.parameters(), strict=True)
        for (name, mine), theirs in named:
            if name.endswith(but):
                continue
            assert torch.equal(full(theirs), mine), f"{name} differs"
            for key, value in self.opt.state[mine].items():
                assert opt.state[theirs][key].dtype == value.dtype
                assert torch.equal(full(opt.state[theirs][key]), value), f"{key} of {name} differs"


def train(
    sharded: nn.Module,
    opt: Lion,
    twin: Twin,
    steps: int = 3,
    before_step: Callable[[], object] = lambda: None,
    device: str = "cpu",
) -> None:
    """``steps`` steps of both, each rank on batches of its own."""
    dtype = next(twin.model.parameters()).dtype
    for step in range(steps):
        opt.zero_grad()
        sharded(inputs(step, dtype=dtype).to(device)).backward()
        before_step()
        twin.step(sharded)
        opt.step()
