"""Captured steps and peer memory beside tensor and pipeline parallel, on all GPUs: two, or any even number.

Of two GPUs both hold a part of the model, or both are data-parallel ranks along an axis of one part: only then is there
peer memory. Of four GPUs or more each axis has several ranks.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim.lr_scheduler import LambdaLR

import lion_dist.checkpoint
from lion_dist import CapturedStep, ModelParallel, ShardedLion, ShardingConfig
from tests.composed.test_tensor import parallelize
from tests.integrations.fsdp_ranks import Block, Net, full, inputs
from tests.test_sharded_gpu import on_all_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or torch.cuda.device_count() % 2 == 1, reason="needs an even number of CUDA GPUs"
    ),
]

STEPS = 7  # of which the fourth is captured


class Training:
    """This rank's part of a model on data-parallel ranks x ``parts`` along ``axis``."""

    def __init__(self, device: torch.device, axis: str, parts: int, peer_memory: bool | None):
        self.device = device
        mesh = init_device_mesh("cuda", (dist.get_world_size() // parts, parts), mesh_dim_names=("dp", axis))
        self.dp, self.part = mesh.get_local_rank("dp"), mesh.get_local_rank(axis)
        self.model, model_parallel = self.make(mesh, axis)
        self.opt = ShardedLion(
            self.model.parameters(),
            lr=torch.tensor(2e-3, device=device),
            weight_decay=0.1,
            module=self.model,
            process_group=mesh["dp"],
            model_parallel=model_parallel,
            sharding=ShardingConfig(bucket_numel=300, peer_memory=peer_memory),
        )
        self.schedule = LambdaLR(self.opt, lambda step: 1 / (1 + step))

    def make(self, mesh: DeviceMesh, axis: str) -> tuple[nn.Module, ModelParallel]:
        if axis == "tp":
            return parallelize(Net().to(self.device), mesh["tp"]), ModelParallel(tensor=mesh["tp"])
        torch.manual_seed(1 + self.part)
        stage = nn.ModuleDict({f"blocks {self.part}": nn.Sequential(Block(), Block())}).to(self.device)
        return stage, ModelParallel(pipeline=mesh["pp"])

    def forward(self, x: Tensor) -> Tensor:
        """Of a pipeline stage, its own blocks: the graph has the norm over all stages, and no schedule."""
        if isinstance(self.model, Net):
            return self.model(x).float()
        (blocks,) = self.model.values()
        return blocks(x).square().mean() * (1 + self.part)

    def step(self, first: Tensor, second: Tensor) -> Tensor:
        with self.opt.no_sync():
            self.forward(first).backward()
        self.forward(second).backward()
        norm = self.opt.clip_grad_norm_(0.05)
        self.opt.step()
        self.opt.zero_grad()
        return norm

    def run(self, call, steps: range) -> list[Tensor]:
        """The norm of each step. In step 5 an input is not finite, of one data-parallel rank and one pipeline stage."""
        norms = []
        for step in steps:
            batches = [inputs(2 * step + i, self.dp).to(self.device) for i in range(2)]
            if step == 5 and self.dp == 0 and (self.part == 0 or isinstance(self.model, Net)):
                batches[0][0, 0] = torch.nan
            norms.append(call(*batches).clone())
            self.schedule.step()
        return norms

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        return self.forward(inputs(99, self.dp).to(self.device)).clone()

    def everything(self) -> list[Tensor]:
        self.opt.finish_param_sync()
        params = [full(param).detach().clone() for param in self.model.parameters()]
        return params + [shard.exp_avg.clone() for shard in self.opt.shards]


def capture_beside_eager(device: torch.device, axis: str, parts: int, peer_memory: bool | None) -> None:
    eager, captured = (Training(device, axis, parts, peer_memory) for _ in range(2))
    replay = CapturedStep(captured.step, captured.opt)
    for steps in (range(5), range(5, STEPS)):
        norms = zip(eager.run(eager.step, steps), captured.run(replay, steps), strict=True)
        assert all(torch.equal(*pair) or pair[0].isnan() and pair[1].isnan() for pair in norms)
        assert torch.equal(eager.evaluate(), captured.evaluate())  # between replays, when parameters are stale
    assert replay._graph is not None
    assert all(map(torch.equal, captured.everything(), eager.everything()))
    for training in (eager, captured):
        assert (training.opt.skipped_steps(), training.opt.taken_steps()) == (1, STEPS - 1)


CASES = pytest.mark.parametrize(
    ("parts", "peer_memory"),
    [
        pytest.param(2, None, id="two parts, peer memory along data-parallel ranks"),
        pytest.param(2, False, id="two parts, NCCL"),
        pytest.param(1, None, id="one part, peer memory"),
    ],
)


@CASES
@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_replays_arrive_at_the_bits_of_eager_steps(axis, parts, peer_memory):
    """Under a schedule, with clipping by the norm of all parts, and one step that a NaN on one rank skips on all."""
    on_all_gpus(capture_beside_eager, axis, parts, peer_memory)


def train_over(device: torch.device, axis: str, parts: int) -> None:
    over_peers, over_nccl = (Training(device, axis, parts, peer_memory) for peer_memory in (None, False))
    for training in (over_peers, over_nccl):
        training.run(training.step, range(4))
    assert all(map(torch.equal, over_peers.everything(), over_nccl.everything()))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_peer_memory_has_the_bits_of_nccl(axis, parts):
    if torch.cuda.device_count() // parts > 2:
        pytest.skip("NCCL sums more than two addends in an order of its own")
    on_all_gpus(train_over, axis, parts)


def save_between_replays(device: torch.device, axis: str, folder: str) -> None:
    captured, resumed = (Training(device, axis, 2, None) for _ in range(2))
    replay = CapturedStep(captured.step, captured.opt)
    captured.run(replay, range(5))
    lion_dist.checkpoint.save(f"{folder}/saved", model=captured.model, optimizer=captured.opt)
    lion_dist.checkpoint.load(f"{folder}/saved", model=resumed.model, optimizer=resumed.opt)
    resumed.schedule.last_epoch = captured.schedule.last_epoch
    norms = zip(captured.run(replay, range(6, 8)), resumed.run(resumed.step, range(6, 8)), strict=True)
    assert all(torch.equal(*pair) for pair in norms)
    assert all(map(torch.equal, captured.everything(), resumed.everything()))


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_a_checkpoint_between_replays_holds_all_parts_of_the_step(axis, tmp_path):
    on_all_gpus(save_between_replays, axis, str(tmp_path))
