"""Which ranks share what: experts, sub-groups of the world, replicate x shard meshes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.sharding.process_groups import resolve_groups
from tests.models import GivenGradients, make_batch, make_model
from tests.oracle import Oracle, assert_same_on_all_ranks, assert_same_params

LR = 2**-7
STAGES = pytest.mark.parametrize("stage", [1, 2])


# ---- experts


def train_experts(stage: int) -> dict:
    """Dense parameters on 4 ranks; one expert lives on ranks 0 and 2, another on 1 and 3 (groups of two)."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[rank % 2]
    model = GivenGradients((70,), (200,))
    model.weights[1].data.fill_(1.0 + rank % 2 + 10 * (rank > 1))  # the first rank of the group has the values
    opt = ShardedLion(
        [{"params": [model.weights[0]]}, {"params": [model.weights[1]], "process_group": mine, "lr": 2 * LR}],
        lr=LR,
        sharding=ShardingConfig(stage, bucket_numel=64, average=False),
        betas=(0.0, 0.0),  # exp_avg is the gradient
    )
    start = model.weights[1].detach().clone()
    model.loss([torch.full((70,), 1.0), torch.full((200,), float(1 + rank))]).backward()
    norm = opt.grad_norm()
    opt.step()
    assert torch.equal(model.weights[1], start - 2 * LR)
    expert = [s for s in opt.shards if s.bucket.params[0] is model.weights[1]]
    assert sum(s.exp_avg.numel() for s in expert) == 256 // 2  # halves, of 200 padded
    grads = torch.cat([piece for s in expert for piece in s.slices_of(s.exp_avg)])
    return {"start": start[0].item(), "norm": norm.item(), "grad": grads.unique().tolist()}


@STAGES
def test_experts_are_reduced_among_their_own_ranks(gloo, stage):
    results = gloo.run(4, train_experts, stage)
    assert [r["start"] for r in results] == [1.0, 2.0, 1.0, 2.0]
    # ranks 0 and 2 bring 1 + 3, ranks 1 and 3 bring 2 + 4
    assert [r["grad"] for r in results] == [[4.0], [6.0], [4.0], [6.0]]
    norm = (70 * 4.0**2 + 200 * 4.0**2 + 200 * 6.0**2) ** 0.5  # of the model that the ranks hold together
    assert [r["norm"] for r in results] == [pytest.approx(norm)] * 4


