"""Two levels over NCCL, on all GPUs: nodes of half of them, so of one where there are two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig, TwoLevels
from tests.composed.jobs import SHAPES, gradients
from tests.models import GivenGradients
from tests.test_sharded_gpu import on_all_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or torch.cuda.device_count() % 2 == 1, reason="needs an even number of CUDA GPUs"
    ),
]


def train(device: torch.device, dtype: torch.dtype, process_group, **sharding) -> tuple[list[torch.Tensor], str]:
    """Weights after five steps, and which way bytes moved. The sums of gradients are exact in any order."""
    model = GivenGradients(*SHAPES, dtype=dtype).to(device)
    opt = ShardedLion(
        model.parameters(),
        lr=2e-3,
        weight_decay=0.1,
        module=model,
        process_group=process_group,
        precision=PrecisionPolicy("split") if dtype == torch.bfloat16 else PrecisionPolicy(),
        sharding=ShardingConfig(bucket_numel=300, **sharding),
    )
    for step in range(5):
        model.loss([grad.to(device) for grad in gradients(step, dist.get_rank(), dtype=dtype)]).backward()
        opt.clip_grad_norm_(0.3)
        opt.step()
        opt.zero_grad()
    opt.finish_param_sync()
    return [param.detach() for param in model.parameters()], opt._builder.description(opt.shards)


def beside_flat_sharding(device: torch.device, dtype: torch.dtype, peer_memory: bool | None, param_sync: str) -> None:
    nodes, ranks = 2, dist.get_world_size() // 2
    levels = TwoLevels(init_device_mesh(device.type, (nodes, ranks), mesh_dim_names=("node", "local")))
    flat, _ = train(device, dtype, None, peer_memory=False)
    found, description = train(device, dtype, levels, peer_memory=peer_memory, param_sync=param_sync)
    assert all(map(torch.equal, found, flat))
    assert ("two levels" in description) == (ranks > 1)


@pytest.mark.parametrize("param_sync", ["gather", "coded"])
@pytest.mark.parametrize("peer_memory", [None, False], ids=["peer memory where there is", "NCCL alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_has_the_bits_of_flat_sharding(dtype, peer_memory, param_sync):
    on_all_gpus(beside_flat_sharding, dtype, peer_memory, param_sync)
