"""``lion_dist.clip_grad_norm_`` over FSDP2, tensor parallel and expert parallel meshes together."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import lion_dist
from lion_dist.sharding import collectives
from tests.composed.jobs import mesh_of, place_on
from tests.integrations.fsdp_ranks import Net, full, inputs, shard


def reference(grads: list[torch.Tensor], max_norm: float, norm_type: float = 2.0):
    """(norm, clipped gradients) by torch's own, in one process."""
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
    return norm, [param.grad for param in params]


class Meshes:
    """Parameters over a dense mesh FSDP 2 x TP 2, over the experts' mesh of 4, and a plain one."""

    def __init__(self):
        self.dense, self.experts = mesh_of(fsdp=2, tp=2), mesh_of(ep=4)
        placed = [
            (self.dense, [Shard(0), Shard(1)]),
            (self.dense, [Shard(0), Replicate()]),
            (self.dense, [Replicate(), Replicate()]),
            (self.dense["tp"], [Shard(0)]),
            (self.experts, [Shard(0)]),
        ]
        shapes = [(6, 4), (5,), (3, 3), (7, 2), (4, 3, 5)]
        generator = torch.Generator().manual_seed(3)
        self.grads = [torch.randn(shape, generator=generator) for shape in [*shapes, (9,)]]
        self.params = []
        for grad, (mesh, placements) in zip(self.grads, placed, strict=False):
            param = nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, placements))
            param.grad = distribute_tensor(grad.clone(), mesh, placements)
            self.params.append(param)
        self.params += [nn.Parameter(torch.zeros(9)), nn.Parameter(torch.zeros(2))]  # the last has no gradient
        self.params[-2].grad = self.grads[-1].clone()


def clip(max_norm: float, norm_type: float) -> list[tuple[int, int]]:
    job, sent = Meshes(), []
    names = ("all_reduce", "all_reduce_max")
    saved = {name: getattr(collectives, name) for name in names}

    def counting(name: str):
        def counted(tensor, group) -> None:
            sent.append((group.size(), tensor.numel()))
            saved[name](tensor, group)

        return counted

    def refuse(*_args, **_kwargs):
        raise AssertionError("an operation was dispatched through DTensor")

    dispatch = DTensor.__torch_dispatch__
    for name in names:
        setattr(collectives, name, counting(name))
    DTensor.__torch_dispatch__ = refuse
    try:
        norm = lion_dist.clip_grad_norm_(job.params, max_norm, norm_type)
    finally:
        DTensor.__torch_dispatch__ = dispatch
        for name in names:
            setattr(collectives, name, saved[name])
    expected, clipped = reference(job.grads, max_norm, norm_type)
    assert type(norm) is torch.Tensor and norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for param, grad in zip(job.params, clipped, strict=False):
        torch.testing.assert_close(full(param.grad), grad, rtol=1e-5, atol=0)
    return sent


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_meshes_together(gloo, max_norm, norm_type):
    """One message an axis: two kinds are cut along "fsdp", two along "tp", one among the experts' ranks."""
    for sent in gloo.run(4, clip, max_norm, norm_type):
        assert sorted(sent) == [(2, 2), (2, 2), (4, 1)]


def train_fsdp_with_tp() -> None:
    """The norms' gradients are addends over the tensor-parallel ranks."""
    mesh = mesh_of(shard=2, tensor=2)
    model = shard(Net(), mesh, tensor_parallel=True)
    model(inputs(0)).backward()
    before = [full(p.grad) for p in model.parameters()]
    expected, clipped = reference(before, 0.1)
    norm = lion_dist.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for param, grad in zip(model.parameters(), clipped, strict=True):
        torch.testing.assert_close(full(param.grad), grad, rtol=1e-5, atol=1e-9)
    lion_dist.Lion(model.parameters()).step()


def test_fsdp2_with_tensor_parallel(gloo):
    gloo.run(4, train_fsdp_with_tp)


def clip_stages() -> float:
    mesh = mesh_of(pp=2)
    param = nn.Parameter(torch.zeros(4))
    param.grad = torch.full((4,), 1.0 + place_on(mesh, "pp"))
    norm = lion_dist.clip_grad_norm_(param, 1.0, pipeline=mesh["pp"])
    assert param.grad[0].item() == pytest.approx((1.0 + place_on(mesh, "pp")) / 20**0.5, rel=1e-5)
    return norm.item()


def test_the_norm_of_all_pipeline_stages(gloo):
    assert gloo.run(2, clip_stages) == [pytest.approx(20**0.5)] * 2


@pytest.mark.parametrize("foreach", [None, True, False])
def test_plain_parameters_as_torchs_own(foreach):
    grads = [torch.randn(5, 3), torch.randn(7)]
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    norm = lion_dist.clip_grad_norm_(iter(params), 0.3, foreach=foreach)
    expected, clipped = reference(grads, 0.3)
    torch.testing.assert_close(norm, expected)
    for param, grad in zip(params, clipped, strict=True):
        torch.testing.assert_close(param.grad, grad)


def test_a_norm_that_is_not_finite_is_an_error_where_asked():
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(RuntimeError, match="is nan, so they cannot be clipped"):
        lion_dist.clip_grad_norm_(param, 1.0, error_if_nonfinite=True)
    assert param.grad[0] == 1.0
    assert lion_dist.clip_grad_norm_(param, 1.0).isnan()


def test_no_parameters_and_no_gradients_have_a_norm_of_zero():
    assert lion_dist.clip_grad_norm_([], 1.0) == 0
    assert lion_dist.clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0) == 0


@pytest.mark.parametrize(
    ("arguments", "words"), [((-1.0,), "max_norm"), ((1.0, 0.5), "norm_type"), ((1.0, "x"), "norm")]
)
def test_what_is_no_norm(arguments, words):
    with pytest.raises((TypeError, ValueError), match=words):
        lion_dist.clip_grad_norm_([nn.Parameter(torch.zeros(2))], *arguments)
