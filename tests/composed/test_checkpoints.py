"""Checkpoints of composed jobs: the boxes of full tensors, whatever axes there are, from any engine into any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lion_dist import Lion, ModelParallel, PrecisionPolicy, ShardedLion, ShardingConfig, checkpoint
from lion_dist.checkpoint import CheckpointError
from tests.checkpoint.engines import assert_same_tensors
from tests.composed.jobs import mesh_of, place_on
from tests.composed.test_tensor import POLICIES, parallelize
from tests.integrations.fsdp_ranks import Net, shard

AVERAGED = {"split, averaged": (torch.bfloat16, PrecisionPolicy("split", ema_dtype=torch.bfloat16))}
ROWS = ("up.weight", "up.bias", "head.weight", "head.bias")  # of the model that is cut by hand; "down" by columns


class Stage(nn.Module):
    """What is on a pipeline stage of ``Net``, by the names that it has in the whole model."""

    has_buffers = True

    def __init__(self, whole: Net, number: int):
        super().__init__()
        self.blocks = nn.ModuleDict({str(number): whole.blocks[number]})
        if number == 1:
            self.head = whole.head
        if self.has_buffers:
            self.register_buffer(f"seen_{number}", torch.full((2,), float(dist.get_rank())))


def cut_by_hand(model: Net, mesh) -> dict[str, int]:
    """Parts of the weights in place of them; returns the dimension of each that is cut."""
    dims = {}
    for name, param in list(model.named_parameters()):
        if name.endswith("down.weight") or name.endswith(ROWS[:2]):
            dims[name] = 1 if name.endswith("down.weight") else 0
            owner, _, last = name.rpartition(".")
            part = param.detach().chunk(2, dims[name])[place_on(mesh, "tp")]
            setattr(model.get_submodule(owner), last, nn.Parameter(part.clone()))
    return dims


def engine(name: str, policy: str):
    dtype, precision = (POLICIES | AVERAGED)[policy]
    model = Net(dtype)
    options = dict(lr=1e-3, weight_decay=0.1, precision=precision)
    options["ema_decay"] = None if precision.ema_dtype is None else 0.9
    if name == "plain":
        return model, Lion(model.parameters(), **options)
    if name == "fsdp2 tp":
        model = shard(model, mesh_of(shard=2, tensor=2), tensor_parallel=True)
        return model, Lion(model.parameters(), **options)
    mesh = mesh_of(pp=2, dp=2) if name == "pp" else mesh_of(dp=2, tp=2)
    match name:
        case "sharded":
            return model, ShardedLion(model.parameters(), module=model, **options)
        case "tp":
            parallelize(model, mesh["tp"])
            parts = ModelParallel(tensor=mesh["tp"])
        case "cut by hand":
            dims = cut_by_hand(model, mesh)
            parts = ModelParallel(tensor=mesh["tp"], cut_dim=lambda name, _: dims.get(name))
        case "pp":
            model = Stage(model, place_on(mesh, "pp"))
            parts = ModelParallel(pipeline=mesh["pp"])
    options |= dict(process_group=mesh["dp"], model_parallel=parts, sharding=ShardingConfig(bucket_numel=200))
    return model, ShardedLion(model.parameters(), module=model, **options)


def train(model: nn.Module, optimizer, steps: int = 2) -> None:
    """Gradients are twice the parameters: on every rank, in every engine."""
    for _ in range(steps):
        optimizer.zero_grad()
        if isinstance(optimizer, Lion):
            for param in model.parameters():
                param.grad = (2 * param).detach()
        else:
            local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
            sum(p.square().sum() for p in local).backward()
        optimizer.step()


def save(source: str, policy: str, first: str) -> None:
    model, optimizer = engine(source, policy)
    train(model, optimizer)
    checkpoint.save(first, model=model, optimizer=optimizer, extra={"step": 2})


def load_and_save(target: str, policy: str, first: str, second: str) -> None:
    model, optimizer = engine(target, policy)
    train(model, optimizer, 1)
    assert checkpoint.load(first, model=model, optimizer=optimizer) == {"step": 2}
    checkpoint.save(second, model=model, optimizer=optimizer)


def without_buffers(function: Callable, *args) -> None:
    Stage.has_buffers = False
    try:
        function(*args)
    finally:
        Stage.has_buffers = True


@pytest.fixture
def move(gloo, once, tmp_path) -> Callable[[str, str, str], Path]:
    """``move(source, target, policy)``: what ``source`` has saved, which all loads of it share, is saved by ``target``
    as it was. Returns where. (A stage's buffers are no other engine's.)"""

    def save_first(source: str, policy: str, folder: Path) -> Path:
        gloo.run(4, without_buffers, save, source, policy, str(folder / "first"))
        return folder / "first"

    def there(source: str, target: str, policy: str) -> Path:
        first = once(f"composed, {source}, {policy}", lambda folder: save_first(source, policy, folder))
        gloo.run(4, without_buffers, load_and_save, target, policy, str(first), str(tmp_path / "second"))
        assert_same_tensors(first, tmp_path / "second")
        return tmp_path / "second"

    return there


PAIRS = [
    ("tp", "plain"),
    ("plain", "tp"),
    ("tp", "fsdp2 tp"),
    ("fsdp2 tp", "tp"),
    ("tp", "sharded"),
    ("cut by hand", "tp"),
    ("plain", "cut by hand"),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_tensor_parallel(move, source, target):
    move(source, target, "split")


@pytest.mark.parametrize("policy", ["fp32", "none, stochastic"])
def test_tensor_parallel_by_policy(move, policy):
    move("tp", "plain", policy)


def average(source: str) -> None:
    model, optimizer = engine(source, "split, averaged")
    train(model, optimizer)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    before = [p.detach().clone() for p in local]
    with optimizer.averaged_parameters():
        assert not all(map(torch.equal, local, before))
    assert all(map(torch.equal, local, before))


@pytest.mark.parametrize(("source", "target"), [("tp", "plain"), ("pp", "tp")])
def test_averages_of_the_weights(gloo, move, source, target):
    names = checkpoint_names(move(source, target, "split, averaged"))
    assert sum(name.endswith(".weight_avg") for name in names) == sum(name.endswith(".exp_avg") for name in names) > 0
    gloo.run(4, average, source)


# ---- pipeline stages


@pytest.mark.parametrize(("source", "target"), [("pp", "plain"), ("plain", "pp"), ("pp", "tp"), ("tp", "pp")])
def test_pipeline_stages(move, source, target):
    move(source, target, "split")


def save_buffers(folder: str) -> list[float]:
    model, optimizer = engine("pp", "fp32")
    number = 1 if hasattr(model, "head") else 0
    checkpoint.save(folder, model=model, optimizer=optimizer)
    model.get_buffer(f"seen_{number}").zero_()
    checkpoint.load(folder, model=model, optimizer=optimizer)
    return model.get_buffer(f"seen_{number}").tolist()


def test_a_stages_buffers_are_its_first_ranks(gloo, tmp_path):
    assert gloo.run(4, save_buffers, str(tmp_path / "c")) == [[0.0] * 2, [0.0] * 2, [2.0] * 2, [2.0] * 2]


class Tied(nn.Module):
    """A stage of two: an embedding, and what the last stage shares of it."""

    def __init__(self, number: int):
        super().__init__()
        torch.manual_seed(0)
        table = torch.randn(6, 4)
        name = "head" if number else "embedding"
        setattr(self, name, nn.Linear(4, 6, bias=False))
        getattr(self, name).weight.data.copy_(table)
        self.layers = nn.ModuleDict({str(number): nn.Linear(4, 4)})


def tie(folder: str) -> None:
    mesh = mesh_of(pp=2, dp=2)
    number = place_on(mesh, "pp")

    def make():
        model = Tied(number)
        tied = {"table": "head.weight" if number else "embedding.weight"}
        parts = ModelParallel(pipeline=mesh["pp"], tied=tied)
        return model, ShardedLion(
            model.parameters(), module=model, process_group=mesh["dp"], model_parallel=parts, lr=1e-3
        )

    model, optimizer = make()
    train(model, optimizer)
    optimizer.finish_param_sync()
    checkpoint.save(f"{folder}/first", model=model, optimizer=optimizer)
    fresh, optimizer = make()
    checkpoint.load(f"{folder}/first", model=fresh, optimizer=optimizer)
    for name, param in fresh.named_parameters():
        assert torch.equal(param, model.get_parameter(name)), name
    checkpoint.save(f"{folder}/second", model=fresh, optimizer=optimizer)


def test_a_tied_parameter_is_saved_once_and_loaded_on_each_stage(gloo, tmp_path):
    gloo.run(4, tie, str(tmp_path))
    assert_same_tensors(tmp_path / "first", tmp_path / "second")
    saved = checkpoint_names(tmp_path / "first")
    assert "model.embedding.weight" in saved and "model.head.weight" not in saved


def checkpoint_names(path) -> set[str]:
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(path).read_metadata().state_dict_metadata)


def save_groups_that_differ(folder: str) -> str:
    mesh = mesh_of(pp=2, dp=2)
    model = Stage(Net(), place_on(mesh, "pp"))
    opt = ShardedLion(
        model.parameters(),
        module=model,
        lr=1e-3 * (1 + place_on(mesh, "pp")),
        process_group=mesh["dp"],
        model_parallel=ModelParallel(pipeline=mesh["pp"]),
    )
    with pytest.raises(CheckpointError) as raised:
        checkpoint.save(folder, model=model, optimizer=opt)
    return str(raised.value)


def test_stages_with_other_param_groups_are_refused(gloo, tmp_path):
    assert all(
        "must have the same param groups" in t for t in gloo.run(4, save_groups_that_differ, str(tmp_path / "c"))
    )


# ---- experts: EP 4, 2 and 1


class Experts(nn.Module):
    """``here`` of four experts by number, each with its own name; and a dense layer."""

    def __init__(self, here: range):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(4, 4)
        weights = torch.randn(4, 3, 5)
        self.experts = nn.ParameterDict({str(i): nn.Parameter(weights[i].clone()) for i in here})


class StackedExperts(nn.Module):
    """Four experts in one tensor, of which this rank has its part."""

    def __init__(self, mesh):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(4, 4)
        self.experts = nn.Parameter(distribute_tensor(torch.randn(4, 3, 5), mesh, [Shard(0)]))


def experts(kind: str, size: int):
    """On EP ``size``, beside data parallel of all ranks; experts are shared by 4 / size ranks."""
    mesh = mesh_of(edp=4 // size, ep=size)
    if kind == "named":
        first = 4 // size * place_on(mesh, "ep")
        model, parts = Experts(range(first, first + 4 // size)), None
        own = list(model.experts.values())
    else:
        model, parts = StackedExperts(mesh["ep"]), ModelParallel(expert=mesh["ep"])
        own = [model.experts]
    groups = [{"params": list(model.dense.parameters())}, {"params": own, "process_group": mesh["edp"]}]
    sharding = ShardingConfig(average=False)
    return model, ShardedLion(groups, lr=1e-3, module=model, model_parallel=parts, sharding=sharding)


def move_experts(kind: str, source: int, target: int, folder: str) -> None:
    model, optimizer = experts(kind, source)
    train(model, optimizer)
    checkpoint.save(f"{folder}/first", model=model, optimizer=optimizer)
    model, optimizer = experts(kind, target)
    checkpoint.load(f"{folder}/first", model=model, optimizer=optimizer)
    checkpoint.save(f"{folder}/second", model=model, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["named", "stacked"])
@pytest.mark.parametrize(("source", "target"), [(4, 2), (4, 1), (2, 4), (1, 4)])
def test_experts(gloo, tmp_path, kind, source, target):
    gloo.run(4, move_experts, kind, source, target, str(tmp_path))
    assert_same_tensors(tmp_path / "first", tmp_path / "second")


def save_experts_of_one_name(folder: str) -> str:
    mesh = mesh_of(edp=2, ep=2)
    model = Experts(range(1))
    groups = [
        {"params": list(model.dense.parameters())},
        {"params": list(model.experts.values()), "process_group": mesh["edp"]},
    ]
    opt = ShardedLion(groups, module=model)
    with pytest.raises(CheckpointError) as raised:
        checkpoint.save(folder, model=model, optimizer=opt)
    return str(raised.value)


def test_experts_of_one_name_are_refused(gloo, tmp_path):
    for text in gloo.run(4, save_experts_of_one_name, str(tmp_path / "c")):
        assert "'experts.0' belongs to 2 of 4 ranks" in text
