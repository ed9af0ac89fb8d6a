"""Copies that went astray are found and named; copies that did not are left in peace."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lion_dist import PrecisionPolicy, ReplicaError, ShardedLion, ShardingConfig, replica_check
from lion_dist.replica_check import Holding, Piece, _odd, make_weights
from tests.models import GivenGradients, make_batch, make_model
from tests.oracle import assert_same_on_all_ranks

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


# ---- the checksum


def checksum(flat: Tensor, pieces=None) -> list[int]:
    pieces = pieces or [Piece("all", 0, flat.numel(), 0)]
    return Holding("here", flat, pieces).checksums(make_weights(flat.numel(), flat.device)).tolist()


def flip_bit(flat: Tensor, index: int, bit: int) -> None:
    """In the memory itself, as a cosmic ray would: no version counter moves."""
    words = flat.detach().view(INTEGERS[flat.dtype]).numpy()
    words[index] ^= (1 << bit) if bit + 1 < 8 * flat.element_size() else -(1 << bit)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(replica_check, "CHUNK", 16)


def test_weights_are_the_documented_sequence():
    weights = make_weights(100, torch.device("cpu")).tolist()
    assert weights == [_odd(i) for i in range(100)]
    assert all(weight % 2 for weight in weights) and len(set(weights)) == 100


@settings(max_examples=60)
@given(data=st.data(), dtype=st.sampled_from(list(INTEGERS)))
def test_every_single_flipped_bit_changes_it(data, dtype):
    flat = torch.randn(data.draw(st.integers(1, 200)), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum(flat)
    flip_bit(flat, data.draw(st.integers(0, flat.numel() - 1)), data.draw(st.integers(0, 8 * dtype.itemsize - 1)))
    assert checksum(flat) != before


@pytest.mark.parametrize(("i", "j"), [(0, 1), (3, 19), (3, 35), (16, 32)])  # within a chunk, and the same place in two
def test_swapped_elements_change_it(small_chunks, i, j):
    flat = torch.arange(40.0)
    before = checksum(flat)
    flat[[i, j]] = flat[[j, i]]
    assert checksum(flat) != before


def test_zeros_of_both_signs_differ():
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


@given(cuts=st.lists(st.integers(0, 100), max_size=6))
def test_pieces_add_up_to_the_whole_wherever_chunks_end(cuts):
    flat = torch.randn(100, generator=torch.Generator().manual_seed(0))
    bounds = [0, *sorted(cuts), 100]
    pieces = [Piece("", a, b, 0) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
    before, replica_check.CHUNK = replica_check.CHUNK, 16
    try:
        parts, (whole,) = checksum(flat, pieces), checksum(flat)
    finally:
        replica_check.CHUNK = before
    assert (sum(parts) - whole) % 2**64 == 0


def test_padding_is_in_no_piece():
    flat = torch.zeros(128)
    pieces = [Piece("a", 0, 10, 0), Piece("b", 64, 70, 0)]
    before = checksum(flat, pieces)
    flat[20] = flat[100] = 7.0
    assert checksum(flat, pieces) == before


# ---- ranks


def test_an_interval_that_is_no_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="check_replicas_every must be a whole number of steps"):
        ShardingConfig(check_replicas_every=-1)


def train(opt: ShardedLion, model: nn.Module, steps: range) -> None:
    for step in steps:
        make_batch(step, 0, dist.get_rank()).loss(model).backward()
        opt.step()
        opt.zero_grad()


def train_cleanly(dtype: torch.dtype, policy: PrecisionPolicy) -> None:
    model = make_model(dtype)
    sharding = ShardingConfig(bucket_numel=100, check_replicas_every=1)
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model, sharding=sharding, precision=policy)
    opt.check_replicas()
    train(opt, model, range(3))
    opt.check_replicas()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("main_params", ["split", "none"])
def test_training_keeps_copies_equal(gloo, world_size, main_params):
    gloo.run(world_size, train_cleanly, torch.bfloat16, PrecisionPolicy(main_params))


def find_one_bit(where: str, guilty: int) -> None:
    """One bit of one element, of which another rank is the owner, in a copy on rank ``guilty``."""
    model = make_model()
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(bucket_numel=100))
    train(opt, model, range(2))
    opt.finish_param_sync()
    place, bucket, piece = next(
        (i, bucket, piece)
        for i, bucket in enumerate(opt.buckets)
        for piece in Holding.of_bucket("", bucket).pieces
        if piece.name == where and piece.owner != guilty
    )
    if dist.get_rank() == guilty:
        flip_bit(bucket.flat_params, piece.stop - 1, 3)
    with pytest.raises(ReplicaError, match=f"rank {guilty}, bucket {place}: '{where}'") as caught:
        opt.check_replicas()
    (difference,) = caught.value.differences
    assert (difference.rank, difference.where, difference.params) == (guilty, f"bucket {place}", (where,))
    assert difference.owners == (piece.owner,)
    opt.resync_params()
    opt.check_replicas()
    assert_same_on_all_ranks(model)


@pytest.mark.parametrize(("world_size", "guilty"), [(2, 0), (2, 1), (4, 2)])
def test_one_flipped_bit_is_named_by_rank_bucket_and_parameter_and_repaired(gloo, world_size, guilty):
    gloo.run(world_size, find_one_bit, "embedding.weight", guilty)


def spoil_the_owner() -> None:
    """The owner is right by definition: everybody else is named, and the message says what that means."""
    model = GivenGradients((300,))
    opt = ShardedLion(model.parameters())
    bucket = opt.buckets[0]
    if dist.get_rank() == 1:
        bucket.param_shard[5] = 7.0
    with pytest.raises(ReplicaError, match="every rank but the owner is listed") as caught:
        opt.check_replicas()
    assert [difference.rank for difference in caught.value.differences] == [0, 2, 3]
    assert all(difference.owners == (1,) for difference in caught.value.differences)
    opt.resync_params()
    opt.check_replicas()
    assert bucket.flat_params[bucket.layout.shard_numel + 5] == 7.0


def test_where_the_owner_changed_everybody_else_is_named(gloo):
    gloo.run(4, spoil_the_owner)


def find_several() -> None:
    model = make_model()
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(bucket_numel=100))
    names = dict(model.named_parameters())
    with torch.no_grad():
        if dist.get_rank() == 0:
            names["frozen"][2] += 1.0  # of frozen parameters the first rank is right
        if dist.get_rank() == 1:
            names["up.weight"].zero_(), names["down.bias"].zero_()
    with pytest.raises(ReplicaError) as caught:
        opt.check_replicas()
    found = {(d.rank, name) for d in caught.value.differences for name in d.params}
    # Rank 1 has zeros in what it does not own; in what it does own, rank 0 is the one that differs.
    assert {name for _, name in found} == {"frozen", "up.weight", "down.bias"}
    assert (1, "frozen") in found and (0, "frozen") not in found
    opt.resync_params()
    assert names["frozen"][2] == 1.5
    opt.check_replicas()


def test_several_differences_are_all_named_frozen_parameters_too(gloo):
    gloo.run(2, find_several)


def spoil_what_is_not_trained() -> None:
    """Adapters: the optimizer has never heard of the parameters that make up most of the model."""
    model = make_model()
    model.requires_grad_(False)
    model.detour.requires_grad_(True)
    opt = ShardedLion(model.detour.parameters(), module=model)
    if dist.get_rank() == 1:
        flip_bit(model.embedding.weight.data.view(-1), 3, 1)
    with pytest.raises(ReplicaError, match="rank 1, frozen parameters: 'embedding.weight' .owned by rank 0.") as caught:
        opt.check_replicas()
    assert len(caught.value.differences) == 1
    opt.resync_params()
    opt.check_replicas()
    assert_same_on_all_ranks(model)


def test_parameters_of_the_module_that_are_not_trained_are_compared(gloo):
    gloo.run(2, spoil_what_is_not_trained)


def drift_between_replicas(precision: PrecisionPolicy) -> None:
    """What only one replica of a shard has: nothing would ever bring the copies together again."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = GivenGradients((300,), (40,), dtype=torch.bfloat16)
    opt = ShardedLion(model.parameters(), process_group=mesh, precision=precision)
    bucket = opt.buckets[0]
    if dist.get_rank() == 3:  # replica 1, shard rank 1
        bucket.param_shard[5] = 7.0
        opt.shards[0].exp_avg[5] = 1.0
    with pytest.raises(ReplicaError) as caught:
        opt.check_replicas()
    (difference,) = caught.value.differences
    assert (difference.rank, difference.params, difference.owners) == (3, ("param.0",), (1,))
    for _ in range(2):
        model.loss([torch.ones(300).bfloat16(), torch.ones(40).bfloat16()]).backward()
        opt.step()
    with pytest.raises(ReplicaError) as caught:
        opt.check_replicas()
    assert {d.rank for d in caught.value.differences} == {2, 3}  # gathered from one by the other
    opt.resync_params()
    for _ in range(2):
        opt.check_replicas()
        model.loss([torch.ones(300).bfloat16(), torch.ones(40).bfloat16()]).backward()
        opt.step()
    assert_same_on_all_ranks(model)
    others: list = [None] * 2
    dist.all_gather_object(others, opt.shards[0].exp_avg, group=mesh.get_group("replicate"))
    assert torch.equal(*others)


