"""``Lion`` over gradients that are not placed as their parameters are, against the step with the full gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import lion_dist
from lion_dist import Lion, PrecisionPolicy
from lion_dist.grad_placement import GradPlacements
from lion_dist.local_shard import local_tensor
from tests.gloo_workers import RankError
from tests.test_optimizer_dtensor import RefuseDTensors

SETTINGS = dict(lr=2**-7, weight_decay=0.125)
STRIDED = (_StridedShard(0, split_factor=2), Shard(0))  # what fully_shard makes of a tensor-parallel Shard(0)
R, S0, S1, SUM, AVG = Replicate(), Shard(0), Shard(1), Partial("sum"), Partial("avg")


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Small whole numbers, zero among them: their sums and means over ranks are exact in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def place(full: Tensor, mesh: DeviceMesh, placements) -> DTensor:
    """Without communication: every rank has ``full``. The result has memory of its own."""
    return distribute_tensor(full.clone(), mesh, placements, src_data_rank=None)


def gradient(shape, mesh: DeviceMesh, placements: tuple[Placement, ...], seed: int) -> tuple[DTensor, Tensor]:
    """A gradient with these placements, and the full gradient that it stands for."""
    axes = [axis for axis, p in enumerate(placements) if p.is_partial()]
    addends = {
        where: values(shape, 100 * seed + i)
        for i, where in enumerate(itertools.product(*(range(mesh.size(axis)) for axis in axes)))
    }
    mine = addends[tuple(mesh.get_coordinate()[axis] for axis in axes)]
    held = place(mine, mesh, [R if p.is_partial() else p for p in placements])
    local, size, stride = held.to_local(), held.shape, held.stride()
    divisor = math.prod(mesh.size(axis) for axis in axes if placements[axis].reduce_op == "avg")
    full = sum(addends.values()) / divisor
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride), full


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def train(shape, mesh: DeviceMesh, of_param, of_grad, settings: dict, dtype=torch.float32) -> None:
    """Lion equals plain Lion on the full gradient, and SGD (through DTensor's dispatch) plain SGD."""
    start = values(shape, 7).to(dtype) / 8
    params = [nn.Parameter(place(start, mesh, of_param)) for _ in range(2)]
    plain = [nn.Parameter(start.clone()) for _ in range(2)]
    opts = [Lion([params[0]], **settings), torch.optim.SGD([params[1]], lr=2**-7)]
    expected = [Lion([plain[0]], **settings), torch.optim.SGD([plain[1]], lr=2**-7)]
    for step in range(3):
        grad, whole = gradient(shape, mesh, of_grad, step)
        for param, twin, opt, other in zip(params, plain, opts, expected, strict=True):
            param.grad, twin.grad = grad.to(dtype), whole.to(dtype)
            opt.step(), other.step()
            assert torch.equal(full(param), twin), f"{type(opt).__name__}, step {step}: {of_grad} for {of_param}"
            assert param.grad.placements == grad.placements  # the gradient itself stays as it was
    assert torch.equal(full(opts[0].state[params[0]]["exp_avg"]), expected[0].state[plain[0]]["exp_avg"])


def table_of_one_axis() -> None:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for of_param, of_grad in itertools.product((S0, S1, R), (S0, S1, R, SUM, AVG)):
        for shape in ((5, 7), (6, 4)):
            train(shape, mesh, (of_param,), (of_grad,), SETTINGS)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_placement_of_a_gradient_for_every_placement_of_a_parameter(gloo, ranks):
    gloo.run(ranks, table_of_one_axis)


def table_of_two_axes(kinds: list[tuple[Placement, ...]]) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2))
    placements = [*itertools.product((R, S0, S1), repeat=2), STRIDED]
    for of_param in kinds:
        for of_grad in [*placements, (SUM, S0), (S1, SUM), (SUM, SUM), (AVG, R), (SUM, AVG)]:
            train((8, 6), mesh, of_param, of_grad, SETTINGS)


@pytest.mark.parametrize(
    "kinds",
    [[STRIDED], [(R, R), (R, S0)], [(S0, R), (S0, S0)], [(S0, S1), (S1, S0)]],
    ids=["strided", "replicate", "shard", "both-dims"],
)
def test_placements_on_a_mesh_of_two_axes(gloo, kinds):
    gloo.run(4, table_of_two_axes, kinds)


