"""One model under every engine, and a training loop whose bits do not depend on the number of ranks."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig

POLICIES = {
    "fp32 parameters": (torch.float32, PrecisionPolicy()),
    "fp32 parameters, bf16 momentum": (torch.float32, PrecisionPolicy(momentum_dtype=torch.bfloat16)),
    "split": (torch.bfloat16, PrecisionPolicy(main_params="split")),
    "split, fp32 momentum": (torch.bfloat16, PrecisionPolicy(main_params="split", momentum_dtype=torch.float32)),
    "fp32 main params": (torch.bfloat16, PrecisionPolicy(main_params="fp32", momentum_dtype=torch.float32)),
    "no main params": (torch.bfloat16, PrecisionPolicy(main_params="none", momentum_rounding="stochastic", seed=3)),
}


def new_model(dtype):
    """Rows that 2, 3 and 4 ranks share unevenly, down to a single one, which leaves other ranks nothing."""
    torch.manual_seed(1)
    layers = [nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 33), nn.LayerNorm(33), nn.Linear(33, 7), nn.Linear(7, 1)]
    model = nn.Sequential(*layers).to(dtype)
    model.register_buffer("scale", torch.full((3,), 2.0))
    return model


def engine(name, policy):
    """The model wrapped, and its optimizer."""
    dtype, precision = POLICIES[policy]
    model = new_model(dtype)
    options = {"lr": 1e-3, "weight_decay": 0.1, "precision": precision}
    match name:
        case "plain":
            pass
        case "ddp":
            model = DistributedDataParallel(model)
        case "sharded":
            sharding = ShardingConfig(bucket_numel=900)
            return model, ShardedLion(model.parameters(), module=model, sharding=sharding, **options)
        case "sharded hsdp":
            mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
            return model, ShardedLion(model.parameters(), module=model, process_group=mesh, **options)
        case "fsdp2" | "fsdp2 hsdp" | "fsdp2 in one unit":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            if name == "fsdp2 hsdp":
                mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
            for layer in model if name != "fsdp2 in one unit" else ():
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        case "fsdp1" | "fsdp1 flat" | "fsdp1 grad op":
            model = FullyShardedDataParallel(
                model,
                use_orig_params=name == "fsdp1",
                auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
                device_id=torch.device("cpu"),
                sharding_strategy=ShardingStrategy.SHARD_GRAD_OP if name == "fsdp1 grad op" else None,
            )
    return model, Lion(model.parameters(), **options)


def train(model, optimizer, steps):
    """Every rank has the same batch, so that the mean over 1, 2 or 4 ranks is the same to the bit."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        x = torch.randn(4, 13, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def tensors_in(path):
    """The full tensors of a checkpoint, read by torch.distributed.checkpoint's own reader."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return tensors


def assert_same_tensors(first, second):
    first, second = tensors_in(first), tensors_in(second)
    assert first.keys() - {"counters"} == second.keys() - {"counters"}
    for name in first.keys() - {"counters"}:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name
