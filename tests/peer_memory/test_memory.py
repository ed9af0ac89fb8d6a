"""Collectives over memory that peers read: here ranks are threads, and each other's tensors are just there."""

import itertools
import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lion_dist import ShardedLion, ShardingConfig
from lion_dist.peer_memory import connect as peer_connect
from lion_dist.peer_memory import memory as peer_memory
from lion_dist.peer_memory import ordered_sum_triton
from lion_dist.peer_memory.memory import PeerBuffer, PeerMemory, Recording
from lion_dist.peer_memory.ordered_sum_triton import OrderedSum
from lion_dist.peer_memory.transport import RECEIVE_BUFFERS, PeerCopies
from lion_dist.sharding import collectives, process_groups
from lion_dist.sharding.layout import BucketLayout
from lion_dist.sharding.memory_format import MemoryFormat

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the kernel; interpreted on a CPU
DTYPES = [torch.float32, torch.bfloat16]
in_turn = threading.Lock()  # Triton's interpreter launches from one thread at a time


class Barrier:
    """The part of torch's handle that collectives use."""

    def __init__(self, ranks):
        self._barrier = threading.Barrier(ranks, timeout=30)

    def barrier(self, channel):
        assert channel == 0
        self._barrier.wait()


def on_ranks(flats, function):
    """``function(memory, buffer)`` on a thread a rank, whose buffers are ``flats``."""
    handle, failures = Barrier(len(flats)), []

    def run(rank):
        memory = PeerMemory.__new__(PeerMemory)
        memory.rank, memory.world_size, memory.device, memory._handle = rank, len(flats), DEVICE, handle
        try:
            function(memory, PeerBuffer(flats[rank], tuple(flats)))
        except BaseException as error:
            failures.append(error)
            handle._barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(flats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def in_rank_order(addends):
    total = addends[0].float()
    for addend in addends[1:]:
        total = total + addend.float()
    return total


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_gather_brings_every_owners_shard(ranks, dtype):
    torch.manual_seed(ranks)
    shards = torch.randn(ranks, 64).to(DEVICE, dtype)
    flats = [torch.full((ranks * 64,), torch.nan, dtype=dtype, device=DEVICE) for _ in range(ranks)]
    for rank, flat in enumerate(flats):
        flat[64 * rank : 64 * (rank + 1)] = shards[rank]
    on_ranks(flats, lambda memory, buffer: memory.all_gather(buffer))
    for flat in flats:
        assert torch.equal(flat, shards.flatten())


@pytest.fixture
def one_launch_at_a_time(monkeypatch):
    launch = OrderedSum.__call__

    def locked(*arguments, **options):
        with in_turn:
            launch(*arguments, **options)

    monkeypatch.setattr(OrderedSum, "__call__", locked)


SHAPES = [(3, 5), (64,), (), (0, 4), (130, 7), (2,)]  # with padding between them, and pieces of one on several ranks


class Reductions:
    """Reduce-scatters of one bucket, one after another, over memory in which ranks receive in turn."""

    def __init__(self, ranks, dtype, shapes=SHAPES, buffers=RECEIVE_BUFFERS):
        self.ranks, self.dtype, self.shapes = ranks, dtype, [torch.Size(shape) for shape in shapes]
        self.layout = BucketLayout(tuple(shape.numel() for shape in self.shapes), ranks)
        self.formats = [MemoryFormat.row_major(shape) for shape in self.shapes]
        room = (ranks - 1) * self.layout.shard_numel + 64  # longer than it must be, as the pool's for a small bucket
        flats = [torch.full((room,), torch.nan, dtype=dtype, device=DEVICE) for _ in range(buffers * ranks)]
        self.received = list(zip(*[iter(flats)] * ranks, strict=True))

    def run(self, grads_of, count=1, output_dtype=torch.float32, adds_up=False, pause=lambda: None):
        """``grads_of(rank, reduction)``; returns [reduction][rank] (output, squares)."""
        results = [[None] * self.ranks for _ in range(count)]

        def reduce(memory, _):
            push = PeerCopies(self.layout, self.formats, memory, self.dtype)
            output = torch.zeros(self.layout.shard_numel, dtype=output_dtype, device=DEVICE)
            buffers = itertools.cycle(
                SimpleNamespace(shared=PeerBuffer(flats[memory.rank], flats), flat=flats[memory.rank], views={})
                for flats in self.received
            )
            for reduction in range(count):
                pause()
                squares = push.squares().fill_(torch.nan)
                push(next(buffers), grads_of(memory.rank, reduction), output, squares, adds_up=adds_up)
                results[reduction][memory.rank] = output.clone(), squares

        on_ranks([torch.zeros(1)] * self.ranks, reduce)
        return results

    def expected(self, addends, dtype=torch.float32):
        """[ranks, shard_numel] of what every rank adds to each parameter, [rank][param]; padding is zeros."""
        flat = torch.zeros(self.layout.numel, device=DEVICE)
        for param, (offset, shape) in enumerate(zip(self.layout.offsets, self.shapes, strict=True)):
            of_ranks = [
                torch.zeros(shape, device=DEVICE) if grads[param] is None else grads[param].to(self.dtype).float()
                for grads in addends
            ]
            flat[offset : offset + shape.numel()] = in_rank_order(of_ranks).flatten()
        return flat.to(dtype).view(self.ranks, -1)


def draw_grads(rank, reduction, dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(100 * reduction + rank)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def assert_reduced(found, expected):
    for (output, squares), wanted in zip(found, expected, strict=True):
        assert torch.equal(output, wanted)
        torch.testing.assert_close(squares.sum(), wanted.double().square().sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("output_dtype", ["fp32", "of the wire"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_scatter_sums_in_fp32_in_rank_order(ranks, dtype, output_dtype, one_launch_at_a_time):
    """Padding stays zero, whatever lies in the memory that is received in."""
    if output_dtype == "of the wire" and dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("needs a CUDA GPU: Triton's interpreter truncates where it should round to bf16")
    reductions, output_dtype = Reductions(ranks, dtype), torch.float32 if output_dtype == "fp32" else dtype
    grads = [draw_grads(rank, 0, dtype) for rank in range(ranks)]
    (found,) = reductions.run(lambda rank, _: grads[rank], output_dtype=output_dtype)
    assert_reduced(found, reductions.expected(grads, output_dtype))


def test_ranks_whose_shard_is_padding_take_part(one_launch_at_a_time):
    reductions = Reductions(4, torch.float32, [(3,), (70,)])
    grads = [draw_grads(rank, 0, torch.float32, reductions.shapes) for rank in range(4)]
    (found,) = reductions.run(lambda rank, _: grads[rank])
    assert_reduced(found, reductions.expected(grads))


@pytest.mark.parametrize("ranks", [2, 4])
def test_missing_gradients_count_as_zeros(ranks, one_launch_at_a_time):
    """Other ones on each rank, and none at all on the last: what was received before must not be added again."""
    reductions = Reductions(ranks, torch.bfloat16)
    addends = [
        [
            [None if (param + rank) % 3 == reduction or rank == ranks - 1 else grad for param, grad in enumerate(grads)]
            for rank, grads in enumerate(draw_grads(rank, reduction, torch.bfloat16) for rank in range(ranks))
        ]
        for reduction in range(3)
    ]
    for found, grads in zip(reductions.run(lambda rank, k: addends[k][rank], count=3), addends, strict=True):
        assert_reduced(found, reductions.expected(grads))


ODD = {
    "of another dtype": lambda grad: grad.double().float(),
    "transposed": lambda grad: grad.t().contiguous().t() if grad.dim() == 2 else grad,
    "expanded": lambda grad: grad.flatten()[:1].expand(grad.shape) if grad.numel() and grad.dim() == 1 else grad,
    "not on 16 bytes": lambda grad: torch.cat([grad.flatten()[:1], grad.flatten()])[1:].view(grad.shape),
}


@pytest.mark.parametrize("odd", ODD)
def test_gradients_that_cannot_be_read_in_place_are_copied_first(odd, one_launch_at_a_time):
    reductions = Reductions(3, torch.bfloat16)
    grads = [list(map(ODD[odd], draw_grads(rank, 0, torch.bfloat16))) for rank in range(3)]
    (found,) = reductions.run(lambda rank, _: grads[rank])
    assert_reduced(found, reductions.expected(grads))


def test_further_micro_batches_are_added_in_fp32(one_launch_at_a_time):
    reductions = Reductions(3, torch.bfloat16)
    grads = [[draw_grads(rank, k, torch.bfloat16) for rank in range(3)] for k in range(3)]
    found = reductions.run(lambda rank, k: grads[k][rank], count=3, adds_up=True)
    total = torch.zeros(3, reductions.layout.shard_numel, device=DEVICE)
    for results, addends in zip(found, grads, strict=True):
        total = total + reductions.expected(addends)
        assert_reduced(results, total)


def test_a_rank_that_is_ahead_does_not_write_over_what_another_has_yet_to_sum(one_launch_at_a_time):
    reductions, rng = Reductions(4, torch.float32), random.Random(0)
    grads = [[draw_grads(rank, k, torch.float32) for rank in range(4)] for k in range(20)]
    pause = lambda: time.sleep(rng.choice([0, 0, 0.01]))  # noqa: E731
    found = reductions.run(lambda rank, k: grads[k][rank], count=20, pause=pause)
    for results, addends in zip(found, grads, strict=True):
        assert_reduced(results, reductions.expected(addends))


def test_a_collective_is_recorded_when_it_comes_again_and_replayed_from_then_on(monkeypatch):
    """Over other memory it is another one."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    done = []
    memory = PeerMemory.__new__(PeerMemory)
    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    memory._record = lambda queue, own: done.append("record") or Recording(graph, own)
    buffer = SimpleNamespace(flat=SimpleNamespace(is_cuda=True), recordings={})
    for what in (1, 1, 1, 2):
        memory.run(buffer, (what,), lambda: (lambda: done.append("queue"), None))
    assert done == ["queue", "record", "replay", "replay", "queue"]


def test_recordings_of_memory_that_moves_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    memory = PeerMemory.__new__(PeerMemory)
    buffer = SimpleNamespace(flat=SimpleNamespace(is_cuda=True), recordings={})
    for what in range(3 * peer_memory.MOST_RECORDINGS):
        memory.run(buffer, (what,), lambda: (lambda: None, None))
    assert len(buffer.recordings) <= peer_memory.MOST_RECORDINGS


def test_bytes_sent_are_what_peers_read():
    before = collectives.sent_bytes
    flats = [torch.zeros(4 * 64, device=DEVICE) for _ in range(4)]
    on_ranks(flats, lambda memory, buffer: memory.all_gather(buffer))
    assert collectives.sent_bytes - before == 4 * 3 * 64 * 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_squares_are_not_finite_where_a_gradient_is_not(value, one_launch_at_a_time):
    reductions = Reductions(2, torch.float32)
    grads = [draw_grads(rank, 0, torch.float32) for rank in range(2)]
    grads[1][4][129, 6] = value
    (found,) = reductions.run(lambda rank, _: grads[rank])
    assert not torch.stack([squares.sum() for _, squares in found]).sum().isfinite()


class Addends:
    """Of one shard, in pieces with padding after each, of which nobody may read."""

    def __init__(self, ranks, rank, numels, seed, dtype):
        starts = list(itertools.accumulate((-(-numel // 64) * 64 + 64 for numel in numels), initial=0))
        self.shard_numel, self.rank = starts.pop(), rank
        self.pieces = [slice(start, start + numel) for start, numel in zip(starts, numels, strict=True)]
        generator = torch.Generator().manual_seed(seed)
        self.of_ranks = torch.randn(ranks, self.shard_numel, generator=generator).to(DEVICE, dtype)
        self.of_ranks[:, self.pieces[-1].start] = -0.0
        self.own = [self.of_ranks[rank, piece].clone() for piece in self.pieces]
        self.others = torch.cat([self.of_ranks[:rank], self.of_ranks[rank + 1 :]])
        for piece in self.pieces:
            self.others[:, piece.stop : piece.stop + 64] = torch.nan

    def sum_into(self, output, adds_up=False):
        """Returns the squares."""
        ordered_sum = OrderedSum([(piece.start, piece.stop - piece.start) for piece in self.pieces], DEVICE)
        own = ordered_sum.table([piece.data_ptr() for piece in self.own])
        squares = ordered_sum.squares().fill_(torch.nan)
        ordered_sum(output, squares, self.others, own, self.rank, adds_up=adds_up)
        return squares

    def in_pieces(self, shard):
        return torch.cat([shard[piece] for piece in self.pieces])


SEEDS, WIRES = st.integers(0, 2**32 - 1), st.sampled_from(DTYPES)
NUMELS = st.lists(st.sampled_from([1, 64, 2047, 2048, 5000]), min_size=1, max_size=4)


@settings(max_examples=30)
@given(ranks=st.integers(2, 8), rank=st.integers(0, 7), numels=NUMELS, seed=SEEDS, dtype=WIRES)
def test_ordered_sum_is_the_sum_in_rank_order_whoever_computes_it(ranks, rank, numels, seed, dtype):
    """-0 stays -0, and nothing between pieces is read or written."""
    addends = Addends(ranks, rank % ranks, numels, seed, dtype)
    output = torch.full((addends.shard_numel,), 7.0, device=DEVICE)
    addends.sum_into(output)
    total, expected = in_rank_order(list(addends.of_ranks)), torch.full_like(output, 7.0)
    for piece in addends.pieces:
        expected[piece] = total[piece]
    assert torch.equal(output, expected) and output[addends.pieces[-1].start].signbit()


@settings(max_examples=30)
@given(rank=st.integers(0, 2), numels=NUMELS, seed=SEEDS, dtype=WIRES)
def test_further_micro_batches_are_added_to_the_sum_in_fp32(rank, numels, seed, dtype):
    addends = Addends(3, rank, numels, seed, dtype)
    earlier = torch.randn(addends.shard_numel, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    output = earlier.clone()
    addends.sum_into(output, adds_up=True)
    expected = earlier + in_rank_order(list(addends.of_ranks))
    assert torch.equal(addends.in_pieces(output), addends.in_pieces(expected))


@settings(max_examples=30)
@given(rank=st.integers(0, 2), numels=NUMELS, seed=SEEDS, dtype=WIRES, adds_up=st.booleans())
def test_squares_are_of_what_is_stored(rank, numels, seed, dtype, adds_up):
    """After rounding, and with the earlier micro-batches. Places beyond a piece's end count nothing."""
    addends = Addends(3, rank, numels, seed, dtype)
    output = torch.ones(addends.shard_numel, dtype=torch.float32 if adds_up else dtype, device=DEVICE)
    squares = addends.sum_into(output, adds_up=adds_up)
    expected = addends.in_pieces(output).double().square().sum()
    torch.testing.assert_close(squares.sum(), expected, rtol=1e-14, atol=0)


def test_a_rank_alone_has_nobody_to_read_from():
    layer = torch.nn.Linear(4, 4)
    ShardedLion(layer.parameters(), sharding=ShardingConfig(peer_memory=True)).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_that_reductions_launch_is_loaded_before_a_barrier_waits(dtype, monkeypatch):
    launched, real = set(), OrderedSum.__call__

    def launch(self, output, squares, others, own, rank, *, adds_up=False):
        real(self, output, squares, others, own, rank, adds_up=adds_up)
        launched.add((output.dtype, others.dtype, adds_up))

    monkeypatch.setattr(OrderedSum, "__call__", launch)
    ordered_sum_triton.load_kernels(dtype, 1, 3, torch.device("cpu"))
    assert launched == {(torch.float32, dtype, False), (torch.float32, dtype, True), (dtype, dtype, False)}


def test_gloo_ranks_use_no_peer_memory_and_say_why_when_they_are_to(gloo):
    gloo.run(2, ask_for_peer_memory)


def ask_for_peer_memory():
    group = dist.group.WORLD
    assert peer_connect.connect(group, torch.device("cpu"), None) is None
    assert peer_connect.connect(group, torch.device("cpu"), False) is None
    with pytest.raises(RuntimeError, match="peer_memory=True cannot be had.*gloo.*peer_memory=None"):
        peer_connect.connect(group, torch.device("cpu"), True)


class Ranks:
    """A group of two, as :func:`connect` sees it from the first; ``theirs`` is what the other says in turn."""

    def __init__(self, monkeypatch, theirs, visible=("gpu-a", "gpu-b"), reachable=True):
        self.theirs = list(theirs)
        device_of = lambda i: type("", (), {"uuid": visible[getattr(i, "index", i)]})  # noqa: E731
        monkeypatch.setattr(process_groups, "backend_for", lambda group, device: "nccl")
        monkeypatch.setattr(peer_connect, "_host", lambda: "here")
        monkeypatch.setattr(peer_memory, "PeerMemory", lambda group, device: "connected")
        monkeypatch.setattr(collectives, "gather_objects", lambda mine, group: [mine, self.theirs.pop(0)])
        monkeypatch.setattr(torch.cuda, "get_device_properties", device_of)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: reachable)

    def rank(self):
        return 0

    def connect(self, wanted=None):
        return peer_connect.connect(self, torch.device("cuda", 0), wanted)


def test_ranks_whose_gpus_reach_each_other_connect(monkeypatch, caplog):
    ranks = Ranks(monkeypatch, ["here", "gpu-b", None, None])
    assert ranks.connect() == "connected" and not ranks.theirs
    assert not caplog.records


def test_ranks_on_two_hosts_use_nccl_without_a_word(monkeypatch, caplog):
    assert Ranks(monkeypatch, ["elsewhere"]).connect() is None
    assert not caplog.records
    with pytest.raises(RuntimeError, match="the ranks are on 2 hosts"):
        Ranks(monkeypatch, ["elsewhere"]).connect(wanted=True)


@pytest.mark.parametrize(
    ("theirs", "settings", "reason"),
    [
        (["here", "gpu-a", None], {}, "several ranks share a GPU"),
        (["here", "gpu-b", None], {"visible": ["gpu-a"]}, "GPU gpu-b of another rank is hidden"),
        (["here", "gpu-b", None], {"reachable": False}, "cuda:0 cannot access the memory of cuda:1"),
        (["here", "gpu-b", "the other's reason"], {}, "the other's reason"),
        (["here", "gpu-b", None, "rank 1: no permission"], {}, "rank 1: no permission"),
    ],
)
def test_what_keeps_gpus_of_one_host_apart_is_logged_or_raised(theirs, settings, reason, monkeypatch, caplog):
    assert Ranks(monkeypatch, theirs, **settings).connect() is None
    assert reason in caplog.text and "Collectives run by NCCL" in caplog.text
    with pytest.raises(RuntimeError, match=reason):
        Ranks(monkeypatch, theirs, **settings).connect(wanted=True)


# ---- allocation


class InAPool:
    """A handle of torch 2.13 and newer: tensors come from a pool and begin somewhere in a larger allocation."""

    START = 24

    def __init__(self, ranks: int):
        self.allocations = [torch.ones(100) for _ in range(ranks)]

    def get_remote_tensor(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.allocations[rank][self.START : self.START + sizes[0]]

    def barrier(self, channel: int) -> None:
        pass


class WithoutPlaces(InAPool):
    """It tells where allocations begin, and not where the tensor lies in them."""

    get_remote_tensor = property()  # there is no such attribute

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.allocations[rank][: sizes[0]]


def allocating(handle: InAPool) -> PeerMemory:
    memory = object.__new__(PeerMemory)
    memory.rank, memory.world_size, memory._handle = 0, len(handle.allocations), handle
    memory._rendezvous = lambda numel, dtype: (InAPool.get_remote_tensor(handle, 0, (numel,), dtype), handle)
    return memory


def test_a_buffer_in_a_pool_is_found_where_it_lies():
    handle = InAPool(ranks=2)
    buffer = allocating(handle).allocate(16, torch.float32)
    for peer, allocation in zip(buffer.peers, handle.allocations, strict=True):
        assert peer.data_ptr() == allocation[InAPool.START :].data_ptr()
    assert buffer.flat.count_nonzero() == 0
    assert handle.allocations[0].sum() == 100 - 16  # nothing around it was written


def test_a_handle_that_knows_no_place_in_a_pool_is_refused():
    with pytest.raises(RuntimeError, match="mapped elsewhere"):
        allocating(WithoutPlaces(ranks=2)).allocate(16, torch.float32)
