"""Ranks that train one model must hold the same one: found out at construction, not at the first hang."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lion_dist.local_shard import LocalShard, local_tensor
from lion_dist.sharded_params import ShardedParams, own_label
from lion_dist.sharding import collectives
from lion_dist.sharding.memory_format import MemoryFormat

Entry = tuple[str, object]  # (what it is, its value)


def check_agreement(params: ShardedParams, choices: tuple, groups: list[dict]) -> None:
    """Raise ValueError on every rank unless ``groups`` and ``choices``, of the optimizer, are the same on all."""
    torch_release = torch.__version__.split("+")[0]  # builds for other devices compute alike
    settings: list[Entry] = [("torch", (torch_release,)), ("ShardedLion", tuple(map(str, choices)))]
    described = _described(params, groups)
    for axis in params.groups_for({}).axes:
        check_ranks_agree(settings + described, axis)
    if params.parts is not None and params.parts.tensor is not None:
        check_ranks_agree(settings + described, params.parts.tensor)
    if params.parts is not None and params.parts.pipeline is not None:  # whose stages have other parameters
        check_ranks_agree(settings, params.parts.pipeline)
    for group in groups:
        for axis in params.groups_for(group).axes if group.get("process_group") is not None else ():
            check_ranks_agree(_described(params, [group], with_names=True), axis)


def _described(params: ShardedParams, groups: list[dict], *, with_names: bool = False) -> list[Entry]:
    """What has to be the same on all ranks, as entries for ``check_ranks_agree``.

    ``with_names``: on the ranks of the groups' own ``process_group``, names count there too.
    """
    entries: list[Entry] = []
    for i, group in enumerate(groups):
        settings = [str(_number(group.get(key))) for key in ("lr", "betas", "weight_decay", "max_lr")]
        entries.append((f"param group {i}: lr, betas, weight_decay, max_lr", tuple(settings)))
        for j, (name, param) in enumerate(zip(params.names_of(group), group["params"], strict=True)):
            if group.get("process_group") is not None and not with_names:
                name = own_label(i, j)
            dims = MemoryFormat.of(local_tensor(param)).dims  # buffers are sent as they lie in memory
            order = () if dims is None else (f"in memory by dimensions {dims}",)
            order += tuple(f"placed {placement}" for placement in LocalShard.of(param).placements)
            entries.append((name, (tuple(param.shape), str(param.dtype), param.requires_grad, *order)))
    return entries


def _number(value):
    return value.tolist() if isinstance(value, Tensor) else value


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
