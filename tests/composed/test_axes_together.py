"""Tensor, pipeline, expert, context and data parallel in one job."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lion_dist import Lion, ModelParallel, ReplicaError, ShardedLion, ShardingConfig, TwoLevels
from tests import gloo_workers
from tests.composed.jobs import LR, OneProcess, gradients, mesh_of, place_on
from tests.models import GivenGradients, given_loss, make_batch, make_model
from tests.oracle import Oracle, assert_same_params

SHAPES = ((6, 7), (5,), (8, 12), (130,))
CUTS = (0, None, 1, None)


def train_on(axes: dict[str, int], config: dict) -> None:
    """The first two parameters are on the first pipeline stage, and cut ones are cut over "tp"."""
    mesh = mesh_of(**axes)
    if "node" in axes:
        ranks, num_ranks = TwoLevels(mesh["node", "local"]), axes["node"] * axes["local"]
        dp = axes["local"] * place_on(mesh, "node") + place_on(mesh, "local")
    else:
        ranks, num_ranks, dp = mesh["dp"], axes["dp"], place_on(mesh, "dp")
    pp, tp = place_on(mesh, "pp"), place_on(mesh, "tp")
    own = slice(None) if axes["pp"] == 1 else slice(2 * pp, 2 * pp + 2)
    settings = dict(lr=LR, weight_decay=0.1)
    one = OneProcess(num_ranks, shapes=SHAPES, **settings)

    def part(whole, dim):
        return whole if dim is None else whole.chunk(axes["tp"], dim)[tp].clone()

    model = GivenGradients()
    model.weights = nn.ParameterList(
        nn.Parameter(part(w.detach().clone(), d)) for w, d in zip(one.model.weights[own], CUTS[own], strict=True)
    )
    dims = dict(zip((name for name, _ in model.named_parameters()), CUTS[own], strict=True))
    opt = ShardedLion(
        model.parameters(),
        module=model,
        process_group=ranks,
        model_parallel=ModelParallel(mesh["tp"], mesh["pp"], cut_dim=lambda name, _: dims[name]),
        sharding=ShardingConfig(bucket_numel=64, **config),
        **settings,
    )
    for step in range(3):
        whole = gradients(step, dp, SHAPES)[own]
        model.loss([part(grad, dim) for grad, dim in zip(whole, CUTS[own], strict=True)]).backward()
        if config.get("update_in_backward"):
            one.step(step)
        else:
            assert torch.equal(opt.clip_grad_norm_(1.0), one.step(step, 1.0))
        opt.step()
    opt.finish_param_sync()
    for mine, theirs, dim in zip(model.weights, one.model.weights[own], CUTS[own], strict=True):
        assert torch.equal(mine, part(theirs, dim))


@pytest.mark.parametrize(
    ("axes", "config"),
    [
        ({"pp": 2, "dp": 1, "tp": 2}, {}),
        ({"pp": 1, "dp": 2, "tp": 2}, {"param_sync": "coded"}),
        ({"pp": 1, "dp": 2, "tp": 2}, {"update_in_backward": True}),
        ({"pp": 2, "dp": 2, "tp": 1}, {"zero_stage": 1, "check_replicas_every": 1}),
    ],
    ids=str,
)
def test_axes_together_equal_one_process(gloo, axes, config):
    gloo.run(4, train_on, axes, config)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"pp": 2, "dp": 2, "tp": 2}, {"pp": 1, "node": 2, "local": 2, "tp": 2}], ids=str)
def test_eight_ranks_of_three_axes_equal_one_process(monkeypatch, axes):
    monkeypatch.setattr(gloo_workers, "MAX_RANKS", 8)
    eight = gloo_workers.GlooPool()
    try:
        eight.run(8, train_on, axes, {})
    finally:
        eight.stop()


# ---- experts


class Mixture(nn.Module):
    """A dense weight, and one expert on each of the two "ep" ranks, shared by two."""

    def __init__(self, mesh, stacked: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.dense = nn.Parameter(torch.randn(70, generator=generator))
        experts = torch.randn(2, 9, 4, generator=generator)
        ep = place_on(mesh, "ep")
        own = distribute_tensor(experts, mesh["ep"], [Shard(0)]) if stacked else experts[ep : ep + 1].clone()
        self.experts = nn.Parameter(own)


def train_experts(stacked: bool, tokens_on: tuple[int, ...]) -> dict:
    """Gradients: 1 + rank of the dense weight on each rank; of an expert where it has tokens."""
    mesh = mesh_of(edp=2, ep=2)
    rank, ep = torch.distributed.get_rank(), place_on(mesh, "ep")
    model = Mixture(mesh, stacked)
    opt = ShardedLion(
        [{"params": [model.dense]}, {"params": [model.experts], "process_group": mesh["edp"]}],
        lr=LR,
        betas=(0.0, 0.0),  # exp_avg is the gradient
        module=model,
        model_parallel=ModelParallel(expert=mesh["ep"]) if stacked else None,
        sharding=ShardingConfig(average=False),
        metrics_every=1,
    )
    local = model.experts.to_local() if isinstance(model.experts, DTensor) else model.experts
    before = local.detach().clone()
    own = torch.full_like(local, 1.0 + ep) if rank in tokens_on else None
    given_loss([model.dense, local], [torch.full((70,), 1.0 + rank), own]).backward()
    norm = opt.grad_norm()
    opt.step()
    opt.check_replicas()
    opt.finish_param_sync()
    local = model.experts.to_local() if isinstance(model.experts, DTensor) else model.experts
    return {"norm": norm.item(), "moved": not torch.equal(local, before), "metrics": opt.metrics()["grad_norm"]}


@pytest.mark.parametrize("stacked", [False, True], ids=["named", "stacked"])
@pytest.mark.parametrize("tokens_on", [(0, 1, 2, 3), (0, 1, 2), (0, 2)], ids=str)
def test_experts_some_without_tokens(gloo, stacked, tokens_on):
    """Ranks 0 and 2 share the first expert, 1 and 3 the second."""
    sums = [sum(1.0 + ep for rank in tokens_on if rank % 2 == ep) for ep in range(2)]
    norm = (70 * 10.0**2 + sum(36 * total**2 for total in sums)) ** 0.5
    for rank, found in enumerate(gloo.run(4, train_experts, stacked, tokens_on)):
        assert found["norm"] == pytest.approx(norm)
        assert found["metrics"] == pytest.approx(norm)
        assert found["moved"] == (sums[rank % 2] > 0)


def spoil_an_expert() -> str:
    mesh = mesh_of(edp=2, ep=2)
    model = Mixture(mesh, stacked=False)
    opt = ShardedLion([{"params": [model.dense]}, {"params": [model.experts], "process_group": mesh["edp"]}], lr=LR)
    if torch.distributed.get_rank() == 3:
        model.experts.data.view(-1)[0] += 1
    with pytest.raises(ReplicaError) as raised:
        opt.check_replicas()
    return str(raised.value)


def test_check_replicas_compares_experts_with_their_own_ranks(gloo):
    assert all("rank 3" in text for text in gloo.run(4, spoil_an_expert))


def spoil_a_stage(every: int) -> str:
    mesh = mesh_of(pp=2, dp=2)
    model = GivenGradients((6, 7), (5,))
    opt = ShardedLion(
        model.parameters(),
        module=model,
        process_group=mesh["dp"],
        model_parallel=ModelParallel(pipeline=mesh["pp"]),
        sharding=ShardingConfig(check_replicas_every=every),
    )

    def step() -> None:
        model.loss([torch.ones(6, 7), torch.ones(5)]).backward()
        opt.step()

    step()
    opt.finish_param_sync()
    if torch.distributed.get_rank() == 3:
        model.weights[0].data.view(-1)[0] += 1
    with pytest.raises(ReplicaError) as raised:
        if every:
            step()  # begins the check
            step()  # reads what it has found
        else:
            opt.check_replicas()
    return str(raised.value)


@pytest.mark.parametrize("every", [0, 1])
def test_ranks_of_all_stages_stop_where_those_of_one_differ(gloo, every):
    (text,) = set(gloo.run(4, spoil_a_stage, every))
    assert "rank 3" in text and "rank 0" not in text


# ---- context parallel


def train_with_context_parallel() -> None:
    """DP 2 x CP 2: each rank's loss is the mean over its part of the sequences, gradients are averaged over four."""
    mesh = mesh_of(dp=2, cp=2)
    model, expected = make_model(), make_model()
    opt = ShardedLion(model.parameters(), lr=2e-3, module=model, process_group=mesh["dp", "cp"]._flatten("dp_cp"))
    oracle = Oracle(expected, Lion(expected.parameters(), lr=2e-3), 4)
    for step in range(2):
        losses = []
        for rank in range(4):
            whole = make_batch(step, 0, rank // 2)
            part = slice(0, 2) if rank % 2 == 0 else slice(2, 4)
            losses.append(type(whole)(whole.tokens[:, part], whole.targets[:, part]).loss)
        losses[torch.distributed.get_rank()](model).backward()
        oracle.backward(losses)
        assert torch.equal(opt.clip_grad_norm_(0.3), oracle.step(clip=0.3))
        opt.step()
    opt.finish_param_sync()
    assert_same_params(model, expected)


def test_context_parallel_averages_over_data_and_context_ranks(gloo):
    gloo.run(4, train_with_context_parallel)
