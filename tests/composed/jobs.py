"""What the tests of composed jobs share: meshes, models of which a rank has a part, and one process that has it all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lion_dist import Lion, ShardedLion
from tests.models import GivenGradients

LR = 2**-7
SHAPES = ((33, 7), (5,), (8, 12), (130,))  # the first two are on the first stage


def mesh_of(**axes: int) -> DeviceMesh:
    """DTensor remembers placements by the mesh's shape, with the groups of the mesh that it saw first."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def place_on(mesh: DeviceMesh, axis: str) -> int:
    return mesh.get_local_rank(axis)


def gradients(step: int, rank: int, shapes=SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Those of the whole model on one data-parallel rank: multiples of 1/8, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randint(-8, 8, shape, generator=generator).to(dtype) / 8 for shape in shapes]


class OneProcess:
    """The whole model, trained by ``Lion`` on the sum of all data-parallel ranks' gradients."""

    def __init__(self, num_ranks: int, *, shapes=SHAPES, dtype: torch.dtype = torch.float32, **settings):
        self.model = GivenGradients(*shapes, dtype=dtype)
        self.num_ranks, self.shapes, self.dtype = num_ranks, shapes, dtype
        self.lion = Lion(self.model.parameters(), **settings)

    def step(self, step: int, clip: float | None = None, poison: tuple[int, float] | None = None) -> Tensor:
        """Returns the norm before clipping. ``poison``: a parameter whose gradient has this value somewhere."""
        ranks = [gradients(step, rank, self.shapes, self.dtype) for rank in range(self.num_ranks)]
        sums = [torch.stack([grad.float() for grad in of_param]).sum(0) for of_param in zip(*ranks, strict=True)]
        if poison is not None:
            sums[poison[0]].view(-1)[0] = poison[1]
        unscaling = torch.tensor(1 / self.num_ranks, dtype=torch.float64)
        norm = (torch.stack([s.double().square().sum() for s in sums]).sum().sqrt() * unscaling).float()
        scale = unscaling.float()
        if clip is not None:
            scale = scale * (clip / (norm + 1e-6)).clamp(max=1.0)
        for param, total in zip(self.model.parameters(), sums, strict=True):
            param.grad_dtype = torch.float32
            param.grad = total
        self.lion.grad_scale = scale.double().reciprocal()
        self.lion.found_inf = torch.tensor(float(not norm.isfinite()))
        self.lion.step()
        return norm


def exp_avg_of(opt: ShardedLion, param: Tensor) -> Tensor:
    """The whole momentum of one of this rank's tensors, gathered over the data-parallel ranks."""
    state = opt.state_dict()["state"]
    number = [p for group in opt.param_groups for p in group["params"]].index(param)
    value = state[number]["exp_avg"]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def rank() -> int:
    return dist.get_rank()
