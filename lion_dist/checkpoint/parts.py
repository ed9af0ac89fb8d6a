"""Jobs in which a rank holds a part of the model (pipeline stages, experts): what all ranks hold together.

Each rank says of every parameter that it has how many ranks hold it. What is called alike on exactly that many ranks is
one tensor; called alike on more, it would be a mixture of several, and is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from lion_dist.checkpoint.errors import CheckpointError
from lion_dist.checkpoint.ranks import Ranks
from lion_dist.checkpoint.sharded_state import ShardedState, descriptions

Described = dict[str, tuple[str, int]]  # of each parameter, what must be equal on all ranks that have it; how many have


def join_parts(state: ShardedState, ranks: Ranks, *, with_contents: bool) -> None:
    """Let ``state`` know what other ranks hold: param groups become those of all. All ranks call it together.

    Args:
        with_contents: parameters that several ranks hold whole must be equal.

    Raises:
        CheckpointError: on every rank; ranks hold different tensors under one name.
    """
    if ranks.size == 1:
        return
    words = descriptions(state, with_contents)
    mine = {name: (words[name], param.num_ranks or ranks.size) for name, param in state.params.items()}
    digest = hashlib.blake2b(json.dumps(mine, sort_keys=True).encode()).digest()
    is_whole = all(count == ranks.size for _, count in mine.values())
    if set(ranks.gather((digest, is_whole))) == {(digest, True)}:
        if not ranks.is_first:
            state.own_buffers = set()  # they may differ between ranks: all are the first one's, not a mixture
        return
    described = ranks.gather(mine)
    if not any(count != ranks.size for theirs in described for _, count in theirs.values()):
        if with_contents:
            _refuse_mixture(described)
        return  # of models that differ, each rank says what does not fit
    _check_counts(described)
    _take_over(state, ranks.gather((state.param_groups, state.tied, list(state.buffers))), described, ranks.rank)


def _check_counts(described: Sequence[Described]) -> None:
    holders: dict[str, list[int]] = {}
    for rank, theirs in enumerate(described):
        for name in theirs:
            holders.setdefault(name, []).append(rank)
    for name, having in holders.items():
        words, count = described[having[0]][name]
        for rank in having[1:]:
            if described[rank][name] != (words, count):
                raise CheckpointError(_mixture(name, words, having[0], described[rank][name][0], rank))
        if len(having) != count:
            raise CheckpointError(
                f"{name!r} belongs to {count} of {len(described)} ranks (a process_group of its own), and the ranks "
                f"{having} have a parameter of this name: other ranks may hold another one, and a checkpoint cannot "
                "tell them apart. Give each expert a name of its own, such as 'experts.3.weight'; let them be DTensors "
                "over the ranks that divide them (ModelParallel(expert=...)); or save them by yourself."
            )


def _refuse_mixture(described: Sequence[Described]) -> None:
    first = described[0]
    for rank, other in enumerate(described):
        for name in first | other:
            if first.get(name) != other.get(name):
                here, there = first.get(name, ("not there",))[0], other.get(name, ("not there",))[0]
                more = sum(first.get(key) != other.get(key) for key in first | other) - 1
                raise CheckpointError(_mixture(name, here, 0, there, rank, more))


def _mixture(name: str, here: str, first: int, there: str, rank: int, more: int = 0) -> str:
    return (
        f"ranks hold different tensors under one name, of which a checkpoint would be a mixture: {name!r} is {here} on "
        f"rank {first}, {there} on rank {rank}{f', and {more} more differ' if more else ''}. Parts of a model that "
        "ranks train apart (pipeline stages, experts, tensor parallel by hand) must be DTensors, or be told to "
        "ShardedLion(model_parallel=...), or be saved by yourself; replicas that have drifted apart must be made equal "
        "first."
    )


def _take_over(state: ShardedState, parts: Sequence[tuple], described: Sequence[Described], rank: int) -> None:
    groups = [dict(group, params={}) for group in parts[0][0]]
    for other, (theirs, tied, _) in enumerate(parts):
        settings = [{k: v for k, v in group.items() if k != "params"} for group in theirs]
        if settings != [{k: v for k, v in group.items() if k != "params"} for group in groups]:
            raise CheckpointError(
                f"the param groups of rank {other} are {settings}, other than those of rank 0: {len(groups)} groups. "
                "Every part of a model must have the same param groups, in the same order, if only with other "
                "parameters in them."
            )
        for group, members in zip(groups, theirs, strict=True):
            group["params"] |= dict.fromkeys(members["params"])
        state.tied |= tied
    state.param_groups = [dict(group, params=list(group["params"])) for group in groups]
    seen = {name for *_, buffers in parts[:rank] for name in buffers}
    state.own_buffers = state.buffers.keys() - seen
    everything = {name for theirs in described for name in theirs} | {name for *_, names in parts for name in names}
    state.elsewhere = everything - state.params.keys() - state.buffers.keys()