def train_in_bf16() -> None:
    mesh = dist.init_device_mesh("cpu", (2,))
    for policy in (PrecisionPolicy(), PrecisionPolicy("fp32"), PrecisionPolicy("none", seed=3)):
        for of_param, of_grad in ((R, SUM), (S0, SUM), (S0, R)):
            settings = SETTINGS | {"precision": policy}
            train((6, 4), mesh, (of_param,), (of_grad,), settings, torch.bfloat16)


def test_placements_in_bf16_with_every_kind_of_main_params(gloo):
    gloo.run(2, train_in_bf16)


# ---- what else reads gradients


def make_pair(settings: dict):
    """(params, optimizer) over DTensors, and the same over plain tensors."""
    mesh = dist.init_device_mesh("cpu", (2,))
    starts = [values((6, 4), 1) / 8, values((5,), 2) / 8, values((4, 6), 3) / 8]
    params = [nn.Parameter(place(s, mesh, [p])) for s, p in zip(starts, (R, R, S0), strict=True)]
    plain = [nn.Parameter(s.clone()) for s in starts]
    return mesh, params, Lion(params, **settings), plain, Lion(plain, **settings)


def set_gradients(mesh, params, plain, step: int, scale: float = 1.0) -> None:
    for i, (param, twin, placement) in enumerate(zip(params, plain, (SUM, R, AVG), strict=True)):
        grad, whole = gradient(tuple(param.shape), mesh, (placement,), 10 * step + i)
        param.grad, twin.grad = grad * scale, whole * scale


def metrics_and_cautious(cautious: bool) -> None:
    mesh, params, opt, plain, expected = make_pair(SETTINGS | {"metrics_every": 1, "cautious": cautious})
    for step in range(3):
        set_gradients(mesh, params, plain, step)
        opt.step(), expected.step()
        for param, twin in zip(params, plain, strict=True):
            assert torch.equal(full(param), twin)
        measured, right = opt.metrics(), expected.metrics()
        for key in ("grad_norm", "update_norm", "exp_avg_norm", "flipped_share", "agreement_share", "zero_share"):
            assert measured[key] == pytest.approx(right[key], rel=1e-12), key


@pytest.mark.parametrize("cautious", [False, True])
def test_metrics_and_cautious_counts_are_of_the_summed_gradient(gloo, cautious):
    gloo.run(2, metrics_and_cautious, cautious)


def scaled(unscale: bool, scaler_class) -> None:
    mesh, params, opt, plain, expected = make_pair(SETTINGS)
    scaler = scaler_class("cpu", init_scale=8.0, growth_interval=100)
    for step in range(4):
        set_gradients(mesh, params, plain, step)
        for param in params:
            param.grad = param.grad * scaler.scale(torch.ones(()))
        if step == 2 and dist.get_rank() == 1:
            local_tensor(params[0].grad)[0, 0] = torch.inf  # an addend on one rank
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if step != 2:
            expected.step()
        for param, twin in zip(params, plain, strict=True):
            assert torch.equal(full(param), twin), step
        assert scaler.get_scale() == (8.0 if step < 2 else 4.0)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_of_the_library_sees_the_overflow_of_one_addend(gloo, unscale):
    gloo.run(2, scaled, unscale, lion_dist.GradScaler)


def torchs_scaler_is_refused() -> None:
    """The parameters lie alike, so that only their gradients show that ranks would decide apart."""
    mesh, params, *_ = make_pair({})
    opt = Lion(params[:2], **SETTINGS)
    before = [full(p).clone() for p in params[:2]]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for param, placement in zip(params[:2], (R, SUM), strict=True):
        param.grad = gradient(tuple(param.shape), mesh, (placement,), 0)[0] * scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="Use lion_dist.GradScaler"):
        scaler.step(opt)
    assert all(torch.equal(full(p), b) for p, b in zip(params, before, strict=False))


def test_torchs_grad_scaler_is_refused_where_gradients_differ_in_placement(gloo):
    gloo.run(2, torchs_scaler_is_refused)


