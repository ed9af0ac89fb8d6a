"""Process groups that one optimizer has to itself.

Collectives of one group are matched across ranks by the order in which each rank starts them, and what hooks start has
no order that a program could see: a branch of the model that some ranks do not take moves a reduction to the end of
their backward pass. In a group of its own that order is the optimizer's alone (``scheduler.py`` keeps it the same on
all ranks). In one group with others, gradients of one optimizer were summed with those of another, or ranks waited for
each other for ever: another ShardedLion in the same backward pass, or a model's own collective there.

A group is made by its members alone, for other ranks of the world may know nothing of it. ``dist.new_group`` cannot do
that safely: it wants all ranks of the world, or else names the group by the number of groups that a rank is in, which
differs between ranks and comes back when groups are destroyed. So the first rank draws a name.

Groups are borrowed. ``close()``, or the end of an optimizer that nobody has closed, gives them back, and the next
optimizer on the same ranks takes them over. To destroy a group that other ranks still read from would break it for
them, and optimizers end at different times on different ranks. A group is taken over only when every rank has it to
give, after equally many collectives. All of them end with the default group (``dist.destroy_process_group()``).
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from lion_dist.sharding import collectives
from lion_dist.sharding.collective_error import timeout_of
from lion_dist.sharding.process_groups import Progress, ShardGroups

# By the group whose ranks they have; they go when it does.
_free: WeakKeyDictionary[ProcessGroup, list[ProcessGroup]] = WeakKeyDictionary()


class OwnGroups:
    """The groups of one optimizer, made as they are asked for; all their ranks ask in one order.

    Args:
        owner: whose end gives them back.
        progress: of the owner; once a collective has failed they are not given to anybody.
    """

    def __init__(self, owner: object, progress: Progress):
        self._progress = progress
        self._borrowed: dict[tuple, ProcessGroup] = {}  # by whose ranks they have, and their order
        self._give_back = weakref.finalize(owner, _give_back, self._borrowed, progress)
        self._give_back.atexit = False

    def like(self, given: ShardGroups) -> ShardGroups:
        """Groups of the same ranks; the same ones whenever they are asked for."""
        if given.levels is not None:
            shard_group = self._own(given.shard_group, given.levels.ranks)
            return ShardGroups(shard_group, None, self._progress, given.levels.of(self._own))
        return ShardGroups(self._own(given.shard_group), self._own(given.replicate_group), self._progress)

    def _own(self, given: ProcessGroup | None, order: Sequence[int] | None = None) -> ProcessGroup | None:
        if given is None:
            return None
        ranks = tuple(dist.get_process_group_ranks(given) if order is None else order)
        if (given, ranks) not in self._borrowed:
            self._borrowed[given, ranks] = _borrow(given, ranks)
        return self._borrowed[given, ranks]

    def give_back(self) -> None:
        """Nothing that communicates may be called afterwards."""
        self._give_back()


def _give_back(borrowed: dict[tuple, ProcessGroup], progress: Progress) -> None:
    if not progress.is_lost:
        for (given, _), own in borrowed.items():
            _free.setdefault(given, []).append(own)


@dataclass(frozen=True)
class _Offer:
    """A group that a rank could give: its name, and the collectives that this rank has started in it."""

    name: str
    started: int


def _borrow(given: ProcessGroup, ranks: tuple[int, ...]) -> ProcessGroup:
    """All ranks of ``given`` together, in the order of ``ranks``."""
    is_pretended = dist.get_backend(given) == "fake"  # which does not count collectives
    alike = [group for group in _free.get(given, ()) if tuple(dist.get_process_group_ranks(group)) == ranks]
    free = {} if is_pretended else {_offer(group): group for group in alike}
    offers = collectives.gather_objects((f"lion_dist_{uuid.uuid4().hex}", list(free)), given)
    name, wanted = offers[0]
    for offer in wanted:
        if all(offer in theirs for _, theirs in offers):
            _free[given].remove(free[offer])
            return free[offer]
    return _make(given, ranks, name)


def _offer(group: ProcessGroup) -> _Offer:
    return _Offer(group.group_name, group._get_sequence_number_for_group())


def _make(given: ProcessGroup, ranks: tuple[int, ...], name: str) -> ProcessGroup:
    """Another group of the ranks of ``given``, in the order of ``ranks``, with its backends and its time-out.

    A default group that is bound to a GPU splits its communicator for each new group, by all ranks of the world. Where
    the group has fewer, it is given a communicator from scratch.
    """
    world = dist.group.WORLD
    bound = world.bound_device_id
    if len(ranks) < world.size():
        world.bound_device_id = None
    try:
        group, _ = distributed_c10d._new_process_group_helper(
            len(ranks),
            ranks.index(dist.get_rank()),
            list(ranks),
            dist.Backend(_backends(given)),
            distributed_c10d._get_default_store(),
            name,
            timeout=timeout_of(given),
            device_id=world.bound_device_id,
            group_desc=f"ShardedLion's own, of {given.group_desc or given.group_name}",
        )
    finally:
        world.bound_device_id = bound
    distributed_c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    return group  # pyrefly: ignore[bad-return] # this rank is a member


def _backends(group: ProcessGroup) -> str:
    """Return the backends as ``init_process_group`` takes them: "gloo", or "cpu:gloo,cuda:nccl"."""
    backend, _ = distributed_c10d._world.pg_map[group]
    return str(backend)
