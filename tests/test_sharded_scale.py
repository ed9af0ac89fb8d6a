"""What ShardedLion costs where no test can train (70 B parameters on meta tensors, thousands of pretended ranks), and
over hundreds of steps, where one can."""

import gc
import json
import subprocess

import pytest
import torch
from torch import nn

from lion_dist import ShardedLion, ShardingConfig
from tests import preloaded

CONSTRUCTION = """
import json, sys, time
import torch, torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from lion_dist import PrecisionPolicy, ShardedLion, sharded_params
from lion_dist.sharding import memory_format

sharded_params.check_param = lambda param, name: None  # nobody trains these, and meta parameters are refused
memory_format.with_own_storage = lambda view: view  # meta tensors have no memory to share
dist.init_process_group("fake", store=FakeStore(), rank=int(sys.argv[2]), world_size=int(sys.argv[1]))
dim, ffn, kv, vocab = 8192, 28672, 1024, 128_256
layer = [(dim,), (dim + 2 * kv, dim), (dim, dim), (dim,), (2 * ffn, dim), (dim, ffn)]
shapes = [(vocab, dim), *(80 * layer), (dim,), (vocab, dim)]
params = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in shapes]
ShardedLion(params[:1])  # imports what torch imports late
started = time.process_time()
optimizer = ShardedLion(params)
seconds = time.process_time() - started
memory = optimizer.memory_bytes() | {"numel": sum(p.numel() for p in params), "buckets": len(optimizer.buckets)}
print(json.dumps(memory | {"seconds": seconds}))
"""


def construct(world_size: int, rank: int) -> dict:
    command = [preloaded.python(), "-c", CONSTRUCTION, str(world_size), str(rank)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


@pytest.mark.parametrize("world_size", [64, pytest.param(4096, marks=pytest.mark.slow)])
def test_a_rank_of_a_70b_model_is_made_in_seconds_and_holds_what_the_formula_says(world_size):
    """bf16, split main params, bf16 momentum: 2 + 2/N + 2/N bytes a parameter, and 2/N of gradients."""
    made = construct(world_size, rank=world_size - 1)
    share = 2 * made["numel"] / world_size
    assert made["seconds"] < 10
    assert made["params"] == pytest.approx(2 * made["numel"], rel=1e-3)
    for kind in ("main_params", "exp_avg", "grads"):
        assert share <= made[kind] <= share * 1.001 + 64 * made["buckets"] * 2, kind


def live_tensor_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in gc.get_objects() if isinstance(x, torch.Tensor) and type(x).__module__ == "torch")


def train_and_watch(steps: int) -> list[tuple[int, int]]:
    """(bytes of live tensors, number of live objects) after each quarter of the steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 40)).bfloat16()
    optimizer = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(bucket_numel=1500))
    x, seen = torch.randn(8, 40).bfloat16(), []
    for step in range(1, steps + 1):
        for _ in range(2):
            (model(x) - x).float().square().mean().backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 4) == 0:
            optimizer.finish_param_sync()
            seen.append((live_tensor_bytes(), len(gc.get_objects())))
    return seen


@pytest.mark.slow
def test_memory_is_flat_over_hundreds_of_steps(gloo):
    for seen in gloo.run(2, train_and_watch, 400):
        (first_bytes, first_objects), *later = seen
        assert all(found == first_bytes for found, _ in later), seen
        assert all(objects <= first_objects + 50 for _, objects in later), seen
