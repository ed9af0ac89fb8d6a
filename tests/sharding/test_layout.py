"""The geometry of buckets: every element has one owner, and it is cheap to know which."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lion_dist.sharding.layout import (
    ALIGNMENT,
    BucketLayout,
    ParamSlice,
    choose_bucket_numel,
    pack_into_buckets,
    round_up,
)

NUMELS = st.lists(st.integers(0, 500), min_size=1, max_size=12).map(tuple)
RANKS = st.integers(1, 9)
ALIGNMENTS = st.sampled_from([1, 4, 16, 64])


@given(numels=NUMELS, ranks=RANKS, alignment=ALIGNMENTS)
@example(numels=(0,), ranks=4, alignment=64)
@example(numels=(1,), ranks=4, alignment=64)
@example(numels=(0, 0, 3, 0), ranks=2, alignment=4)
def test_every_element_of_every_parameter_has_one_owner(numels, ranks, alignment):
    layout = BucketLayout(numels, ranks, alignment)
    owners = [[0] * numel for numel in numels]
    for rank in range(ranks):
        for piece in layout.slices(rank):
            for element in range(piece.param_start, piece.param_stop):
                owners[piece.param][element] += 1
    assert all(count == 1 for param in owners for count in param)


@given(numels=NUMELS, ranks=RANKS, alignment=ALIGNMENTS)
def test_slices_lie_inside_their_shard_and_where_their_parameter_does(numels, ranks, alignment):
    layout = BucketLayout(numels, ranks, alignment)
    for rank in range(ranks):
        start, stop = layout.shard_range(rank)
        assert stop - start == layout.shard_numel
        end = start
        for piece in layout.slices(rank):
            assert piece.numel > 0
            assert end <= piece.bucket_start and piece.bucket_stop <= stop  # in order, apart, inside
            assert 0 <= piece.param_start < piece.param_stop <= numels[piece.param]
            assert piece.bucket_start - layout.offsets[piece.param] == piece.param_start
            end = piece.bucket_stop


@given(numels=NUMELS, ranks=RANKS, alignment=ALIGNMENTS)
def test_parameters_shards_and_slices_are_aligned_and_padding_is_bounded(numels, ranks, alignment):
    layout = BucketLayout(numels, ranks, alignment)
    assert all(offset % alignment == 0 for offset in layout.offsets)
    assert layout.numel == ranks * layout.shard_numel and layout.shard_numel % alignment == 0
    for rank in range(ranks):
        assert all(piece.bucket_start % alignment == 0 for piece in layout.slices(rank))
    assert layout.numel - sum(numels) < len(numels) * alignment + ranks * alignment


@given(numels=NUMELS, ranks=RANKS)
def test_shards_cover_the_buffer_without_overlap(numels, ranks):
    layout = BucketLayout(numels, ranks)
    bounds = [layout.shard_range(rank) for rank in range(ranks)]
    assert bounds[0][0] == 0 and bounds[-1][1] == layout.numel
    assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:], strict=False))


def test_example_of_the_docstring():
    layout = BucketLayout((6, 3, 1, 9, 4), 3, alignment=4)
    assert layout.offsets == (0, 8, 12, 16, 28)
    assert (layout.numel, layout.shard_numel) == (36, 12)
    assert layout.slices(0) == [ParamSlice(0, 0, 6, 0), ParamSlice(1, 0, 3, 8)]
    assert layout.slices(1) == [ParamSlice(2, 0, 1, 12), ParamSlice(3, 0, 8, 16)]
    assert layout.slices(2) == [ParamSlice(3, 8, 9, 24), ParamSlice(4, 0, 4, 28)]


def test_impossible_geometry_is_refused():
    for numels, ranks, alignment in (((3,), 0, 64), ((3,), 2, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            BucketLayout(numels, ranks, alignment)
    with pytest.raises(ValueError, match=r"parameter 1 at \[64, 62\) is misaligned or overlaps"):
        BucketLayout((3, -2), 2)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=r"shard_rank must be in \[0, 2\)"):
            BucketLayout((3,), 2).slices(rank)


def test_layout_is_a_value():
    assert BucketLayout((3, 4), 2) == BucketLayout((3, 4), 2) != BucketLayout((3, 4), 3)
    assert len({BucketLayout((3, 4), 2), BucketLayout((3, 4), 2)}) == 1


def test_bucket_of_4096_ranks_is_laid_out_in_moments():
    """A 7 B model's bucket for one rank of 4,096: integers only, nothing is allocated."""
    numels = tuple([4096 * 4096, 4096] * 50)
    start = time.process_time()
    layout = BucketLayout(numels, 4096)
    pieces = layout.slices(4095)
    assert time.process_time() - start < 0.1
    assert pieces[-1].param == 99 and layout.numel < sum(numels) * 1.01


