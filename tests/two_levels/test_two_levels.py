"""Two levels on 2 nodes x 2 ranks, bit for bit against one process that sums inside the nodes first."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig, TwoLevels, checkpoint
from lion_dist.sharding import collectives
from tests.checkpoint.engines import assert_same_tensors
from tests.composed.jobs import gradients, mesh_of
from tests.models import GivenGradients, given_loss, make_batch, make_model
from tests.oracle import Oracle, assert_same_on_all_ranks, assert_same_params, assert_same_state, sum_in_order
from tests.shared_files import over_shared_files

NODES, RANKS = 2, 2
BF16, FP32 = torch.bfloat16, torch.float32
SETTINGS = dict(lr=2e-3, weight_decay=0.1)


class TwoLevelOracle(Oracle):
    """Sums in fp32 in rank order inside each node, rounds that for the wire, and sums over nodes in their order."""

    def _sum(self, addends: list[Tensor]) -> Tensor:
        nodes = [addends[node * RANKS : (node + 1) * RANKS] for node in range(NODES)]
        return sum_in_order([sum_in_order(of_node).to(addends[0].dtype) for of_node in nodes])


def make(model, dtype_settings=None, **sharding) -> ShardedLion:
    return ShardedLion(
        model.parameters(),
        module=model,
        process_group=TwoLevels(mesh_of(node=NODES, local=RANKS)),
        sharding=ShardingConfig(bucket_numel=300, **sharding),
        **SETTINGS,
        **(dtype_settings or {}),
    )


def train(dtype: torch.dtype, precision: PrecisionPolicy, micro_batches: int, sharding: dict) -> str:
    model = make_model(dtype)
    expected = copy.deepcopy(model)
    opt = make(model, {"precision": precision}, **sharding)
    lion = Lion(expected.parameters(), precision=precision, **SETTINGS)
    oracle = TwoLevelOracle(expected, lion, NODES * RANKS, sharding.get("reduce_dtype"))
    in_backward = sharding.get("update_in_backward")
    for step in range(3):
        for micro_batch in range(micro_batches):
            make_batch(step, micro_batch, dist.get_rank()).loss(model).backward()
            oracle.backward([make_batch(step, micro_batch, rank).loss for rank in range(NODES * RANKS)])
        if in_backward:  # where a parameter without a gradient counts as one with zeros
            for param in expected.parameters():
                if param.requires_grad:
                    oracle._totals.setdefault(param, torch.zeros_like(param))
            oracle.step()
        else:
            assert torch.equal(opt.clip_grad_norm_(0.3), oracle.step(clip=0.3))
        opt.step()
        opt.zero_grad()
    opt.finish_param_sync()
    assert_same_params(model, expected)
    assert_same_state(opt, model, lion, expected)
    assert_same_on_all_ranks(model)
    return opt._builder.description(opt.shards)


@pytest.mark.parametrize(
    ("dtype", "precision", "micro_batches", "sharding"),
    [
        (FP32, PrecisionPolicy(), 1, {}),
        (FP32, PrecisionPolicy(), 2, {"reduce_dtype": BF16}),
        (BF16, PrecisionPolicy("split"), 2, {}),
        (BF16, PrecisionPolicy("none", BF16, "stochastic", seed=3), 1, {}),
        (FP32, PrecisionPolicy(), 1, {"param_sync": "coded"}),
        (BF16, PrecisionPolicy("split"), 2, {"param_sync": "coded"}),
        (FP32, PrecisionPolicy(), 1, {"update_in_backward": True}),
        (FP32, PrecisionPolicy(), 1, {"wait_in_backward": False, "check_replicas_every": 1}),
    ],
    ids=lambda value: None if isinstance(value, PrecisionPolicy | int) else str(value),
)
def test_equals_one_process_that_sums_inside_nodes_first(gloo, dtype, precision, micro_batches, sharding):
    gloo.run(NODES * RANKS, train, dtype, precision, micro_batches, sharding)


@pytest.mark.parametrize("param_sync", ["gather", "coded"])
def test_peer_memory_inside_the_node(gloo, param_sync):
    names = gloo.run(4, over_shared_files, train, BF16, PrecisionPolicy("split"), 2, {"param_sync": param_sync})
    assert all("; transport: two levels, peer memory inside the node;" in line for line in names)


def memory() -> dict[str, int]:
    model = GivenGradients((64, 64), (130,))
    opt = make(model)
    return opt.memory_bytes()


def test_each_rank_keeps_a_share_of_all_ranks(gloo):
    numel = 64 * 64 + 130
    for found in gloo.run(4, memory):
        assert numel * 4 / 4 <= found["exp_avg"] <= numel * 4 / 4 + 2 * 4 * 64


def sent_across(param_sync: str) -> tuple[int, int]:
    """What this rank sends to the other node, and to its own, in one step."""
    model = GivenGradients((512, 256))
    opt = make(model, param_sync=param_sync)
    levels = opt.groups.levels
    sent = {levels.inside: 0, levels.across: 0}

    def counted(function, where):
        def call(*args, **kwargs):
            before = collectives.sent_bytes
            work = function(*args, **kwargs)
            group = args[where]
            if group in sent:
                sent[group] += collectives.sent_bytes - before
            return work

        return call

    originals = collectives.reduce_scatter, collectives.all_gather
    given_loss(model.weights, [torch.ones(512, 256)]).backward()
    opt.step()
    opt.finish_param_sync()  # the first step's codes are not compared
    collectives.reduce_scatter, collectives.all_gather = (counted(f, 2) for f in originals)
    try:
        given_loss(model.weights, [torch.ones(512, 256)]).backward()
        opt.step()
        opt.finish_param_sync()
    finally:
        collectives.reduce_scatter, collectives.all_gather = originals
    return sent[levels.across], sent[levels.inside]


@pytest.mark.parametrize(("param_sync", "bytes_a_parameter"), [("gather", 4.0), ("coded", 0.36)])
def test_bytes_across_nodes(gloo, param_sync, bytes_a_parameter):
    numel, share = 512 * 256, (NODES - 1) / NODES
    sent = gloo.run(4, sent_across, param_sync)
    for node in (sent[:2], sent[2:]):
        expected = numel * share * (4 + bytes_a_parameter)  # fp32 gradients
        assert sum(across for across, _ in node) <= expected * 1.05
        assert sum(across for across, _ in node) >= numel * share * 4
    if param_sync == "gather":
        assert sum(across for across, _ in sent[:2]) == pytest.approx(expected, rel=0.05)


# ---- state dicts and checkpoints


def trained(flat: bool, steps: int = 2) -> tuple[GivenGradients, ShardedLion]:
    """Gradients are multiples of 1/8: their sums are exact in any order, so flat sharding has the same bits."""
    model = GivenGradients((33, 7), (130,))
    if flat:
        opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(bucket_numel=300), **SETTINGS)
    else:
        opt = make(model)
    for step in range(steps):
        given_loss(model.weights, gradients(step, dist.get_rank(), ((33, 7), (130,)))).backward()
        opt.step()
        opt.zero_grad()
    opt.finish_param_sync()
    return model, opt


def checkpoints_between(source_is_flat: bool, folder: str) -> None:
    model, opt = trained(source_is_flat)
    checkpoint.save(f"{folder}/first", model=model, optimizer=opt)
    model, opt = trained(not source_is_flat, steps=1)
    checkpoint.load(f"{folder}/first", model=model, optimizer=opt)
    checkpoint.save(f"{folder}/second", model=model, optimizer=opt)
    assert_same_tensors(f"{folder}/first", f"{folder}/second")


@pytest.mark.parametrize("source_is_flat", [False, True])
def test_a_checkpoint_goes_to_flat_sharding_and_back(gloo, tmp_path, source_is_flat):
    gloo.run(4, checkpoints_between, source_is_flat, str(tmp_path))


def full_state() -> None:
    (model, opt), (flat_model, flat) = trained(flat=False), trained(flat=True)
    assert_same_params(model, flat_model)
    states = []
    for each in (opt, flat):
        each.consolidate_state_dict(3)
        states.append(each.state_dict()["state"] if dist.get_rank() == 3 else {})
    for mine, theirs in zip(states[0].values(), states[1].values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
    given_loss(model.weights, [torch.ones(33, 7), None]).backward()
    assert torch.equal(opt.full_grad(model.weights[0]), torch.ones(33, 7, dtype=torch.float64))


def test_a_full_state_and_a_full_gradient_are_those_of_flat_sharding(gloo):
    gloo.run(4, full_state)


@pytest.mark.parametrize("mesh", ["one axis", "no names", "a group"])
def test_refuses_what_has_no_two_levels(gloo, mesh):
    gloo.run(2, refused, mesh)


def refused(kind: str) -> None:
    mesh = mesh_of(node=1, local=2)
    given = {
        "one axis": lambda: mesh["local"],
        "no names": lambda: dist.init_device_mesh("cpu", (1, 2)),
        "a group": lambda: dist.group.WORLD,
    }[kind]()
    with pytest.raises(ValueError, match="2-D DeviceMesh with names"):
        TwoLevels(given)


def on_one_node() -> bool:
    model = GivenGradients((8, 4))
    opt = ShardedLion(model.parameters(), process_group=TwoLevels(mesh_of(node=1, local=2)))
    return opt.groups.levels is None and opt.groups.shard_world_size == 2


def test_one_node_is_flat_sharding(gloo):
    assert all(gloo.run(2, on_one_node))