@pytest.mark.parametrize("main_params", ["split", "none"])
def test_replicas_of_a_shard_are_compared_with_the_first_and_repaired_from_it(gloo, main_params):
    gloo.run(4, drift_between_replicas, PrecisionPolicy(main_params))


def check_by_itself() -> list[int]:
    """Corrupted before step 4, which is looked at; the next step says so, on every rank, the corruption long gone."""
    model = GivenGradients((300,), (40,))
    opt = ShardedLion(model.parameters(), sharding=ShardingConfig(check_replicas_every=2))
    found = []
    for step in range(1, 7):
        if step in (3, 4) and dist.get_rank() == 0:
            flip_bit(opt.buckets[0].flat_params, opt.buckets[0].layout.offsets[1] + 30, 20)
        model.loss([torch.ones(300), torch.ones(40)]).backward()
        try:
            opt.step()
        except ReplicaError as error:
            assert [(d.rank, d.params) for d in error.differences] == [(0, ("param.1",))]
            found.append(step)
            opt.resync_params()
            opt.step()  # the one that raised had changed nothing
    assert opt.taken_steps() == 6
    return found


def test_every_kth_step_is_checked_and_the_next_one_says_what_was_found(gloo):
    assert gloo.run(2, check_by_itself) == [[5], [5]]


def check_experts() -> None:
    """Ranks 0, 2 share one expert, ranks 1, 3 another: a difference there is known to everybody."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    shared, expert = nn.Parameter(torch.full((70,), 2.0)), nn.Parameter(torch.full((130,), 3.0 + rank % 2))
    params = [{"params": [shared]}, {"params": [expert], "process_group": groups[rank % 2]}]
    opt = ShardedLion(params)
    opt.check_replicas()
    if rank == 3:
        flip_bit(opt.buckets[1].flat_params, 0, 22)  # owned by rank 1
    with pytest.raises(ReplicaError) as caught:
        opt.check_replicas()
    (difference,) = caught.value.differences
    assert (difference.rank, difference.params, difference.owners) == (3, ("param.1",), (1,))


def test_experts_are_compared_among_their_own_ranks_and_all_ranks_know(gloo):
    gloo.run(4, check_experts)