def test_4096_ranks_share_every_element():
    numels = (1_000_003, 0, 17, 5_000_000, 64)
    layout = BucketLayout(numels, 4096)
    owned = [0] * len(numels)
    end = [0] * len(numels)
    for rank in range(4096):
        for piece in layout.slices(rank):
            assert piece.param_start == end[piece.param]
            end[piece.param] = piece.param_stop
            owned[piece.param] += piece.numel
    assert tuple(owned) == numels


# ---- packing


@given(
    params=st.lists(st.tuples(st.integers(0, 300), st.sampled_from("ab")), max_size=20),
    bucket_numel=st.integers(1, 400),
)
def test_packing_keeps_order_homogeneity_and_size(params, bucket_numel):
    numels, keys = [n for n, _ in params], [k for _, k in params]
    buckets = pack_into_buckets(numels, keys, bucket_numel)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(params)))
    assert [bucket[0] for bucket in buckets] == sorted(bucket[0] for bucket in buckets)
    for bucket in buckets:
        assert bucket == sorted(bucket)
        assert len({keys[i] for i in bucket}) == 1
        size = sum(numels[i] for i in bucket)
        assert size <= bucket_numel or sum(numels[i] > 0 for i in bucket) == 1
    for key in "ab":  # within a key, registration order is kept from bucket to bucket
        order = [i for bucket in buckets for i in bucket if keys[i] == key]
        assert order == sorted(order)


@given(numels=st.lists(st.integers(1, 300), min_size=1, max_size=20), bucket_numel=st.integers(1, 400))
def test_no_two_neighbours_would_fit_into_one_bucket(numels, bucket_numel):
    buckets = pack_into_buckets(numels, ["a"] * len(numels), bucket_numel)
    for first, second in zip(buckets, buckets[1:], strict=False):
        assert sum(numels[i] for i in first) + numels[second[0]] > bucket_numel


@given(total=st.integers(0, 10**12), ranks=st.integers(1, 4096))
def test_default_bucket_size_is_usable(total, ranks):
    numel = choose_bucket_numel(total, ranks)
    assert numel >= 1
    largest = max(1 << 27, ranks << 16)  # that a few may be in flight
    assert numel <= largest
    smallest = max(1 << 16, ranks << 14)  # below it only the latency counts
    assert numel >= smallest
    assert numel == largest or total <= 13 * numel  # 13 are enough
    assert numel == smallest or total > 13 * (numel - 1)  # and fewer are not


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_model_of_a_billion_parameters_has_13_buckets(ranks):
    numels = [1 << 18] * (13 * 320)  # 1.09 billion, in small parameters
    numel = choose_bucket_numel(sum(numels), ranks)
    assert len(pack_into_buckets(numels, [None] * len(numels), numel)) == 13


@given(value=st.integers(0, 10**9), multiple=st.integers(1, 10**6))
def test_round_up(value, multiple):
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0 and value <= rounded < value + multiple


def test_alignment_is_a_memory_transaction():
    assert ALIGNMENT * 2 >= 128  # bytes, of the narrowest dtype: triton's 128-bit loads need 16
