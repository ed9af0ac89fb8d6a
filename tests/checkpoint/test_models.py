"""Models that are more than a stack of trainable layers."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, ShardedLion, checkpoint
from tests.checkpoint.engines import assert_same_tensors, engine, tensors_in


class Tied(nn.Module):
    """An embedding that is the head as well, a frozen layer, buffers that are kept and that are not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(10, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, tokens):
        return self.head(self.norm(self.frozen(self.embed(tokens))))


def tied(name):
    model = Tied()
    match name:
        case "fsdp2":
            fully_shard(model)
        case "fsdp1":
            model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        case "sharded":
            return model, ShardedLion([p for p in model.parameters() if p.requires_grad], module=model, lr=1e-3)
        case "ddp":
            model = DistributedDataParallel(model)
        case "compiled":
            model = torch.compile(model, backend="eager")
        case "compiled ddp":
            model = torch.compile(DistributedDataParallel(model), backend="eager")
    return model, Lion([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def train_tied(model, optimizer, steps):
    for step in steps:
        tokens = torch.randint(10, (8,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()


def save_tied(folder, name):
    model, optimizer = tied(name)
    train_tied(model, optimizer, range(3))
    checkpoint.save(f"{folder}/saved", model=model, optimizer=optimizer)
    train_tied(model, optimizer, range(3, 5))
    checkpoint.save(f"{folder}/never stopped", model=model, optimizer=optimizer)


def load_tied(folder, name):
    model, optimizer = tied(name)
    checkpoint.load(f"{folder}/saved", model=model, optimizer=optimizer)
    train_tied(model, optimizer, range(3, 5))
    checkpoint.save(f"{folder}/resumed", model=model, optimizer=optimizer)


NAMES = ["embed.weight", "frozen.bias", "frozen.weight", "norm.bias", "norm.num_batches_tracked", "norm.running_mean"]
NAMES += ["norm.running_var", "norm.weight"]


@pytest.mark.parametrize(
    "saved_by, loaded_by",
    [
        ("plain", "sharded"),
        ("sharded", "fsdp2"),
        ("fsdp2", "fsdp1"),
        ("fsdp1", "ddp"),
        ("ddp", "compiled"),
        ("compiled ddp", "plain"),
    ],
)
def test_tied_and_frozen_parameters_and_buffers_move(gloo, tmp_path, saved_by, loaded_by):
    ranks = {"plain": 1, "compiled": 1}
    gloo.run(ranks.get(saved_by, 2), save_tied, str(tmp_path), saved_by)
    gloo.run(ranks.get(loaded_by, 2), load_tied, str(tmp_path), loaded_by)
    assert_same_tensors(tmp_path / "never stopped", tmp_path / "resumed")
    stored = tensors_in(tmp_path / "saved")
    assert sorted(name[6:] for name in stored if name.startswith("model.")) == NAMES
    assert sorted(name for name in stored if "exp_avg" in name) == [
        f"optimizer.{name}.exp_avg" for name in ("embed.weight", "norm.bias", "norm.weight")
    ]


# ---- parameters that are whole when the save comes


def save_after_evaluation(folder, name):
    model, optimizer = engine(name, "split")
    with torch.no_grad():
        model(torch.zeros(2, 13, dtype=torch.bfloat16))
    checkpoint.save(f"{folder}/evaluated", model=model, optimizer=optimizer)
    with torch.no_grad():
        model(torch.zeros(2, 13, dtype=torch.bfloat16))
    checkpoint.load(f"{folder}/plain", model=model, optimizer=optimizer)
    with torch.no_grad():
        return model(torch.ones(2, 13, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2 in one unit", "fsdp1", "fsdp1 flat", "fsdp1 grad op"])
def test_a_forward_without_backward_comes_before(gloo, tmp_path, name):
    model, optimizer = engine("plain", "split")
    checkpoint.save(tmp_path / "fresh", model=model, optimizer=optimizer)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.25)
    checkpoint.save(tmp_path / "plain", model=model, optimizer=optimizer)
    outputs = gloo.run(2, save_after_evaluation, str(tmp_path), name)
    assert_same_tensors(tmp_path / "fresh", tmp_path / "evaluated")
    with torch.no_grad():
        assert torch.equal(outputs[0], model(torch.ones(2, 13, dtype=torch.bfloat16)))


# ---- tensor parallel and FSDP at once


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.down(self.up(x).relu())


def tensor_parallel(shape):
    model = MLP()
    if dist.is_initialized() and dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("fsdp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["fsdp"])
    return model, Lion(model.parameters(), lr=1e-3)


def set_grads(model):
    """Any gradients do: what moves is the state that they leave."""
    for param in model.parameters():
        param.grad = param.detach() * 3


def train_and_save_tp(path, shape):
    model, optimizer = tensor_parallel(shape)
    set_grads(model)
    optimizer.step()
    checkpoint.save(path, model=model, optimizer=optimizer)


def load_and_save_tp(old, new, shape):
    model, optimizer = tensor_parallel(shape)
    checkpoint.load(old, model=model, optimizer=optimizer)
    checkpoint.save(new, model=model, optimizer=optimizer)


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (4, 1)], ids=str)
def test_two_dimensional_meshes_move_to_plain_and_back(gloo, tmp_path, shape):
    gloo.run(1, train_and_save_tp, str(tmp_path / "plain"), None)
    gloo.run(4, train_and_save_tp, str(tmp_path / "meshed"), shape)
    assert_same_tensors(tmp_path / "plain", tmp_path / "meshed")
    gloo.run(1, load_and_save_tp, str(tmp_path / "meshed"), str(tmp_path / "to plain"), None)
    gloo.run(4, load_and_save_tp, str(tmp_path / "plain"), str(tmp_path / "to mesh"), shape)
    assert_same_tensors(tmp_path / "plain", tmp_path / "to plain")
    assert_same_tensors(tmp_path / "plain", tmp_path / "to mesh")


# ---- buffers


DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
DTYPES -= {getattr(torch, f"bits{size}") for size in ("8", "16", "1x8", "2x4", "4x2")}  # torch refuses to save them


def buffer_of(dtype):
    """Some bits, or None where torch cannot keep or copy them."""
    try:
        return torch.arange(32).to(torch.uint8).view(dtype).clone()
    except RuntimeError:
        return None


@pytest.mark.parametrize("dtype", sorted((d for d in DTYPES if buffer_of(d) is not None), key=str), ids=str)
def test_a_buffer_of_any_dtype_comes_back(tmp_path, dtype):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model.register_buffer("kept", buffer_of(dtype))
    other.register_buffer("kept", torch.zeros_like(model.kept))
    checkpoint.save(tmp_path / "c", model=model, optimizer=Lion(model.parameters()))
    checkpoint.load(tmp_path / "c", model=other, optimizer=Lion(other.parameters()))
    assert torch.equal(other.kept.view(torch.uint8), model.kept.view(torch.uint8))


# ---- nothing at all


def test_a_parameter_of_no_elements_is_no_obstacle(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        model.empty = nn.Parameter(torch.empty(0, 4))
        return {"model": model, "optimizer": Lion(model.parameters())}

    made = make()
    checkpoint.save(tmp_path / "c", **made)
    other = make()
    with torch.no_grad():
        other["model"].weight.zero_()
    checkpoint.load(tmp_path / "c", **other)
    assert torch.equal(made["model"].weight, other["model"].weight)


# ---- what is refused


def test_another_optimizer_is_refused(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(checkpoint.CheckpointError, match="the optimizer is a SGD"):
        checkpoint.save(tmp_path / "c", model=model, optimizer=torch.optim.SGD(model.parameters()))


class Secretive(nn.Linear):
    def get_extra_state(self):
        return {"scale": object()}


def test_extra_state_that_would_be_pickled_is_refused_by_name(tmp_path):
    model = nn.Sequential(Secretive(2, 2))
    with pytest.raises(checkpoint.CheckpointError, match=r"module '0' \(Secretive\) keeps extra state"):
        checkpoint.save(tmp_path / "c", model=model, optimizer=Lion(model.parameters()))


@pytest.mark.parametrize("make", [Lion, ShardedLion])
def test_an_optimizer_of_another_model_is_refused(tmp_path, make):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(checkpoint.CheckpointError, match="holds a parameter of shape .* that the model does not have"):
        checkpoint.save(tmp_path / "c", model=model, optimizer=make(other.parameters()))


def test_extra_that_is_not_json_is_refused(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(checkpoint.CheckpointError, match="must be a JSON value"):
        checkpoint.save(tmp_path / "c", model=model, optimizer=Lion(model.parameters()), extra={"x": torch.ones(1)})


def save_of_separate_groups(path):
    halves = [dist.new_group([0]), dist.new_group([1])]
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[1].parameters()), "process_group": halves[dist.get_rank()]},
    ]
    try:
        checkpoint.save(path, model=model, optimizer=ShardedLion(groups, module=model))
    except checkpoint.CheckpointError as error:
        return str(error)
    return None


def test_parameters_that_only_some_ranks_share_are_refused(gloo, tmp_path):
    for error in gloo.run(2, save_of_separate_groups, str(tmp_path / "c")):
        assert "'1.weight' belongs to 1 of 2 ranks" in error


def errors_of_ranks_apart(path, what):
    rank, model = dist.get_rank(), nn.Linear(300, 200)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    optimizer = Lion(model.parameters())
    match what:
        case "expert":
            model.bias.data.fill_(rank)
        case "momentum":
            optimizer.state_of(model.weight)["exp_avg"].fill_(rank)
        case "shape":
            model = nn.Linear(300, 200 + rank)
            optimizer = Lion(model.parameters())
        case "stage":
            model = nn.ModuleDict({f"layer{rank}": model})
        case "groups":
            optimizer = Lion([{"params": [p]} for p in model.parameters()] if rank else model.parameters())
    errors = []
    for save in (checkpoint.save, checkpoint.save_async):
        with pytest.raises(checkpoint.CheckpointError) as error:
            save(path, model=model, optimizer=optimizer)
        errors.append(str(error.value))
    return errors


APART = {
    "expert": r"'bias' is \(200,\).*value \w+, exp_avg \w+ on rank 0, .* on rank 1\.",
    "momentum": r"'weight' is \(200, 300\)",
    "shape": r"'weight' is \(200, 300\).*\(201, 300\).* on rank 1, and 1 more differ",
    "stage": r"'layer0.weight' is \(200, 300\).* on rank 0, not there on rank 1, and 3 more differ",
    "groups": r"'bias' is .* in param group 0, .* in param group 1",
}


@pytest.mark.parametrize("what, difference", APART.items(), ids=APART)
def test_ranks_that_hold_different_tensors_under_one_name_are_refused(gloo, tmp_path, what, difference):
    for errors in gloo.run(2, errors_of_ranks_apart, str(tmp_path / "c"), what):
        for error in errors:
            assert error.startswith("ranks hold different tensors under one name")
            assert re.search(difference, error), error
    assert not any(tmp_path.iterdir())
