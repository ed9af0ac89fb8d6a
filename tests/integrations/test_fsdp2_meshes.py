"""FSDP2 over every kind of mesh: equal, bit for bit, to plain ``Lion`` fed the gradients that FSDP2 reduced."""

import pytest
import torch

from lion_dist import Lion
from tests.integrations.fsdp_ranks import POLICIES, SETTINGS, Net, Twin, full, mesh_of, shard, train

MESHES = {
    "2 ranks": dict(shard=2),
    "4 ranks, one without a row of the head": dict(shard=4),
    "replicas x shards": dict(replicate=2, shard=2),
    "shards x tensor parallel": dict(shard=2, tensor=2),
    "replicas x shards x tensor parallel": dict(replicate=2, shard=1, tensor=2),
    "replicas x tensor parallel x 2 shards": dict(replicate=1, shard=2, tensor=2),
}


def train_on(axes: dict[str, int], policy: str, cautious: bool = False) -> tuple[set[int], list[torch.Tensor]]:
    """Returns the numels of this rank's shards, and the full parameters as its replica has them."""
    dtype, precision = POLICIES[policy]
    model = Net(dtype)
    settings = SETTINGS | {"precision": precision, "cautious": cautious}
    twin = Twin(model, **settings)
    shard(model, mesh_of(**axes), tensor_parallel="tensor" in axes)
    train(model, opt := Lion(model.parameters(), **settings), twin)
    by_columns = policy.endswith("stochastic") and "tensor" in axes
    twin.assert_equal(model, opt, but=("down.weight", "head.weight") if by_columns else ())
    assert len(opt.state) == len(list(model.parameters()))
    return {p.to_local().numel() for p in model.parameters()}, [full(p) for p in model.parameters()]


@pytest.mark.parametrize("policy", ["fp32", "split", "fp32, bf16 momentum"])
@pytest.mark.parametrize("mesh", MESHES)
def test_mesh(gloo, mesh, policy):
    axes = MESHES[mesh]
    ranks = torch.tensor(list(axes.values())).prod().item()
    by_rank = gloo.run(ranks, train_on, axes, policy)
    if mesh.startswith("4 ranks"):
        assert 0 in by_rank[3][0] and 0 not in by_rank[0][0]


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy not in ("fp32", "split")])
def test_policy(gloo, policy):
    gloo.run(2, train_on, dict(shard=2), policy)


TENSOR_PARALLEL = [mesh for mesh in MESHES if "tensor" in MESHES[mesh]]


@pytest.mark.parametrize("mesh", ["replicas x shards", *TENSOR_PARALLEL])
def test_stochastic_bits_are_those_of_one_process_where_shards_are_rows(gloo, mesh):
    """A layer that tensor parallel splits by columns draws others, and the same on all its replicas."""
    (_, expected), *others = gloo.run(4, train_on, MESHES[mesh], "none, stochastic")
    for _, params in others:
        assert all(map(torch.equal, params, expected))


@pytest.mark.parametrize("mesh", TENSOR_PARALLEL)
def test_cautious_counts_over_whole_tensors(gloo, mesh):
    gloo.run(4, train_on, MESHES[mesh], "fp32", True)