def overflow_of_a_sum() -> None:
    """Each addend is finite in fp16, their sum is not: the step is skipped, on every rank."""
    mesh = dist.init_device_mesh("cpu", (2,))
    param = nn.Parameter(place(torch.ones(4, dtype=torch.float16), mesh, [R]))
    opt = Lion([param], **SETTINGS)
    scaler = lion_dist.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    param.grad = DTensor.from_local(torch.full((4,), 60000.0, dtype=torch.float16), mesh, [SUM])
    scaler.step(opt)
    scaler.update()
    assert torch.equal(full(param), torch.ones(4, dtype=torch.float16)) and scaler.get_scale() == 4.0


def test_grad_scaler_skips_where_only_the_sum_overflows(gloo):
    gloo.run(2, overflow_of_a_sum)


def overflow_beside_dtensors(first: str) -> None:
    """Plain parameters among DTensors, as fully_shard leaves those that it is told to ignore."""
    mesh = dist.init_device_mesh("cpu", (2,))
    plain, sharded = nn.Parameter(torch.ones(3)), nn.Parameter(place(torch.ones(4), mesh, [S0]))
    opt = Lion([plain, sharded] if first == "plain" else [sharded, plain], **SETTINGS)
    scaler = lion_dist.GradScaler("cpu", init_scale=8.0)
    for step, overflow in enumerate((None, plain, sharded)):
        scale = scaler.scale(torch.ones(()))
        plain.grad, sharded.grad = torch.ones(3) * scale, place(torch.ones(4), mesh, [S0]) * scale
        if overflow is not None and dist.get_rank() == 1:
            local_tensor(overflow.grad)[0] = torch.inf
        before = full(sharded).clone()
        scaler.step(opt)
        scaler.update()
        assert torch.equal(full(sharded), before) == (overflow is not None)
        assert torch.equal(plain[0], full(sharded)[0]) and scaler.get_scale() == 8.0 / 2**step


@pytest.mark.parametrize("first", ["plain", "sharded"])
def test_grad_scaler_takes_plain_parameters_beside_dtensors(gloo, first):
    gloo.run(2, overflow_beside_dtensors, first)


def clipped() -> None:
    mesh, params, _, plain, _ = make_pair({})
    opts = [Lion(ps[:1], betas=(0.5, 0.5), lr=2**-7) for ps in (params, plain)]
    grad, whole = gradient((6, 4), mesh, (SUM,), 0)
    params[0].grad, plain[0].grad = grad, whole.clone()
    norms = [torch.nn.utils.clip_grad_norm_(ps[:1], whole.norm().item() / 4) for ps in (params, plain)]
    assert torch.allclose(full(norms[0]), norms[1])
    for opt in opts:
        opt.step()
    momenta = [full(opt.state[ps[0]]["exp_avg"]) for opt, ps in zip(opts, (params, plain), strict=True)]
    assert torch.allclose(*momenta) and momenta[0].norm() < whole.norm()


@pytest.mark.xfail(
    torch.__version__ < "2.12", reason="torch 2.11 scales no gradient that is to be summed", raises=RankError
)
def test_torchs_clipping_is_of_the_summed_gradient(gloo):
    gloo.run(2, clipped)


# ---- the program in which it was found


def sequence_parallel() -> None:
    mesh = dist.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model, twin = nn.Sequential(nn.LayerNorm(4)), nn.Sequential(nn.LayerNorm(4))
    parallelize_module(model, mesh, {"0": SequenceParallel()})
    opt, plain = Lion(model.parameters(), **SETTINGS), Lion(twin.parameters(), **SETTINGS)
    for step in range(3):
        x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(step))
        opt.zero_grad(), plain.zero_grad()
        model(x.chunk(2, 1)[dist.get_rank()]).pow(3).sum().backward()
        twin(x).pow(3).sum().backward()
        assert model[0].weight.grad.placements == (SUM,)
        opt.step(), plain.step()
    for param, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(full(param), theirs)


def test_layer_norm_of_a_sequence_parallel_model_is_the_same_on_all_ranks(gloo):
    gloo.run(2, sequence_parallel)


# ---- a gradient of another kind


