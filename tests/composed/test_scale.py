"""A rank of a composed job of 4,096 pretended ranks is made in seconds."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests import preloaded

CONSTRUCTION = """
import json, sys, time
import torch, torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from lion_dist import ModelParallel, ShardedLion, TwoLevels, sharded_params
from lion_dist.composed import axes
from lion_dist.sharding import memory_format

sharded_params.check_param = lambda param, name: None  # nobody trains these, and meta parameters are refused
memory_format.with_own_storage = lambda view: view  # meta tensors have no memory to share
axes.checksum = lambda param: 0
dist.init_process_group("fake", store=FakeStore(), rank=4095, world_size=4096)
mesh = dist.init_device_mesh("cpu", (8, 16, 4, 8), mesh_dim_names=("pp", "node", "local", "tp"))
two_levels = TwoLevels(mesh["node", "local"])
where = two_levels if sys.argv[1] == "two levels" else two_levels.mesh._flatten("dp")
layer = [(8192,), (1280, 8192), (8192, 1024), (8192,), (7168, 8192), (8192, 3584)]  # an eighth of a layer of 70 B
cuts = [None, 0, 1, None, 0, 1]
params = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in 10 * layer]
names = {f"param.{i}": cuts[i % 6] for i in range(60)}
started = time.process_time()
parts = ModelParallel(mesh["tp"], mesh["pp"], cut_dim=lambda name, _: names[name])
opt = ShardedLion(params, process_group=where, model_parallel=parts)
seconds = time.process_time() - started
numel = sum(p.numel() for p in params)
print(json.dumps(opt.memory_bytes() | {"numel": numel, "seconds": seconds, "buckets": len(opt.buckets)}))
"""


@pytest.mark.parametrize("levels", ["one level", "two levels"])
def test_data_64_x_tensor_8_x_pipeline_8(levels):
    done = subprocess.run([preloaded.python(), "-c", CONSTRUCTION, levels], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["seconds"] < 10
    assert made["params"] == pytest.approx(2 * made["numel"], rel=1e-3)
    share = 2 * made["numel"] / 64
    for kind in ("main_params", "exp_avg", "grads"):
        assert share <= made[kind] <= share * 1.01 + 64 * made["buckets"] * 2, kind
