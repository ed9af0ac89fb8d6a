"""Ranks that train one model must hold the same one: found out at construction, not at the first hang."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch.distributed import ProcessGroup

from lion_dist.sharding import collectives

Entry = tuple[str, object]  # (what it is, its value)


def check_ranks_agree(entries: Sequence[Entry], group: ProcessGroup) -> None:
    """Raise ValueError on every rank of the group when one rank's ``entries`` differ from the first rank's.

    A digest goes around first; the entries themselves only when digests differ.
    """
    digest = hashlib.sha256(repr(list(entries)).encode()).hexdigest()
    digests = collectives.gather_objects(digest, group)
    if len(set(digests)) == 1:
        return
    everybody = collectives.gather_objects(list(entries), group)
    rank = next(i for i, d in enumerate(digests) if d != digests[0])
    raise ValueError(_difference(everybody[0], everybody[rank], rank))


def _difference(first: list[Entry], other: list[Entry], rank: int) -> str:
    remedy = "Build the same model, in the same order, with the same settings on every rank."
    for i, (mine, theirs) in enumerate(zip(first, other, strict=False)):
        if mine != theirs:
            where = f"rank {rank} differs from rank 0 at entry {i}"
            return f"{where}: {_say(theirs)} there, {_say(mine)} on rank 0. {remedy}"
    more, where = (first, "rank 0") if len(first) > len(other) else (other, f"rank {rank}")
    extra = more[min(len(first), len(other))]
    return f"rank {rank} differs from rank 0: only {where} has {_say(extra)}. {remedy}"


def _say(entry: Entry) -> str:
    name, value = entry
    return f"{name!r} = {', '.join(map(str, value))}"
