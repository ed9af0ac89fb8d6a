"""Storages and memory formats of parameters in GPU memory, by NCCL and over peer memory."""

from __future__ import annotations

import io

import pytest
import torch
import torch.distributed as dist

from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig
from tests.test_sharded_gpu import on_all_gpus
from tests.test_sharded_memory_formats import make_weights, strides

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def train_in_both_formats(device: torch.device, peer_memory: bool | None, dtype: torch.dtype) -> None:
    """Gradients are small integers, whose sums are exact in any order."""
    models = make_weights(dtype).to(device), make_weights(dtype, formatted=False).to(device)
    before = strides(models[0])
    sharding = ShardingConfig(bucket_numel=300, peer_memory=peer_memory)
    policy = PrecisionPolicy("split") if dtype == torch.bfloat16 else PrecisionPolicy()
    opts = [ShardedLion(m.parameters(), lr=1e-2, module=m, sharding=sharding, precision=policy) for m in models]
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        grads = [torch.randint(-4, 5, p.shape, generator=generator).to(device, dtype) for p in models[0].weights]
        for model, opt in zip(models, opts, strict=True):
            model.loss(grads).backward()
            opt.step()
    for opt in opts:
        opt.finish_param_sync()
        opt.check_replicas()
    for mine, other in zip(models[0].weights, models[1].weights, strict=True):
        assert torch.equal(mine, other)
    assert strides(models[0]) == before != strides(models[1])
    for model in models:
        storages = [p.untyped_storage() for p in model.weights]
        assert [s.nbytes() for s in storages] == [p.nbytes for p in model.weights]
        assert len({s.data_ptr() for s in storages}) == len(storages) and not any(s.resizable() for s in storages)
        file = io.BytesIO()
        torch.save(model.weights[4], file)
        assert len(file.getvalue()) < 3000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peer_memory", [None, False], ids=["peers", "NCCL"])
def test_memory_formats_train_to_the_same_bits_and_storages_are_their_own(peer_memory, dtype):
    on_all_gpus(train_in_both_formats, peer_memory, dtype)
