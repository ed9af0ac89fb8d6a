"""Do all ranks still hold the same parameters? Checksums of what must be equal, gathered and compared.

Ranks hold copies of each bucket's parameters, and of frozen ones. A copy goes astray by faulty memory or a faulty link,
by code that writes parameters on one rank only, or because replicas of a shard were updated from different gradients.
Training goes on from it and no error says so.

Right is what the owner holds: of each shard the rank that updates it (in the first replica of a hybrid mesh), of frozen
parameters the first rank.

A checksum is a weighted sum of the words of memory modulo 2^64, ``sum(word[i] * weight[i])``, the weights pseudo-random
and odd. An odd weight is invertible, so one changed word always changes the sum; words that are swapped or changed
together escape with a probability of about 2^-32. Sums add up: a bucket's is the sum of its pieces'. So one short
message a rank is enough for the first look, ``[rank, own pieces of bucket 0, all of bucket 0, ...]``; only where it
finds a difference do ranks exchange the sums of all pieces, which were kept from the same moment, to name parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lion_dist.sharding import collectives
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.collectives import Work
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.process_groups import RankGroups, ShardGroups

Frozen = tuple[str, Tensor, ShardGroups]  # a parameter that is not trained: name, values, who holds it

CHUNK = 1 << 21  # words; bounds the temporaries to 48 MiB
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """``rank`` (global) holds other values than their owner of ``params``, pieces of ``where``."""

    rank: int
    where: str  # "bucket 3", "frozen parameters"
    params: tuple[str, ...]
    owners: tuple[int, ...]  # global ranks

    def __str__(self) -> str:
        named = ", ".join(map(repr, self.params[:4])) + (f" and {len(self.params) - 4} more" * (len(self.params) > 4))
        owners = ", ".join(map(str, self.owners))
        return f"rank {self.rank}, {self.where}: {named} (owned by rank {owners})"


class ReplicaError(RuntimeError):
    """Ranks hold different parameters. ``differences``: who, where and what."""

    def __init__(self, differences: Sequence[Difference]):
        self.differences = list(differences)
        listed = "; ".join(map(str, self.differences[:8])) + ("; ..." if len(self.differences) > 8 else "")
        super().__init__(
            f"ranks hold different parameters: {listed}. The owner's values count as right; where every rank but the "
            "owner is listed, it is the owner's memory that changed. resync_params() copies them to all ranks, or go "
            "back to a checkpoint. Usual causes: faulty memory, code that writes parameters on one rank only."
        )


@dataclass(frozen=True)
class Piece:
    """``flat[start:stop]`` belongs to parameter ``name`` and is right on ``owner`` (a shard rank)."""

    name: str
    start: int
    stop: int
    owner: int


class Holding:
    """Memory of which every rank has a copy, and the pieces of it that are compared; padding is in none."""

    def __init__(self, name: str, flat: Tensor, pieces: Sequence[Piece]):
        self.name, self.pieces = name, list(pieces)
        self.words = flat.view(WORDS.get(flat.element_size(), torch.uint8))
        to_device = lambda v: torch.tensor(v, dtype=torch.int64).to(flat.device, non_blocking=True)  # noqa: E731
        self.owners = to_device([piece.owner for piece in self.pieces])
        self._chunks = []  # (first word, positions of the pieces that reach into the chunk, where they begin and end)
        for first in range(0, self.words.numel(), CHUNK):
            cut = [(i, p.start - first, p.stop - first) for i, p in enumerate(self.pieces)]
            cut = [(i, max(start, 0), min(stop, CHUNK)) for i, start, stop in cut if start < CHUNK and stop > 0]
            if cut:
                self._chunks.append((first, *map(to_device, zip(*cut, strict=True))))

    @classmethod
    def of_bucket(cls, name: str, bucket: Bucket) -> Holding:
        layout, names = bucket.layout, bucket.names
        slices = [(owner, s) for owner in range(layout.shard_world_size) for s in layout.slices(owner)]
        pieces = [Piece(names[s.param], s.bucket_start, s.bucket_stop, owner) for owner, s in slices]
        return cls(name, bucket.flat_params, pieces)

    @classmethod
    def of_frozen(cls, name: str, tensor: Tensor) -> Holding:
        flat = tensor.detach().reshape(-1)
        return cls("frozen parameters", flat, [Piece(name, 0, flat.numel(), 0)])

    def checksums(self, weights: Tensor) -> Tensor:
        """[pieces] int64. ``weights``: :func:`make_weights` of CHUNK, or of all words where there are fewer."""
        result = torch.zeros(len(self.pieces), dtype=torch.int64, device=self.words.device)
        running = torch.zeros(min(CHUNK, self.words.numel()) + 1, dtype=torch.int64, device=self.words.device)
        for first, positions, starts, stops in self._chunks:
            words = self.words[first : first + CHUNK]
            torch.cumsum(words * weights[: words.numel()], 0, out=running[1 : words.numel() + 1])
            sums = running.index_select(0, stops) - running.index_select(0, starts)
            result.index_add_(0, positions, sums * _odd(first // CHUNK))
        return result


def _odd(i: int) -> int:
    """The i-th of a sequence of pseudo-random odd numbers, as a signed 64-bit integer (splitmix64)."""
    x = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    x = (x ^ (x >> 31)) | 1
    return x - 2**64 if x >= 2**63 else x


def make_weights(numel: int, device: torch.device) -> Tensor:
    """[numel] int64: ``_odd(i)`` for each i, by wrapping arithmetic on the device."""
    signed = lambda constant: constant - 2**64  # noqa: E731
    x = torch.arange(1, numel + 1, device=device) * signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * signed(0x94D049BB133111EB)
    return (x ^ ((x >> 31) & (2**33 - 1))) | 1


@dataclass
class _Look:
    """A first look under way, among the ranks of one group."""

    groups: ShardGroups
    holdings: list[Holding]
    checksums: list[Tensor]  # [pieces] int64 of each holding, on the device
    sent: Tensor  # kept until the gather is done
    rows: Tensor  # [ranks, 1 + 2 * holdings] int64, on the host once it is finished
    finish: Work


class ReplicaCheck:
    """Compares the copies, now or every K-th step without waiting.

    Args:
        groups: of the optimizer; buckets may have others (experts).
        every: :meth:`begin_step` starts a check in each ``every``-th step.
        told: all ranks that stop together: those of ``groups``, and those that hold other parts of the model.
    """

    def __init__(self, groups: ShardGroups, stream: CommStream, device: torch.device, every: int, told: RankGroups):
        self.groups, self.stream, self.device, self.every, self.told = groups, stream, device, every, told
        self._steps = 0
        self._under_way: list[_Look] = []
        self._known: dict[Bucket | str, Holding] = {}  # by bucket, or by name of a frozen parameter

    def begin_step(self, copies: Callable[[], tuple[Sequence[Bucket], Sequence[Frozen]]]) -> None:
        """All parameters are whole. Read what the last step's check found; start another when it is time.

        Reading costs no time worth measuring: the message is a step old, and the host is not that far ahead.
        """
        self._raise_what_is_found(self._under_way)
        self._steps += 1
        if self._steps % self.every == 0:
            self._under_way = self._look(*copies())

    def check(self, buckets: Sequence[Bucket], frozen: Sequence[Frozen]) -> None:
        """Compare now, and wait for the result. All ranks call it together.

        Raises:
            ReplicaError: on every rank.
        """
        self._raise_what_is_found(self._under_way)
        self._raise_what_is_found(self._look(buckets, frozen))

    # ---- the first look

    def _look(self, buckets: Sequence[Bucket], frozen: Sequence[Frozen]) -> list[_Look]:
        by_groups: dict[ShardGroups, list[Holding]] = {self.groups: []}
        for i, bucket in enumerate(buckets):
            if bucket not in self._known:
                self._known[bucket] = Holding.of_bucket(f"bucket {i}", bucket)
            by_groups.setdefault(bucket.groups, []).append(self._known[bucket])
        names = {name for name, *_ in frozen}
        for name in [key for key in self._known if isinstance(key, str) and key not in names]:
            del self._known[name]  # trained again, in the memory of a bucket
        for name, tensor, groups in frozen:
            known = self._known.get(name)
            if known is None or known.words.data_ptr() != tensor.data_ptr():
                known = self._known[name] = Holding.of_frozen(name, tensor)
            by_groups.setdefault(groups, []).append(known)
        longest = max((h.words.numel() for holdings in by_groups.values() for h in holdings), default=0)
        weights = make_weights(min(CHUNK, longest), self.device)
        return [self._look_among(groups, holdings, weights) for groups, holdings in by_groups.items()]

    def _look_among(self, groups: ShardGroups, holdings: list[Holding], weights: Tensor) -> _Look:
        checksums = [holding.checksums(weights) for holding in holdings]
        mine = torch.full((1,), _global_rank(), dtype=torch.int64, device=self.device)
        parts = [mine]
        for holding, sums in zip(holdings, checksums, strict=True):
            own = (sums * (holding.owners == groups.shard_rank)).sum()
            parts.append(torch.stack([own, sums.sum()]))
        sent = torch.cat(parts)
        with self.stream.fork():
            rows, finish = collectives.gather_rows(sent, groups.axes)
            if rows.is_cuda:
                on_host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
                on_host.copy_(rows, non_blocking=True)
                copied = self.stream.new_event()
                self.stream.record_event(copied)
                rows, finish = on_host, copied.event.synchronize
        return _Look(groups, holdings, checksums, sent, rows, finish)

    def _raise_what_is_found(self, looks: list[_Look]) -> None:
        self._under_way = []
        found = [difference for look in looks for difference in self._compare(look)]
        # Experts' groups, and those of one pipeline stage, know of their own differences only.
        if len(looks) > 1 or (looks and self.told.num_ranks > self.groups.num_ranks):
            everybody = _gather_objects(found, self.told)
            found = list(dict.fromkeys(difference for theirs in everybody for difference in theirs))
        if found:
            raise ReplicaError(sorted(found, key=lambda difference: (difference.rank, difference.where)))

    def _compare(self, look: _Look) -> list[Difference]:
        look.finish()
        rows = look.rows.view(look.groups.replicate_world_size, look.groups.shard_world_size, -1)
        own, full = rows[0, :, 1::2], rows[:, :, 2::2]
        wrong = (full != own.sum(0)).flatten(0, 1).any(0).tolist()
        places = [i for i, is_wrong in enumerate(wrong) if is_wrong]
        return list(self._second_look(look, places)) if places else []

    # ---- the second look

    def _second_look(self, look: _Look, places: list[int]) -> Iterator[Difference]:
        """Who differs in which parameters; every rank of the group arrives here."""
        mine = {i: look.checksums[i].tolist() for i in places}
        everybody = _gather_objects((_global_rank(), mine), look.groups)
        first_replica = everybody[: look.groups.shard_world_size]
        for rank, theirs in everybody:
            for i, sums in theirs.items():
                wrong = [
                    piece
                    for k, piece in enumerate(look.holdings[i].pieces)
                    if sums[k] != first_replica[piece.owner][1][i][k]
                ]
                if wrong:
                    names = dict.fromkeys(piece.name for piece in wrong)
                    owners = dict.fromkeys(first_replica[piece.owner][0] for piece in wrong)
                    yield Difference(rank, look.holdings[i].name, tuple(names), tuple(owners))


def _global_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather_objects(value: object, groups: RankGroups) -> list:
    """Every rank's, in the order of ``collectives.gather_rows``."""
    values = [value]
    for axis in groups.axes:
        values = [v for part in collectives.gather_objects(values, axis) for v in part]
    return values
