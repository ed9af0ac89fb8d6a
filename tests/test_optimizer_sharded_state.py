"""State of ``Lion`` over DTensors: loaded from other placements, copied, pickled; and FSDP2's policies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lion_dist import Lion, PrecisionPolicy
from tests.models import mlp
from tests.test_optimizer_placements import full, place, values

SETTINGS = dict(lr=2e-3, weight_decay=0.1)
R, S0, S1 = Replicate(), Shard(0), Shard(1)
BF16 = torch.bfloat16


def trained(mesh, placement, policy: PrecisionPolicy, shape=(4, 4)) -> tuple[nn.Parameter, Lion]:
    """A square parameter: what belongs to another placement has the right shape."""
    param = nn.Parameter(place(values(shape, 1).to(BF16) / 8, mesh, [placement] if mesh.ndim == 1 else placement))
    opt = Lion([param], precision=policy, **SETTINGS)
    for step in range(3):
        param.grad = place(values(shape, 10 + step).to(BF16) / 8, mesh, param.placements)
        opt.step()
    return param, opt


def plain_twin(policy: PrecisionPolicy) -> tuple[nn.Parameter, Lion]:
    param = nn.Parameter(values((4, 4), 1).to(BF16) / 8)
    opt = Lion([param], precision=policy, **SETTINGS)
    for step in range(3):
        param.grad = values((4, 4), 10 + step).to(BF16) / 8
        opt.step()
    return param, opt


POLICIES = [PrecisionPolicy(), PrecisionPolicy("fp32", torch.float32)]


def load_into_other_placements() -> None:
    """Shards of a square matrix by rows and by columns have one shape: they were taken for each other."""
    mesh = dist.init_device_mesh("cpu", (2,))
    for policy in POLICIES:
        twin, plain = plain_twin(policy)
        for saved in (S0, S1, R):
            _, source = trained(mesh, saved, policy)
            for present in (S0, S1, R):
                param = nn.Parameter(place(twin.detach(), mesh, [present]))
                opt = Lion([param], precision=policy, **SETTINGS)
                opt.load_state_dict(source.state_dict())
                for key, value in opt.state[param].items():
                    assert value.placements == (present,)
                    right = place(plain.state[twin][key], mesh, [present])
                    assert torch.equal(value.to_local(), right.to_local()), (key, saved, present)


def test_state_of_other_placements_is_redistributed(gloo):
    gloo.run(2, load_into_other_placements)


def load_whole_state() -> None:
    """Plain tensors of the full shape, such as one process has saved: each rank takes its part."""
    mesh = dist.init_device_mesh("cpu", (2,))
    for policy in POLICIES:
        twin, plain = plain_twin(policy)
        buffer = io.BytesIO()
        torch.save(plain.state_dict(), buffer)
        saved = torch.load(io.BytesIO(buffer.getvalue()))
        for present in (S0, S1, R):
            param = nn.Parameter(place(twin.detach(), mesh, [present]))
            opt = Lion([param], precision=policy, **SETTINGS)
            opt.load_state_dict(saved)
            for key, value in opt.state[param].items():
                right = place(plain.state[twin][key], mesh, [present])
                assert torch.equal(value.to_local(), right.to_local()), (key, present)


def test_whole_state_is_cut_for_a_sharded_parameter(gloo):
    gloo.run(2, load_whole_state)


def refuse_state_of_another_mesh() -> None:
    mesh, other = dist.init_device_mesh("cpu", (4,)), dist.init_device_mesh("cpu", (2, 2))
    _, source = trained(other, (S0, R), POLICIES[0])
    param = nn.Parameter(place(torch.ones(4, 4, dtype=BF16), mesh, [S0]))
    opt = Lion([param], **SETTINGS)
    with pytest.raises(ValueError, match="saved exp_avg has shape.*DeviceMesh.*sharded differently.*get_optimizer"):
        opt.load_state_dict(source.state_dict())
    assert not opt.state
    whole = Lion([nn.Parameter(torch.ones(4, 4))], **SETTINGS)
    with pytest.raises(ValueError, match="saved exp_avg has shape.*DeviceMesh"):
        whole.load_state_dict(source.state_dict())
    _, replicated = trained(other, (R, R), POLICIES[0])
    with pytest.warns(UserWarning, match="loaded exp_avg is torch.bfloat16"):
        whole.load_state_dict(replicated.state_dict())


def test_state_of_another_mesh_is_refused(gloo):
    gloo.run(4, refuse_state_of_another_mesh)


def replace_momentum_by_a_plain_one() -> None:
    """A program that puts a local tensor into the state: a checkpoint would take it for a whole one."""
    mesh = dist.init_device_mesh("cpu", (2,))
    param, opt = trained(mesh, S0, POLICIES[0])
    opt.state[param]["exp_avg"] = torch.zeros(2, 4, dtype=BF16)
    param.grad = place(torch.ones(4, 4, dtype=BF16), mesh, [S0])
    opt.step()
    momentum = opt.state_dict()["state"][0]["exp_avg"]
    assert isinstance(momentum, DTensor) and torch.equal(full(momentum), torch.full((4, 4), 0.01).to(BF16))


def test_plain_momentum_put_into_the_state_of_a_dtensor_becomes_one(gloo):
    gloo.run(2, replace_momentum_by_a_plain_one)


def pickle_sharded() -> None:
    mesh = dist.init_device_mesh("cpu", (2,))
    for policy in (*POLICIES, PrecisionPolicy("none", seed=3)):
        param, opt = trained(mesh, S0, policy)
        copies = [pickle.loads(pickle.dumps(opt))]
        buffer = io.BytesIO()
        torch.save(opt, buffer)
        copies.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
        for other in copies:
            (twin,) = other.param_groups[0]["params"]
            assert twin is not param and twin.placements == (S0,)
            for step in range(3):
                grad = place(values((4, 4), 20 + step).to(BF16) / 8, mesh, [S0])
                twin.grad = grad
                other.step()
        for step in range(3):
            param.grad = place(values((4, 4), 20 + step).to(BF16) / 8, mesh, [S0])
            opt.step()
        for other in copies:
            (twin,) = other.param_groups[0]["params"]
            assert torch.equal(full(twin), full(param))
            assert torch.equal(full(other.state[twin]["exp_avg"]), full(opt.state[param]["exp_avg"]))


def test_optimizer_over_dtensors_survives_being_pickled(gloo):
    gloo.run(2, pickle_sharded)


# ---- FSDP2, alone and over tensor parallel


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.gain = nn.Parameter(torch.ones(8))  # ignored by fully_shard: a plain parameter among DTensors

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu()) * self.gain


def average_grad(param: Tensor) -> None:
    dist.all_reduce(param.grad)
    param.grad /= dist.get_world_size()


def train_with(kwargs: dict, ignore: bool, metrics: bool, cautious: bool) -> None:
    torch.manual_seed(0)
    model = Block()
    twin = copy.deepcopy(model)
    ignored = {model.gain} if ignore else set()
    fully_shard(model, ignored_params=ignored, **kwargs)
    settings = SETTINGS | {"metrics_every": int(metrics), "cautious": cautious}
    opt, plain = Lion(model.parameters(), **settings), Lion(twin.parameters(), **settings)
    same = []
    for step in range(4):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(step))  # of every rank
        opt.zero_grad(), plain.zero_grad()
        model(x).float().square().mean().backward()
        if "mp_policy" in kwargs:
            with torch.no_grad():
                for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                    theirs.grad = full(mine.grad).clone()
        else:
            twin(x).square().mean().backward()
        if ignore:
            average_grad(model.gain)
        opt.step(), plain.step()
        same += [torch.equal(full(a), b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)]
        if metrics:
            mine, theirs = opt.metrics(), plain.metrics()
            assert mine["update_norm"] == pytest.approx(theirs["update_norm"], rel=1e-9)
    assert all(same)


FSDP2 = {
    "plain": {},
    "mixed-precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)},
    "cpu-offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "no-reshard": {"reshard_after_forward": False},
}


@pytest.mark.parametrize("name", FSDP2)
@pytest.mark.parametrize("ignore", [False, True])
def test_fsdp2_policies(gloo, name, ignore):
    gloo.run(2, train_with, FSDP2[name], ignore, name == "plain", ignore)


def train_on_two_axes() -> None:
    """fully_shard over a sequence-parallel block on (2, 2): every placement of DTensor at once."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"norm": SequenceParallel(), "up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=S1)}
    plan["up"] = ColwiseParallel(input_layouts=S1)
    for shard in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential()
        for name, layer in (("norm", nn.LayerNorm(8)), ("up", nn.Linear(8, 16)), ("down", nn.Linear(16, 8))):
            model.add_module(name, layer)
        twin = copy.deepcopy(model)
        parallelize_module(model, mesh["tp"], plan)
        if shard:
            fully_shard(model, mesh=mesh["dp"])
        opt, plain = Lion(model.parameters(), **SETTINGS), Lion(twin.parameters(), **SETTINGS)
        for step in range(3):
            x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(step))
            opt.zero_grad(), plain.zero_grad()
            model(x.chunk(2, 1)[mesh["tp"].get_local_rank()]).square().sum().backward()
            for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                theirs.grad = full(mine.grad).clone()
            opt.step(), plain.step()
            for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.equal(full(mine), theirs), (shard, step)
            for param in model.parameters():  # replicas hold the same
                for axis in (axis for axis, p in enumerate(param.placements) if p.is_replicate()):
                    local = param.to_local()
                    copies = [torch.empty_like(local) for _ in range(2)]
                    dist.all_gather(copies, local.detach(), group=param.device_mesh.get_group(axis))
                    assert torch.equal(*copies)


def test_tensor_parallel_with_and_without_fsdp2(gloo):
    gloo.run(4, train_on_two_axes)


def accumulate_without_sync() -> None:
    """Two micro-batches, the first without gradient sync: the optimizer finds the gradient of both."""
    model = mlp(4, 4)
    twin = copy.deepcopy(model)
    fully_shard(model)
    opt, plain = Lion(model.parameters(), **SETTINGS), Lion(twin.parameters(), **SETTINGS)
    for step in range(3):
        opt.zero_grad(), plain.zero_grad()
        for micro in range(2):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * step + micro))
            model.set_requires_gradient_sync(micro == 1)
            model(x).square().mean().backward()
            twin(x).square().mean().backward()
        opt.step(), plain.step()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(full(mine), theirs)


def test_fsdp2_without_sync_of_a_micro_batch(gloo):
    gloo.run(2, accumulate_without_sync)