def refuse_other_kinds() -> None:
    mesh, other = dist.init_device_mesh("cpu", (2,)), dist.init_device_mesh("cpu", (2, 1))
    for placement in (R, S0):
        for settings in ({}, {"cautious": True}):
            sharded = nn.Parameter(place(torch.ones(6, 4), mesh, [placement]))
            whole = nn.Parameter(torch.ones(6, 4))
            opt = Lion([whole, sharded], **SETTINGS, **settings)
            dtensor, plain = place(torch.ones(6, 4), mesh, [placement]), torch.ones(6, 4)
            for warm in (False, True):
                if warm:
                    whole.grad, sharded.grad = plain, dtensor
                    opt.step()
                before = [full(p).clone() for p in (whole, sharded)]
                for grads, error, match in (
                    ((plain, plain), TypeError, "is a DTensor, its gradient a plain tensor.*distribute_tensor"),
                    ((dtensor, dtensor), TypeError, "is a plain tensor, its gradient a DTensor.*full_tensor"),
                    ((plain, place(plain, other, [R, R])), ValueError, "its gradient on DeviceMesh"),
                ):
                    whole.grad, sharded.grad = grads
                    with pytest.raises(error, match=match):
                        opt.step()
                    for param, value in zip((whole, sharded), before, strict=True):
                        assert torch.equal(full(param), value)


def test_plain_gradient_for_a_dtensor_and_the_reverse_are_refused_and_nothing_is_changed(gloo):
    gloo.run(2, refuse_other_kinds)


def refuse_partial_params() -> None:
    mesh = dist.init_device_mesh("cpu", (2,))
    param = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [SUM]))
    with pytest.raises(ValueError, match=r"scale is a DTensor with the placements.*Redistribute"):
        Lion([("scale", param)])


def test_partial_parameter_is_refused(gloo):
    gloo.run(2, refuse_partial_params)


# ---- no cost in the ordinary case


def count_comparisons() -> None:
    mesh, params, opt, plain, _ = make_pair(SETTINGS)
    compared = []

    class Watched(tuple):
        def __eq__(self, other):
            compared.append(other)
            return tuple.__eq__(self, other)

        __hash__ = tuple.__hash__

    grads = [place(torch.ones(p.shape), mesh, p.placements) for p in params]
    for param in params:
        param._spec.placements = Watched(param._spec.placements)
    for step in range(3):
        compared.clear()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if step:
            with RefuseDTensors():
                opt.step()
            assert not compared
        else:
            opt.step()


def test_placements_that_stay_alike_are_compared_once_and_nothing_is_dispatched(gloo):
    gloo.run(2, count_comparisons)


def a_change_is_noticed() -> None:
    """The gradients of one step are placed as the parameters, those of the next are not, and back."""
    mesh, params, opt, plain, expected = make_pair(SETTINGS)
    for step in range(6):
        for i, (param, twin) in enumerate(zip(params, plain, strict=True)):
            placements = (SUM,) if step % 3 == 1 else param.placements
            param.grad, twin.grad = gradient(tuple(param.shape), mesh, placements, 10 * step + i)
        opt.step(), expected.step()
        for param, twin in zip(params, plain, strict=True):
            assert torch.equal(full(param), twin), step


def test_gradients_whose_placements_change_between_steps(gloo):
    gloo.run(2, a_change_is_noticed)


def unfinished_collectives() -> None:
    mesh = dist.init_device_mesh("cpu", (2,))
    params = [nn.Parameter(place(torch.ones(6, 4), mesh, [R])), nn.Parameter(torch.ones(4))]
    twins = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4))]
    opt, plain = Lion(params, **SETTINGS), Lion(twins, **SETTINGS)
    for step in range(3):
        grad, whole = gradient((6, 4), mesh, (SUM,), step)
        late = grad.redistribute(placements=[R], async_op=True)
        assert type(late._local_tensor) is not Tensor
        params[0].grad, twins[0].grad = late, whole
        params[1].grad = dist._functional_collectives.all_reduce(torch.ones(4), "sum", mesh)
        twins[1].grad = torch.full((4,), 2.0)
        opt.step(), plain.step()
        for param, twin in zip(params, twins, strict=True):
            assert torch.equal(full(param), twin)


def test_gradients_that_a_collective_has_yet_to_write_are_waited_for(gloo):
    gloo.run(2, unfinished_collectives)


def test_plain_gradients_are_handed_back_as_they_are():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    grads = [torch.ones(3) for _ in range(2)]
    assert GradPlacements(params).local_grads(grads, {Tensor}) is grads