def skip_when_one_expert_overflows() -> None:
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = GivenGradients((70,), (200,))
    opt = ShardedLion(
        [{"params": [model.weights[0]]}, {"params": [model.weights[1]], "process_group": groups[rank // 2]}], lr=LR
    )
    before = [p.detach().clone() for p in model.weights]
    model.loss([torch.ones(70), torch.full((200,), float("inf") if rank == 3 else 1.0)]).backward()
    opt.step()
    for param, value in zip(model.weights, before, strict=True):
        assert torch.equal(param, value)
    assert opt.skipped_steps() == 1


def test_overflow_in_one_expert_skips_the_step_everywhere(gloo):
    gloo.run(4, skip_when_one_expert_overflows)


def keep_an_expert_alone() -> list[float]:
    """One expert a rank: its group has one rank, nothing is communicated for it."""
    rank = dist.get_rank()
    alone = [dist.new_group([r]) for r in range(2)][rank]
    model = GivenGradients((70,), (5,))
    opt = ShardedLion(
        [{"params": [model.weights[0]]}, {"params": [model.weights[1]], "process_group": alone}],
        lr=LR,
        sharding=ShardingConfig(average=False),
        betas=(0.0, 0.0),
    )
    model.loss([torch.ones(70), torch.full((5,), 1.0 + rank)]).backward()
    norm = opt.grad_norm().item()
    opt.step()
    (expert,) = [s for s in opt.shards if s.bucket.params[0] is model.weights[1]]
    assert expert.slices_of(expert.exp_avg)[0].tolist() == [1.0 + rank] * 5
    assert opt.memory_bytes()["exp_avg"] == 4 * (64 + 64)
    return norm


def test_one_expert_a_rank(gloo):
    assert gloo.run(2, keep_an_expert_alone) == [pytest.approx((70 * 4 + 5 * 1 + 5 * 4) ** 0.5)] * 2


# ---- a group other than the world


def train_in_half_of_the_world(stage: int) -> None:
    """Two models side by side, each on two ranks of four."""
    rank = dist.get_rank()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half, place = rank // 2, rank % 2
    model = make_model(seed=half)
    expected = copy.deepcopy(model)
    opt = ShardedLion(
        model.parameters(), lr=2e-3, module=model, process_group=halves[half], sharding=ShardingConfig(stage, 100)
    )
    oracle = Oracle(expected, Lion(expected.parameters(), lr=2e-3), 2)
    for step in range(3):
        losses = [make_batch(step, half, r).loss for r in range(2)]
        losses[place](model).backward()
        oracle.backward(losses)
        assert torch.equal(opt.clip_grad_norm_(0.3), oracle.step(clip=0.3))
        opt.step()
    opt.finish_param_sync()
    assert_same_params(model, expected)


@STAGES
def test_process_group_smaller_than_the_world(gloo, stage):
    gloo.run(4, train_in_half_of_the_world, stage)


# ---- meshes


def train_on(mesh_shape: tuple[int, ...] | None, stage: int, policy: PrecisionPolicy, dtype: torch.dtype) -> list:
    """Gradients whose sums are exact in any order: multiples of 1/8 below 8."""
    rank = dist.get_rank()
    where = None
    if mesh_shape is not None:
        names = ("replicate", "shard")[-len(mesh_shape) :]
        where = dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model = GivenGradients((33, 7), (5,), (), (130,), dtype=dtype)
    opt = ShardedLion(
        model.parameters(),
        lr=1e-3,
        weight_decay=0.1,
        process_group=where,
        sharding=ShardingConfig(stage, bucket_numel=64),
        precision=policy,
    )
    for step in range(4):
        generator = torch.Generator().manual_seed(100 * step + rank)
        grads = [torch.randint(-8, 8, p.shape, generator=generator).to(dtype) / 8 for p in model.weights]
        model.loss(grads).backward()
        opt.clip_grad_norm_(1.0)
        opt.step()
    assert_same_on_all_ranks(model)
    kept = opt.memory_bytes()["exp_avg"]
    return [[p.detach() for p in model.weights], kept]


@STAGES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replicated_shards_equal_a_flat_group(gloo, stage, dtype):
    """2 x 2 gives the bits of 4 flat ranks, with twice the state; so do meshes of one axis and of one column."""
    policy = PrecisionPolicy("none" if dtype == torch.bfloat16 else "auto", momentum_rounding="stochastic")
    flat = gloo.run(4, train_on, None, stage, policy, dtype)
    for shape in ((4,), (2, 2), (4, 1), (1, 4)):
        for (params, kept), (flat_params, flat_kept) in zip(
            gloo.run(4, train_on, shape, stage, policy, dtype), flat, strict=True
        ):
            for mine, theirs in zip(params, flat_params, strict=True):
                assert torch.equal(mine, theirs), shape
            assert kept > flat_kept if shape in ((2, 2), (4, 1)) else kept == flat_kept


def train_a_model_on_a_mesh(stage: int, clip: float | None) -> None:
    """Real gradients on 2 x 2: summed inside (0 + 1, 2 + 3), then across, which the oracle can do too."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = make_model()
    expected = copy.deepcopy(model)
    opt = ShardedLion(
        model.parameters(), lr=2e-3, module=model, process_group=mesh, sharding=ShardingConfig(stage, bucket_numel=100)
    )
    oracle = MeshOracle(expected, Lion(expected.parameters(), lr=2e-3), 4)
    for step in range(3):
        losses = [make_batch(step, 0, r, detour=r == 3).loss for r in range(4)]
        losses[dist.get_rank()](model).backward()
        oracle.backward(losses)
        norm = opt.grad_norm() if clip is None else opt.clip_grad_norm_(clip)
        assert torch.equal(norm, oracle.step(clip=clip))
        opt.step()
    opt.finish_param_sync()
    assert_same_params(model, expected)
    assert_same_on_all_ranks(model)


class MeshOracle(Oracle):
    """Sums inside the shard groups (0, 1) and (2, 3) first, then across."""

    def _reduce(self) -> None:
        for param in self.params:
            grads = [local.get(param) for local in self._local]
            if all(grad is None for grad in grads):
                continue
            a, b, c, d = (torch.zeros_like(param) if g is None else g for g in grads)
            self._totals[param] = (a + b) + (c + d)
        self._local = [{} for _ in range(self.world_size)]


@STAGES
@pytest.mark.parametrize("clip", [None, 0.3])
def test_model_on_a_mesh_of_replicas(gloo, stage, clip):
    gloo.run(4, train_a_model_on_a_mesh, stage, clip)


def resolve_all_kinds() -> None:
    rank = dist.get_rank()
    world = resolve_groups(None)
    assert (world.shard_world_size, world.shard_rank, world.replicate_world_size) == (4, rank, 1)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    both = resolve_groups(mesh)
    assert (both.shard_world_size, both.shard_rank, both.replicate_world_size, both.num_ranks) == (2, rank % 2, 2, 4)
    assert len(both.axes) == 2
    assert resolve_groups(mesh["shard"]).shard_group.size() == 2
    single = dist.init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard"))
    column = resolve_groups(single)
    assert (column.shard_world_size, column.replicate_world_size, column.num_ranks) == (1, 4, 4)


def test_groups_of_worlds_meshes_and_columns(gloo):
    gloo.run(4, resolve_all_kinds)


def test_this_process_alone_without_torch_distributed():
    alone = resolve_groups(None)
    assert (alone.shard_world_size, alone.shard_rank, alone.num_ranks, alone.axes) == (1, 0, 1, ())
