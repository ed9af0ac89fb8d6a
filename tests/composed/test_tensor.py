"""Tensor parallel: DTensors over a mesh axis, and plain tensors as Megatron has them; ZeRO divides what is local."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from lion_dist import Lion, ModelParallel, PrecisionPolicy, ReplicaError, ShardedLion, ShardingConfig, this_ranks_part
from tests.composed.jobs import LR, OneProcess, gradients, mesh_of, place_on
from tests.integrations.fsdp_ranks import Net, full, inputs
from tests.models import GivenGradients, given_loss

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = ((6, 7), (5,), (8, 12), (130,), ())
CUTS = (0, None, 1, 0, None)  # the dimension of each that tensor-parallel ranks cut
ROWS = (0, None, 0, 0, None)
POLICIES = {
    "fp32": (FP32, PrecisionPolicy()),
    "split": (BF16, PrecisionPolicy("split")),
    "fp32 main": (BF16, PrecisionPolicy("fp32")),
    "none, stochastic": (BF16, PrecisionPolicy("none", BF16, "stochastic", seed=5)),
}


class Cut:
    """This rank's part of the model of ``SHAPES``, on DP 2 x TP 2.

    ``kind``: "plain" tensors of which ``cut_dim`` tells, or "dtensor".
    """

    def __init__(self, kind: str, dtype: torch.dtype = FP32, cuts=CUTS, stage: int = 2, **settings):
        self.mesh = mesh_of(dp=2, tp=2)
        self.dp, self.tp = place_on(self.mesh, "dp"), place_on(self.mesh, "tp")
        self.kind, self.dtype, self.cuts = kind, dtype, cuts
        whole = GivenGradients(*SHAPES, dtype=dtype)
        self.model = GivenGradients(*SHAPES, dtype=dtype)
        for i, (weight, dim) in enumerate(zip(whole.weights, cuts, strict=True)):
            if kind == "plain":
                self.model.weights[i] = nn.Parameter(self.local(weight.detach(), dim).clone())
            else:
                placed = [Replicate() if dim is None else Shard(dim)]
                self.model.weights[i] = nn.Parameter(distribute_tensor(weight.detach(), self.mesh["tp"], placed))
        self.opt = ShardedLion(
            self.model.named_parameters(),
            module=self.model,
            process_group=self.mesh["dp"],
            model_parallel=ModelParallel(
                tensor=self.mesh["tp"],
                cut_dim=(lambda name, _: cuts[int(name.split(".")[-1])]) if kind == "plain" else None,
            ),
            sharding=ShardingConfig(stage, bucket_numel=64),
            **settings,
        )

    def local(self, whole: Tensor, dim: int | None) -> Tensor:
        return whole if dim is None else whole.chunk(2, dim)[self.tp]

    def backward(self, step: int, poison: float | None = None) -> None:
        grads = gradients(step, self.dp, SHAPES, self.dtype)
        grads = [self.local(grad, dim).clone() for grad, dim in zip(grads, self.cuts, strict=True)]
        if poison is not None:
            grads[1][0] = poison  # of a parameter of which every tensor-parallel rank has a copy
        weights = [w.to_local() if isinstance(w, DTensor) else w for w in self.model.weights]
        given_loss(weights, grads).backward()

    def assert_equals(self, one: OneProcess) -> None:
        self.opt.finish_param_sync()
        for mine, theirs, dim in zip(self.model.weights, one.model.weights, self.cuts, strict=True):
            here = mine.to_local() if isinstance(mine, DTensor) else mine
            assert torch.equal(here, self.local(theirs, dim))


KINDS = pytest.mark.parametrize("kind", ["plain", "dtensor"])


def train(kind: str, policy: str, stage: int, clip: float | None, cuts: tuple, options: dict) -> None:
    dtype, precision = POLICIES[policy]
    settings = dict(lr=LR, weight_decay=0.1, precision=precision, **options)
    job, one = Cut(kind, dtype, cuts, stage, **settings), OneProcess(2, shapes=SHAPES, dtype=dtype, **settings)
    for step in range(3):
        job.backward(step)
        norm = job.opt.grad_norm() if clip is None else job.opt.clip_grad_norm_(clip)
        assert torch.equal(norm, one.step(step, clip))
        job.opt.step()
    job.assert_equals(one)
    states = [one.lion.state[p] for p in one.model.weights]
    for i, (live, expected) in enumerate(zip(job.opt.state_dict()["state"].values(), states, strict=True)):
        for key in expected:
            found = live[key].full_tensor() if hasattr(live[key], "full_tensor") else live[key]
            assert torch.equal(found.view(expected[key].dtype), expected[key]), (i, key)


@KINDS
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_one_process(gloo, kind, policy):
    """With stochastic rounding cut along rows only: the keys of other cuts differ, as for ``Lion`` over DTensors."""
    gloo.run(4, train, kind, policy, 2, 1.0, ROWS if "stochastic" in policy else CUTS, {})


def test_stage_1_without_clipping(gloo):
    gloo.run(4, train, "dtensor", "split", 1, None, CUTS, {})


@KINDS
def test_cautious_counts_over_whole_tensors(gloo, kind):
    gloo.run(4, train, kind, "fp32", 2, 1.0, CUTS, {"cautious": True})


def skip(kind: str, where: tuple[int, int]) -> list[int]:
    job = Cut(kind, lr=LR)
    before = [p.detach().clone() for p in job.model.weights]
    job.backward(0, float("nan") if (job.dp, job.tp) == where else None)
    job.opt.step()
    job.opt.finish_param_sync()
    assert all(torch.equal(full(a), full(b)) for a, b in zip(job.model.weights, before, strict=True))
    return [job.opt.skipped_steps(), job.opt.taken_steps()]


@pytest.mark.parametrize("where", [(0, 0), (1, 1)])
def test_nan_in_one_copy_of_a_gradient_skips_the_step_everywhere(gloo, where):
    """Also where that copy is not the one that the norm counts."""
    assert gloo.run(4, skip, "plain", where) == [[1, 0]] * 4


def measure(kind: str) -> dict:
    job = Cut(kind, lr=LR, metrics_every=1)
    job.backward(0)
    job.opt.step()
    return job.opt.metrics()


def test_metrics_count_a_copy_once(gloo):
    one = OneProcess(2, shapes=SHAPES, lr=LR, metrics_every=1)
    one.step(0)
    expected = one.lion.metrics()
    for found in gloo.run(4, measure, "plain"):
        for key in ("param_norm", "exp_avg_norm", "update_norm", "zero_share"):
            assert found[key] == pytest.approx(expected[key], rel=1e-6), key


# ---- state


def consolidate(kind: str, policy: str, to: int) -> None:
    dtype, precision = POLICIES[policy]
    job, one = Cut(kind, dtype, lr=LR, precision=precision), OneProcess(2, shapes=SHAPES, dtype=dtype, lr=LR)
    one.lion = Lion(one.model.parameters(), lr=LR, precision=precision)
    for step in range(2):
        job.backward(step)
        job.opt.step()
        one.step(step)
    job.opt.consolidate_state_dict(to)
    whole = [job.opt.full_state_dict() if dist.get_rank() == to else None]
    dist.broadcast_object_list(whole, to)
    lion = Lion(copy.deepcopy(one.model).parameters(), lr=LR, precision=precision)
    lion.load_state_dict(copy.deepcopy(whole[0]))
    expected = one.lion.state_dict()["state"]
    for i, state in lion.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], expected[i]["exp_avg"])
    again = Cut(kind, dtype, lr=LR, precision=precision)
    for mine, theirs in zip(again.model.weights, job.model.weights, strict=True):
        mine.data.copy_(theirs.data)
    again.opt.load_state_dict(whole[0])
    for job_now in (job, again):
        job_now.backward(2)
        job_now.opt.step()
    one.step(2)
    job.assert_equals(one)
    again.assert_equals(one)


@KINDS
def test_a_full_state_goes_to_one_rank_and_back(gloo, kind):
    gloo.run(4, consolidate, kind, "split", 3)


def keep_own_part() -> None:
    job, other = Cut("dtensor", lr=LR), Cut("dtensor", lr=LR)
    job.backward(0)
    job.opt.step()
    part = copy.deepcopy(this_ranks_part(job.opt.state_dict()))
    other.opt.load_state_dict(part)
    for mine, theirs in zip(other.opt.shards, job.opt.shards, strict=True):
        assert torch.equal(mine.exp_avg, theirs.exp_avg)


def test_this_ranks_part_loads_on_the_same_rank(gloo):
    gloo.run(4, keep_own_part)


def spoil_a_copy(kind: str) -> str:
    job = Cut(kind, lr=LR)
    job.model.weights[2].requires_grad_(False)  # frozen, and cut
    job.backward(0)
    job.opt.step()
    job.opt.check_replicas()
    if dist.get_rank() in (1, 3):  # both data-parallel ranks of a tensor-parallel one: they agree with each other
        copied = job.model.weights[1]
        (copied.to_local() if isinstance(copied, DTensor) else copied).data[0] += 1
    with pytest.raises(ReplicaError) as raised:
        job.opt.check_replicas()
    return str(raised.value)


@KINDS
def test_check_replicas_compares_copies_along_tensor_parallel_ranks(gloo, kind):
    assert all("rank 1" in text and "weights.1" in text for text in gloo.run(4, spoil_a_copy, kind))


# ---- a real model


def parallelize(model: Net, mesh) -> Net:
    plan = {
        "blocks.*.norm": SequenceParallel(),
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
        "head": RowwiseParallel(input_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def train_a_model() -> None:
    """Norms are replicated, and their gradients come as addends. Each step, one process gets the same gradients."""
    mesh = mesh_of(dp=2, tp=2)
    model = Net()
    twin = copy.deepcopy(model)
    parallelize(model, mesh["tp"])
    settings = dict(lr=2e-3, weight_decay=0.1)
    opt = ShardedLion(
        model.parameters(), module=model, process_group=mesh["dp"], model_parallel=ModelParallel(mesh["tp"]), **settings
    )
    lion = Lion(twin.parameters(), **settings)
    for step in range(3):
        model(inputs(step, place_on(mesh, "dp"))).backward()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = full(opt.full_grad(mine)).float()
        opt.step()
        lion.step()
        for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(full(mine), theirs), name


def test_parallelize_module_beside_zero_equals_one_process_on_the_same_gradients(gloo):
    gloo.run(4, train_a_model)


def full_grads_follow() -> None:
    job = Cut("dtensor", lr=LR)
    job.backward(0)
    param = job.model.weights[0]
    grad = job.opt.full_grad(param)
    assert isinstance(grad, DTensor) and grad.placements == param.placements
    job.opt.set_full_grad(param, grad * 2)
    assert torch.equal(job.opt.full_grad(param).to_local(), 2 * grad.to_local())


def test_full_grad_of_a_dtensor_is_one(gloo):
    gloo.run(4, full_grads_follow)


# ---- what is refused


def make(fault: str) -> str:
    mesh = mesh_of(dp=1, tp=2)
    model = nn.Linear(4, 4)
    cut_dim = None
    if fault == "copies differ":
        model.bias.data.fill_(place_on(mesh, "tp"))
        cut_dim = lambda name, _: None if name == "bias" else 0  # noqa: E731
    elif fault == "no dimension":
        cut_dim = lambda *_: 7  # noqa: E731
    elif fault == "another mesh":
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate(), Shard(0)]))
    elif fault == "no axis":
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh["tp"], [Shard(0)]))
    tensor = None if fault == "no axis" else mesh["tp"]
    with pytest.raises((TypeError, ValueError)) as raised:
        ShardedLion(
            model.named_parameters(),
            process_group=mesh["dp"],
            model_parallel=ModelParallel(tensor, cut_dim=cut_dim),
        )
    return str(raised.value)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("unsaid", "parts of it or copies is not known"),
        ("copies differ", "'bias' counts as a copy"),
        ("no dimension", "must be a dimension"),
        ("another mesh", "none of the axes"),
        ("no axis", "none of the axes"),
    ],
)
def test_what_tensor_parallel_refuses(gloo, fault, words):
    for text in gloo.run(2, make, fault):
        assert words in text
