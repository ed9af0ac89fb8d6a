"""Collectives over memory that peers read: here ranks are threads, and each other's tensors are just there."""

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lion_dist import ShardedLion, ShardingConfig
from lion_dist.sharding import collectives, peer_memory
from lion_dist.sharding.ordered_sum_triton import ordered_sum, squares_for
from lion_dist.sharding.peer_memory import PeerBuffer, PeerMemory

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
        memory.rank, memory.world_size, memory._handle = rank, len(flats), handle
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


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_scatter_sums_in_fp32_in_rank_order(ranks, dtype, monkeypatch):
    """The buffer is longer than what is summed, as the pool's is for a small bucket."""
    torch.manual_seed(ranks)
    shard_numel = 192
    flats = [torch.randn(ranks * shard_numel + 64).to(DEVICE, dtype) for _ in range(ranks)]
    outputs = [torch.full((shard_numel,), torch.nan, device=DEVICE) for _ in range(ranks)]

    def one_at_a_time(*arguments, **options):
        with in_turn:
            ordered_sum(*arguments, **options)

    monkeypatch.setattr("lion_dist.sharding.ordered_sum_triton.ordered_sum", one_at_a_time)

    def reduce(memory, buffer):
        addends = torch.empty(memory.addends_numel(len(buffer.flat)), dtype=dtype, device=DEVICE)
        squares = squares_for(shard_numel, DEVICE)
        memory.reduce_scatter(outputs[memory.rank], squares, buffer, addends, adds_up=False)

    on_ranks(flats, reduce)
    expected = in_rank_order([flat[: ranks * shard_numel] for flat in flats]).view(ranks, -1)
    for output, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(output, wanted)


def test_a_collective_is_recorded_when_it_comes_again_and_replayed_from_then_on(monkeypatch):
    """Over other memory it is another one."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    done = []
    memory = PeerMemory.__new__(PeerMemory)
    memory._record = lambda queue: done.append("record") or SimpleNamespace(replay=lambda: done.append("replay"))
    buffer = SimpleNamespace(flat=SimpleNamespace(is_cuda=True), recordings={})
    for what in (1, 1, 1, 2):
        memory._run(buffer, (what,), lambda: done.append("queue"))
    assert done == ["queue", "record", "replay", "replay", "queue"]


def test_recordings_of_memory_that_moves_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    memory = PeerMemory.__new__(PeerMemory)
    buffer = SimpleNamespace(flat=SimpleNamespace(is_cuda=True), recordings={})
    for what in range(3 * peer_memory.MOST_RECORDINGS):
        memory._run(buffer, (what,), lambda: None)
    assert len(buffer.recordings) <= peer_memory.MOST_RECORDINGS


def test_bytes_sent_are_what_peers_read():
    before = collectives.sent_bytes
    flats = [torch.zeros(4 * 64, device=DEVICE) for _ in range(4)]
    on_ranks(flats, lambda memory, buffer: memory.all_gather(buffer))
    assert collectives.sent_bytes - before == 4 * 3 * 64 * 4


def draw_addends(ranks, rank, numel, seed, dtype=torch.float32):
    """[ranks, numel]; this rank's own; the others'."""
    generator = torch.Generator().manual_seed(seed % 2**32)
    addends = torch.randn(ranks, numel, generator=generator).to(DEVICE, dtype)
    addends[:, 0] = -0.0
    return addends, addends[rank].clone(), torch.cat([addends[:rank], addends[rank + 1 :]])


NUMELS = st.sampled_from([1, 64, 2048, 5000])


@settings(max_examples=30)
@given(ranks=st.integers(2, 8), rank=st.integers(0, 7), numel=NUMELS, seed=st.integers(0))
def test_ordered_sum_is_the_sum_in_rank_order_whoever_computes_it(ranks, rank, numel, seed):
    addends, own, others = draw_addends(ranks, rank % ranks, numel, seed)
    output = torch.full((numel,), torch.nan, device=DEVICE)
    ordered_sum(output, squares_for(numel, DEVICE), own, others, rank % ranks)
    expected = in_rank_order(list(addends))
    assert torch.equal(output, expected) and output[0].signbit()


@settings(max_examples=30)
@given(rank=st.integers(0, 2), numel=NUMELS, seed=st.integers(0), dtype=st.sampled_from(DTYPES))
def test_further_micro_batches_are_added_to_the_sum_in_fp32(rank, numel, seed, dtype):
    addends, own, others = draw_addends(3, rank, numel, seed, dtype)
    earlier = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    output = earlier.clone()
    ordered_sum(output, squares_for(numel, DEVICE), own, others, rank, adds_up=True)
    assert torch.equal(output, earlier + in_rank_order(list(addends)))


@settings(max_examples=30)
@given(rank=st.integers(0, 2), numel=NUMELS, seed=st.integers(0), dtype=st.sampled_from(DTYPES), adds_up=st.booleans())
def test_squares_are_of_what_is_stored(rank, numel, seed, dtype, adds_up):
    """After rounding, and with the earlier micro-batches. Places beyond the last block's end count nothing."""
    _, own, others = draw_addends(3, rank, numel, seed, dtype)
    output = torch.ones(numel, dtype=torch.float32 if adds_up else dtype, device=DEVICE)
    squares = squares_for(numel, DEVICE).fill_(torch.nan)
    ordered_sum(output, squares, own, others, rank, adds_up=adds_up)
    torch.testing.assert_close(squares.sum(), output.double().square().sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_squares_are_not_finite_where_a_gradient_is_not(value):
    _, own, others = draw_addends(2, 0, 5000, 0)
    own[4321] = value
    squares = squares_for(5000, DEVICE)
    ordered_sum(torch.empty_like(own), squares, own, others, 0)
    assert not squares.sum().isfinite()


def test_a_rank_alone_has_nobody_to_read_from():
    layer = torch.nn.Linear(4, 4)
    ShardedLion(layer.parameters(), sharding=ShardingConfig(peer_memory=True)).close()


def test_gloo_ranks_use_no_peer_memory_and_say_why_when_they_are_to(gloo):
    gloo.run(2, ask_for_peer_memory)


def ask_for_peer_memory():
    group = dist.group.WORLD
    assert peer_memory.connect(group, torch.device("cpu"), None) is None
    assert peer_memory.connect(group, torch.device("cpu"), False) is None
    with pytest.raises(RuntimeError, match="peer_memory=True cannot be had.*gloo.*peer_memory=None"):
        peer_memory.connect(group, torch.device("cpu"), True)


class Ranks:
    """A group of two, as :func:`connect` sees it from the first; ``theirs`` is what the other says in turn."""

    def __init__(self, monkeypatch, theirs, visible=("gpu-a", "gpu-b"), reachable=True):
        self.theirs = list(theirs)
        device_of = lambda i: type("", (), {"uuid": visible[getattr(i, "index", i)]})  # noqa: E731
        monkeypatch.setattr(peer_memory, "backend_for", lambda group, device: "nccl")
        monkeypatch.setattr(peer_memory, "_host", lambda: "here")
        monkeypatch.setattr(peer_memory, "PeerMemory", lambda group, device: "connected")
        monkeypatch.setattr(collectives, "gather_objects", lambda mine, group: [mine, self.theirs.pop(0)])
        monkeypatch.setattr(torch.cuda, "get_device_properties", device_of)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: reachable)

    def rank(self):
        return 0

    def connect(self, wanted=None):
        return peer_memory.connect(self, torch.device("cuda", 0), wanted)


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
