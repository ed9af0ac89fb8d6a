"""Every element exactly once, on any number of ranks, and back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lion_dist import ShardedLion, ShardingConfig, boxed_tensor, checkpoint
from lion_dist.boxed_tensor import BoxedTensor
from lion_dist.boxes import Box, boxes_over
from lion_dist.checkpoint.metadata import read_metadata
from lion_dist.sharding.layout import BucketLayout, pack_into_buckets
from tests import gloo_workers
from tests.checkpoint.engines import POLICIES, assert_same_tensors, engine, new_model, tensors_in, train

# ---- without processes: what each of N ranks holds of each parameter, under three ways of cutting


def in_buckets(shapes, ranks, bucket_numel):
    """ShardedLion: aligned flat ranges of buckets. Returns, for each rank, {parameter: [(start, stop)]}."""
    numels = [math.prod(shape) for shape in shapes]
    held = [{i: [] for i in range(len(shapes))} for _ in range(ranks)]
    for members in pack_into_buckets(numels, [0] * len(numels), bucket_numel):
        layout = BucketLayout(tuple(numels[i] for i in members), ranks, alignment=4)
        for rank in range(ranks):
            for piece in layout.slices(rank):
                held[rank][members[piece.param]].append((piece.param_start, piece.param_stop))
    return held


def in_rows(shapes, ranks, _):
    """FSDP2: whole rows, as torch.chunk deals them out; later ranks may get none."""
    held = [{} for _ in range(ranks)]
    for i, shape in enumerate(shapes):
        rows, row = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        each = -(-rows // ranks)
        for rank in range(ranks):
            start, stop = min(rank * each, rows), min((rank + 1) * each, rows)
            held[rank][i] = [(start * row, stop * row)]
    return held


def in_one_flat_parameter(shapes, ranks, _):
    """FSDP1: equal ranges of all parameters one after another."""
    ends = [0]
    for shape in shapes:
        ends.append(ends[-1] + math.prod(shape))
    each = -(-ends[-1] // ranks)
    held = [{} for _ in range(ranks)]
    for i, (first, end) in enumerate(zip(ends, ends[1:], strict=False)):
        for rank in range(ranks):
            start, stop = max(first, rank * each), min(end, (rank + 1) * each)
            held[rank][i] = [(start - first, stop - first)] if start < stop else []
    return held


CUTS = [in_buckets, in_rows, in_one_flat_parameter]


@st.composite
def layouts(draw):
    shapes = draw(st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=4))
    ways = [(draw(st.sampled_from(CUTS)), draw(st.integers(1, 8)), draw(st.integers(1, 60))) for _ in range(2)]
    return shapes, ways


def boxed(shape, ranges, fill=None):
    """What a rank holds: memory of its own, counted up where ``fill`` is a full tensor, else -1."""
    views = {}
    for start, stop in ranges:
        local = torch.full((stop - start,), -1) if fill is None else fill.flatten()[start:stop].clone()
        views |= boxes_over(shape, start, local)
    return BoxedTensor(shape, views, dtype=torch.int64, device=torch.device("cpu"))


def chunk_of(piece):
    return ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))


def copied_once(shape, source, target):
    """Carry the pieces of all ranks in ``source`` into those of ``target`` by the plans of torch's checkpoints."""
    stored = [(piece, view) for rank in source for piece, view in rank.pieces.items()]
    description = TensorStorageMetadata(
        TensorProperties(dtype=torch.int64), torch.Size(shape), [chunk_of(piece) for piece, _ in stored]
    )
    for rank in target:
        places = list(rank.pieces.items())
        times = [torch.zeros_like(view) for _, view in places]
        for item in create_read_items_for_chunk_list("x", description, [chunk_of(piece) for piece, _ in places]):
            there = tuple(slice(o, o + n) for o, n in zip(item.dest_offsets, item.lengths, strict=True))
            here = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            places[item.dest_index.index][1][there] = stored[item.storage_index.index][1][here]
            times[item.dest_index.index][there] += 1
        assert all(count.eq(1).all() for count in times)


@given(layouts())
@settings(max_examples=200)
def test_n_ranks_to_m_ranks_and_back_is_the_identity(case):
    shapes, ((cut_n, n, bucket_n), (cut_m, m, bucket_m)) = case
    limit, boxed_tensor.PIECE_BYTES = boxed_tensor.PIECE_BYTES, 64  # pieces of 8 elements
    try:
        held_n, held_m = cut_n(shapes, n, bucket_n), cut_m(shapes, m, bucket_m)
        for i, shape in enumerate(shapes):
            full = torch.arange(math.prod(shape)).view(shape)
            on_n = [boxed(shape, held_n[rank][i], full) for rank in range(n)]
            on_m = [boxed(shape, held_m[rank][i]) for rank in range(m)]
            back = [boxed(shape, held_n[rank][i]) for rank in range(n)]
            elements = [e for rank in on_n for view in rank.pieces.values() for e in view.flatten().tolist()]
            assert sorted(elements) == list(range(full.numel()))
            copied_once(shape, on_n, on_m)
            copied_once(shape, on_m, back)
            for before, after in zip(on_n, back, strict=True):
                assert list(before.boxes) == list(after.boxes)
                assert all(torch.equal(before.boxes[box], after.boxes[box]) for box in before.boxes)
    finally:
        boxed_tensor.PIECE_BYTES = limit


