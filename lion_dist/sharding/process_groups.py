"""DeviceMesh | ProcessGroup | None -> the group that shares the shards and the group that replicates them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from lion_dist import values
from lion_dist.sharding import collectives
from lion_dist.sharding.collective_error import CollectiveError


@dataclass
class Progress:
    """How far one optimizer has come on this rank; for errors.

    Attributes:
        step: the one under way, from 1 on.
        is_lost: a collective has failed; ranks are at different places from then on.
    """

    step: int = 1
    is_lost: bool = False

    def explain(self, error: CollectiveError, what: str) -> None:
        """Add what this rank was doing."""
        error.during(what if error.is_explained else f"{what} in step {self.step}")
        self.is_lost = True


P = ParamSpec("P")
R = TypeVar("R")


def explained(call: str) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Decorates a method of an object that has a ``_progress``: errors of collectives inside name ``call``."""

    def decorate(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @functools.wraps(method)
        def within(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(self, *args, **kwargs)
            except CollectiveError as error:
                self._progress.explain(error, call)
                raise

        return within

    return decorate


class RankGroups(Protocol):
    """Ranks along some axes."""

    @property
    def axes(self) -> tuple[ProcessGroup, ...]:
        """The groups with more than one rank."""

    @property
    def num_ranks(self) -> int: ...


class Levels(Protocol):
    """The links of a shard group: ``inside`` a node, and across nodes (``two_levels/``). ``ranks``: global ones, in the
    order of their shards."""

    inside: ProcessGroup
    ranks: tuple[int, ...]

    def of(self, own: Callable[[ProcessGroup], ProcessGroup]) -> Levels:
        """The same over groups that ``own`` returns."""

    def all_gather(self, flat: torch.Tensor, shard: torch.Tensor) -> collectives.Work: ...


@dataclass(frozen=True)
class ShardGroups:
    """The ranks among which a bucket is sharded, and those that hold the same shard.

    ``None`` stands for a group of this rank alone: nothing is communicated, by the same code. Of a 2-D mesh the last
    axis shards and the first replicates (hybrid sharding: shard inside a node, replicate across). ``progress``: of the
    optimizer that uses them. ``levels``: of the shard group, where it has two (``two_levels/``).
    """

    shard_group: ProcessGroup | None
    replicate_group: ProcessGroup | None = None
    progress: Progress = field(default_factory=Progress, compare=False, repr=False)
    levels: Levels | None = None

    @property
    def shard_world_size(self) -> int:
        return 1 if self.shard_group is None else self.shard_group.size()

    @property
    def shard_rank(self) -> int:
        return 0 if self.shard_group is None else self.shard_group.rank()

    @property
    def replicate_world_size(self) -> int:
        return 1 if self.replicate_group is None else self.replicate_group.size()

    @property
    def replicate_rank(self) -> int:
        return 0 if self.replicate_group is None else self.replicate_group.rank()

    @property
    def num_ranks(self) -> int:
        return self.shard_world_size * self.replicate_world_size

    @property
    def is_first(self) -> bool:
        return self.shard_rank == self.replicate_rank == 0

    @property
    def axes(self) -> tuple[ProcessGroup, ...]:
        """The groups with more than one rank, the sharding one first."""
        return tuple(group for group in (self.shard_group, self.replicate_group) if group is not None)

    def all_gather(self, flat: torch.Tensor, shard: torch.Tensor) -> collectives.Work:
        """Fill ``flat`` with every shard, as ``collectives.all_gather``."""
        if self.levels is not None:
            return self.levels.all_gather(flat, shard)
        return collectives.all_gather(flat, shard, self.shard_group)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """The first rank's ``tensor`` becomes that of all ranks: along the shard axis, then the replicate axis."""
        whole = tensor.contiguous()  # gloo would take the wrong elements of another
        for axis in self.axes:
            collectives.broadcast(whole, axis)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)


def resolve_groups(where: DeviceMesh | ProcessGroup | None) -> ShardGroups:
    """Args: ``where``: None for all ranks (or this process alone when torch.distributed is not initialized).

    Raises:
        ValueError: a mesh of more than two axes, or a group that this rank is not a member of.
    """
    if where is None:
        return ShardGroups(_unless_alone(dist.group.WORLD) if dist.is_initialized() else None)
    if isinstance(where, DeviceMesh):
        if where.ndim > 2:
            raise ValueError(
                f"the mesh has {where.ndim} axes {where.mesh_dim_names}, but ShardedLion takes (replicate, shard). "
                "Pass the sub-mesh of its data-parallel axes, e.g. mesh['replicate', 'shard']."
            )
        groups = [_unless_alone(group) for group in where.get_all_groups()]
        return ShardGroups(groups[-1], groups[0] if len(groups) == 2 else None)
    if hasattr(where, "shard_groups"):  # TwoLevels
        return where.shard_groups()
    if not isinstance(where, ProcessGroup):
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise ValueError(
            f"process_group must be a ProcessGroup that this rank (global rank {rank}) belongs to, a "
            f"DeviceMesh or None, got {values.shown(where)}. torch.distributed.new_group returns a non-member marker "
            "on ranks outside the group: construct the optimizer on its members only."
        )
    return ShardGroups(_unless_alone(where))


def _unless_alone(group: ProcessGroup) -> ProcessGroup | None:
    return None if group.size() == 1 else group


def backend_for(group: ProcessGroup, device: torch.device) -> str:
    """``"gloo"``, ``"nccl"``, ``"fake"``, ...: what carries tensors on ``device`` in this group."""
    return dist.get_backend_config(group).split(f"{device.type}:")[-1].split(",")[0]
