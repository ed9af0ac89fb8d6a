"""The door to NCCL and gloo. (``peer_memory/`` is the other way between ranks.)

Each function starts a collective on the current stream (NCCL) or in the background (gloo) and returns what has yet to
be done: a callable that completes it. On a CUDA stream the rest is queued at once and the callable does nothing; on
gloo it waits on the host and finishes the arithmetic. A group of None is this rank alone: nothing moves.

Where the backend fails, the functions and what they return raise ``CollectiveError``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lion_dist.sharding.collective_error import attempt, explained

Work = Callable[[], None]  # completes what has been started; may be called once

# torch 2.13 renames them and warns at the old names; 2.11 has only those.
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

# gloo overlaps one all-to-all's messages poorly: 4 MiB of fp32 over 100 Mbit/s took 315 ms in one piece, 180 in four.
GLOO_CHUNKS = 4
GLOO_CHUNK_NUMEL = 1 << 14  # pieces below this are not worth a message of their own


sent_bytes = 0  # by this process since it began: what each algorithm must send to other ranks at the least


def count_sent(nbytes: int) -> None:
    """Add to ``sent_bytes``."""
    global sent_bytes
    sent_bytes += nbytes


def _completed() -> None:
    """Nothing is left to do."""


COMPLETED: Work = _completed


def reduce_scatter(
    output: Tensor,  # [shard_numel], this rank's part of the sum; fp32 when ordered
    flat: Tensor,  # [world_size * shard_numel], this rank's addend, in the dtype of the wire
    group: ProcessGroup | None,
    *,
    ordered: bool,
) -> Work:
    """Sum ``flat`` over the group and keep this rank's shard of it in ``output``.

    ``ordered`` sums in fp32 in rank order, ``((g0 + g1) + g2) + ...``: each rank receives the others' addends by an
    all-to-all, (world_size - 1) / world_size of the bytes of ``flat`` as any reduce-scatter, and adds them up. The
    backend's own sum is used otherwise. ``flat`` must stay as it is until the result is finished.
    """
    if group is None:
        output.copy_(flat)
        return COMPLETED
    count_sent(flat.nbytes - flat.nbytes // group.size())
    if ordered:
        return _ordered_reduce_scatter(output, flat, group)
    try:
        work = _reduce_scatter_single(output, flat, group=group, async_op=not flat.is_cuda)
    except RuntimeError as error:
        raise explained(error, "reduce_scatter", group) from error
    return _finish_of(work, "reduce_scatter", group)


def _ordered_reduce_scatter(output: Tensor, flat: Tensor, group: ProcessGroup) -> Work:
    world_size, shard_numel = group.size(), output.numel()
    addends = flat.view(world_size, shard_numel)
    chunks = 1 if flat.is_cuda else max(1, min(GLOO_CHUNKS, shard_numel // GLOO_CHUNK_NUMEL))
    pieces = []
    for part in _parts(shard_numel, chunks):
        send = addends[:, part].contiguous()  # the whole of flat, uncopied, when there is one chunk
        received = torch.empty_like(send)
        work = attempt(dist.all_to_all_single, received, send, group=group, async_op=not flat.is_cuda)
        pieces.append((part, received, send, work))

    def finish() -> None:
        while pieces:
            part, received, _send, work = pieces.pop(0)
            _finish_of(work, "all_to_all", group)()
            total = output[part].copy_(received[0])
            for addend in received[1:]:
                total.add_(addend)

    return _now_or_later(finish, flat)


def all_gather(flat: Tensor, shard: Tensor, group: ProcessGroup | None) -> Work:
    """Fill ``flat`` [world_size * shard_numel] with every rank's ``shard`` [shard_numel], which is a view of it."""
    if group is None:
        return COMPLETED
    count_sent((group.size() - 1) * shard.nbytes)
    try:
        work = _all_gather_single(flat, shard, group=group, async_op=not flat.is_cuda)
    except RuntimeError as error:
        raise explained(error, "all_gather", group) from error
    return _finish_of(work, "all_gather", group)


def all_reduce(tensor: Tensor, group: ProcessGroup | None) -> None:
    """Sum ``tensor`` over the group, in place, complete on return (on the current stream)."""
    if group is not None:
        count_sent(2 * (tensor.nbytes - tensor.nbytes // group.size()))
        attempt(dist.all_reduce, tensor, group=group)


def all_reduce_max(tensor: Tensor, group: ProcessGroup | None) -> None:
    """The greatest of every rank's ``tensor``, element by element; otherwise as :func:`all_reduce`."""
    if group is not None:
        count_sent(2 * (tensor.nbytes - tensor.nbytes // group.size()))
        attempt(dist.all_reduce, tensor, op=dist.ReduceOp.MAX, group=group)


def ordered_all_reduce(tensor: Tensor, group: ProcessGroup | None) -> None:
    """As :func:`all_reduce`, summing in rank order on every rank; for the replicate axis, whose groups are small."""
    if group is None:
        return
    gathered = tensor.new_empty(group.size() * tensor.numel())  # gloo gathers into 1-D only
    count_sent((group.size() - 1) * tensor.nbytes)
    attempt(_all_gather_single, gathered, tensor, group=group)
    addends = gathered.view(group.size(), -1)
    tensor.copy_(addends[0])
    for addend in addends[1:]:
        tensor.add_(addend)


def broadcast(tensor: Tensor, group: ProcessGroup | None) -> None:
    """``tensor`` of the group's first rank becomes everybody's."""
    if group is not None:
        attempt(dist.broadcast, tensor, group_src=0, group=group)


def gather_rows(row: Tensor, axes: Sequence[ProcessGroup]) -> tuple[Tensor, Work]:
    """Every rank's ``row`` [n], as [ranks, n]: the ranks of the first axis are next to each other.

    The result may be read when the ``Work`` has been called. With two axes the host waits for the first on gloo.
    """
    rows, finish = row.reshape(-1), COMPLETED
    for axis in axes:
        finish()
        gathered = rows.new_empty(axis.size() * rows.numel())
        finish = all_gather(gathered, rows, axis)
        rows = gathered
    return rows.view(-1, row.numel()), finish


def gather_objects(value: object, group: ProcessGroup | None) -> list[Any]:
    """Every rank's ``value``, in rank order."""
    if group is None:
        return [value]
    values: list[object] = [None] * group.size()
    attempt(dist.all_gather_object, values, value, group=group)
    return values


def _parts(numel: int, count: int) -> list[slice]:
    bounds = [numel * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _finish_of(work: dist.Work | None, collective: str, group: ProcessGroup) -> Work:
    if work is None:
        return COMPLETED

    def finish() -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise explained(error, collective, group) from error

    return finish


def _now_or_later(finish: Work, flat: Tensor) -> Work:
    if not flat.is_cuda:
        return finish
    finish()
    return COMPLETED