@given(st.lists(st.integers(1, 7), max_size=4), st.integers(1, 40))
def test_pieces_are_small_and_hold_each_element_of_their_box_once(sizes, limit):
    box = Box((3,) * len(sizes), tuple(sizes))
    local = torch.arange(box.numel).view(sizes)
    pieces = list(box.pieces(limit))
    assert all(1 <= piece.numel <= limit for piece in pieces)
    assert sorted(e for p in pieces for e in box.view_of(p, local).flatten().tolist()) == list(range(box.numel))


# ---- with processes


def load_and_save(name, moves):
    for old, new in moves:
        model, optimizer = engine(name, "split")
        checkpoint.load(old, model=model, optimizer=optimizer)
        checkpoint.save(new, model=model, optimizer=optimizer)


def save_trained(path, name):
    model, optimizer = engine(name, "split")
    train(model, optimizer, range(2))
    checkpoint.save(path, model=model, optimizer=optimizer)


@pytest.mark.parametrize("name", ["sharded", "fsdp2", "fsdp1 flat"])
def test_any_number_of_ranks_to_any_other(gloo, tmp_path, name):
    gloo.run(1, save_trained, str(tmp_path / "start"), "sharded")
    for n in range(1, 5):
        gloo.run(n, load_and_save, name, [(str(tmp_path / "start"), str(tmp_path / f"{n}"))])
    for m in range(1, 5):
        moves = [(str(tmp_path / f"{n}"), str(tmp_path / f"{n} to {m}")) for n in range(1, 5)]
        gloo.run(m, load_and_save, name, moves)
        for _, new in moves:
            assert_same_tensors(tmp_path / "start", new)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded", "fsdp2", "fsdp1"])
def test_eight_ranks_to_three_and_to_one_and_back(gloo, tmp_path, monkeypatch, name):
    monkeypatch.setattr(gloo_workers, "MAX_RANKS", 8)
    eight = gloo_workers.GlooPool()
    try:
        eight.run(8, save_trained, str(tmp_path / "8"), name)
        gloo.run(3, load_and_save, name, [(str(tmp_path / "8"), str(tmp_path / "3"))])
        gloo.run(1, load_and_save, name, [(str(tmp_path / "3"), str(tmp_path / "1"))])
        eight.run(8, load_and_save, name, [(str(tmp_path / "1"), str(tmp_path / "8 again"))])
    finally:
        eight.stop()
    for path in ("3", "1", "8 again"):
        assert_same_tensors(tmp_path / "8", tmp_path / path)


def sharded(sharding):
    dtype, precision = POLICIES["split"]
    model = new_model(dtype)
    return model, ShardedLion(model.parameters(), module=model, precision=precision, lr=1e-3, sharding=sharding)


def save_with(path, sharding):
    model, optimizer = sharded(sharding)
    train(model, optimizer, range(2))
    optimizer._counters[1] = 5
    checkpoint.save(path, model=model, optimizer=optimizer)


def counters_after_load(path, new, sharding):
    model, optimizer = sharded(sharding)
    checkpoint.load(path, model=model, optimizer=optimizer)
    checkpoint.save(new, model=model, optimizer=optimizer)
    return optimizer.taken_steps(), optimizer.skipped_steps()


@pytest.mark.parametrize("saved, loaded", [((1, 300), (2, 900)), ((2, 900), (1, 5000)), ((2, 1), (2, 10**6))])
def test_stage_buckets_and_ranks_change_and_counters_come_along(gloo, tmp_path, saved, loaded):
    gloo.run(2, save_with, str(tmp_path / "c"), ShardingConfig(saved[0], bucket_numel=saved[1]))
    sharding = ShardingConfig(loaded[0], bucket_numel=loaded[1])
    answers = gloo.run(4, counters_after_load, str(tmp_path / "c"), str(tmp_path / "d"), sharding)
    assert answers == [(2, 5)] * 4
    assert_same_tensors(tmp_path / "c", tmp_path / "d")
    assert torch.equal(tensors_in(tmp_path / "d")["counters"], torch.tensor([2, 5]))


def elements_written(path, name):
    model, optimizer = engine(name, "split")
    checkpoint.save(path, model=model, optimizer=optimizer)


@pytest.mark.parametrize("name", ["sharded", "fsdp2", "fsdp1 flat", "ddp"])
def test_each_rank_writes_its_own_part_and_no_more(gloo, tmp_path, name):
    """File by file: together each element once, and no rank more than its share and a piece."""
    gloo.run(4, elements_written, str(tmp_path / "c"), name)
    metadata = read_metadata(tmp_path / "c")
    written = {f"__{rank}_0.distcp": 0 for rank in range(4)}
    for key, stored in metadata.state_dict_metadata.items():
        for chunk in stored.chunks:
            (place,) = (p for i, p in metadata.storage_data.items() if i.fqn == key and i.offset == chunk.offsets)
            written[place.relative_path] += math.prod(chunk.sizes)
    numel = sum(p.numel() for p in new_model(torch.float32).parameters())
    assert sum(written.values()) in (3 * numel + 3, 3 * numel + 5)  # the buffer, and ShardedLion's counters
    assert max(written.values()) < (0.5 if name != "ddp" else 0.7) * 3 * numel
