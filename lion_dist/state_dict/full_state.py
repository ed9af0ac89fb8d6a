"""The optimizer state of all ranks on one: bucket by bucket for ``consolidate_state_dict``, tensor by tensor for torch.

``torch.distributed.checkpoint.state_dict`` with ``full_state_dict=True`` gathers what it takes for a ``DTensor``: it
asks for the tensor's placements, redistributes to ``Replicate`` and takes the local tensor. A ``GatherableTensor`` is
one for this purpose and for no other.
"""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from lion_dist.boxed_tensor import BoxedTensor, Part, read_box
from lion_dist.shard_state import ShardState
from lion_dist.sharding import collectives
from lion_dist.sharding.buffers import views_of
from lion_dist.sharding.process_groups import RankGroups
from lion_dist.state_dict.live_state import LiveState

_log = logging.getLogger(__name__)

# How long a rank waits for the others before it says whom it waits for, and before it gives up. Others may be late for
# good reasons (rank 0 writes a model first); where they do not come at all, they wait in a collective of their own.
SAYS_SO_AFTER = 30.0
GIVES_UP_AFTER = 600.0


# ---- one whole state on one rank


@dataclass
class Consolidated:
    """The whole state at one moment.

    Attributes:
        to: the rank that holds it.
        state_dict: on that rank; None on others.
    """

    to: int
    state_dict: dict | None
    _moment: tuple

    @classmethod
    def of(cls, live: LiveState, to: int) -> Consolidated:
        """Ranks that share a bucket with ``to`` call it together."""
        state, whole = gather_whole(live.shards, to), None
        if _rank() == to:
            _warn_of_own_groups(live)
            indexed = {i: state[param] for i, param in enumerate(live.params) if param in state}
            whole = {"state": indexed, "param_groups": live.whole_groups(), "counters": live.counters.cpu().clone()}
            whole |= {key: value.cpu().clone() for key, value in live.guard().items()}
        return cls(to, whole, _moment_of(live.param_groups, live.shards))

    def is_of(self, param_groups: Sequence[dict], shards: Sequence[ShardState]) -> bool:
        """Whether nobody has written the state since, or added parameters. Our own step says so itself."""
        return self._moment == _moment_of(param_groups, shards)


def _moment_of(param_groups: Sequence[dict], shards: Sequence[ShardState]) -> tuple:
    tensors = (flat for shard in shards for flat in shard.elementwise.values())
    return sum(len(group["params"]) for group in param_groups), *(tensor._version for tensor in tensors)


def _warn_of_own_groups(live: LiveState) -> None:
    groups = [group for group in live.param_groups if group.get("process_group") is not None]
    experts = [live.names[param] for group in groups for param in group["params"]]
    if experts:
        warnings.warn(
            f"lion_dist: parameters like {experts[0]!r} belong to a process_group of their own. The consolidated state "
            f"has those of rank {_rank()}'s groups; for the others consolidate to a rank of each and save its file.",
            stacklevel=4,
        )


def check_rank(to: object, groups: RankGroups) -> None:
    """Raise ValueError unless ``to`` is a global rank, of ``groups`` where that can be known."""
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(to, int) or isinstance(to, bool) or not 0 <= to < num_ranks:
        raise ValueError(f"consolidate_state_dict(to) must be a global rank in [0, {num_ranks}), got {to!r}")
    ranks = _ranks_of(groups.axes[0] if groups.axes else None)
    if len(groups.axes) <= 1 and to not in ranks:
        raise ValueError(
            f"consolidate_state_dict(to={to}): this optimizer is on the ranks {ranks}; "
            "give the global rank of one of them"
        )


def copied_containers(state_dict: dict) -> dict:
    """``state_dict`` in dicts and lists of its own: torch's functions change the ones that they are given."""
    state = {i: dict(kinds) for i, kinds in state_dict["state"].items()}
    groups = [group | {"params": list(group["params"])} for group in state_dict["param_groups"]]
    return {**state_dict, "state": state, "param_groups": groups}


def gather_whole(shards: Sequence[ShardState], to: int) -> dict[Parameter, dict[str, Tensor]]:
    """Every tensor of the state, in host memory of global rank ``to``; ``{}`` elsewhere.

    Ranks that share a bucket with ``to`` call it together. Each holds one bucket's tensor of one kind at a time.
    """
    state: dict[Parameter, dict[str, Tensor]] = {}
    for shard in shards:
        bucket = shard.bucket
        group = bucket.groups.shard_group
        if to not in _ranks_of(group) and shard.cut_group is None:
            continue
        for param, kind, full in _whole_tensors(shard):
            if _rank() == to:
                state.setdefault(param, {})[kind] = full.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return state


def _whole_tensors(shard: ShardState) -> Iterator[tuple[Parameter, str, Tensor]]:
    """Parameter, kind of state, full tensor; all ranks of the shard group iterate together."""
    bucket, group = shard.bucket, shard.bucket.groups.shard_group
    start, stop = bucket.layout.shard_range(bucket.groups.shard_rank)
    for kind, part in shard.elementwise.items():
        part = part.view(torch.bfloat16) if part.dtype == torch.int16 else part  # as in main_params.py
        flat = part.new_empty(bucket.layout.numel)
        flat[start:stop] = part
        bucket.groups.all_gather(flat, flat[start:stop])()
        held = zip(bucket.params, views_of(flat, bucket.layout, bucket.formats), shard.places, strict=True)
        for param, full, place in held:
            yield param, kind, full if shard.cut_group is None else place.put_together(full, shard.cut_group)
    if shard.steps is not None:
        steps = torch.zeros_like(shard.param_numels)
        steps[shard.slice_params] = shard.steps
        for axis in (group, shard.cut_group):
            collectives.all_reduce_max(steps, axis)  # those who own elements of a parameter count alike
        for param, step in zip(bucket.params, steps, strict=True):
            yield param, "step", step


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks_of(group: dist.ProcessGroup | None) -> list[int]:
    return [_rank()] if group is None else dist.get_process_group_ranks(group)


def meet(groups: RankGroups, what: str) -> None:
    """Wait until every rank of ``groups`` has called this, without a collective, which a rank alone would hang in (or
    another's next collective would answer).

    Raises:
        RuntimeError: ranks did not come within GIVES_UP_AFTER seconds, and which.
    """
    for axis in groups.axes:
        _meet(dist.get_process_group_ranks(axis), what)


def _meet(ranks: list[int], what: str) -> None:
    store = dist.distributed_c10d._get_default_store()
    base = f"lion_dist/{what}/{','.join(map(str, ranks))}"
    mine, count = f"{base}/{_rank()}", store.add(f"{base}/{_rank()}", 1)
    arrived = f"{base}/call {count}"
    store.add(arrived, 1)
    start, has_said_so, pause = time.monotonic(), False, 0.001
    while store.add(arrived, 0) < len(ranks):
        waited = time.monotonic() - start
        if waited > SAYS_SO_AFTER and not has_said_so:
            has_said_so = True
            _log.warning("%s", _waiting_for(store, base, ranks, count, what, waited))
        if waited > GIVES_UP_AFTER:
            message = _waiting_for(store, base, ranks, count, what, waited)
            store.add(arrived, -1)
            store.add(mine, -1)
            raise RuntimeError(message)
        time.sleep(pause)
        pause = min(0.1, 2 * pause)


def _waiting_for(store: dist.Store, base: str, ranks: list[int], count: int, what: str, waited: float) -> str:
    missing = [rank for rank in ranks if store.add(f"{base}/{rank}", 0) < count]
    return (
        f"rank {_rank()} has called {what}() {waited:.0f} s ago, and ranks {missing} of {ranks} have not. All ranks "
        "call it together, outside of any `if rank == 0:`; only saving what it returns is one rank's."
    )


# ---- what torch.distributed.checkpoint.state_dict can gather


def maker_of_parts(gatherable: bool) -> Callable[[ShardState], Callable[..., BoxedTensor]]:
    """Return, for each shard, what ``shard.state()`` makes tensors with: boxes that know whose they are."""
    meshes: dict[dist.ProcessGroup, DeviceMesh] = {}

    def boxed_for(shard: ShardState) -> Callable[..., BoxedTensor]:
        groups, tensor_class, mesh = shard.bucket.groups, BoxedTensor, None
        gathering = shard.cut_group if groups.shard_group is None else groups.shard_group
        if gatherable and gathering is not None:
            tensor_class = _gatherable_class()
            if gathering not in meshes:
                meshes[gathering] = DeviceMesh.from_group(gathering, shard.bucket.device.type)
            mesh = meshes[gathering]
        has_own_group = shard.group.get("process_group") is not None
        cut_group = None if gathering is shard.cut_group else shard.cut_group
        part = Part(*shard.owner, has_own_group, mesh=mesh, cut_group=cut_group)
        return functools.partial(tensor_class, part=part)

    return boxed_for


class Received:
    """Where torch's ``set_optimizer_state_dict(broadcast_from_rank0=True)`` puts the full tensor that it received."""

    full: Tensor | None = None

    def copy_(self, full: Tensor) -> None:
        self.full = full


@functools.cache
def _gatherable_class() -> type[BoxedTensor]:
    """Made when first needed: the import of ``DTensor`` takes 0.7 s."""
    from torch.distributed.tensor import DTensor, Replicate

    class GatherableTensor(BoxedTensor, DTensor):
        """Boxes that the ranks of ``part.mesh`` can put together. All of them call it together."""

        @property
        def device_mesh(self) -> DeviceMesh:
            return self.part.mesh

        @property
        def placements(self) -> tuple:
            return (Replicate(),)  # of what redistribute() returns and what a load takes: full tensors

        @functools.cached_property
        def received(self) -> Received:
            return Received()

        def to_local(self, **_options) -> Received:
            return self.received

        def full_tensor(self, **_options) -> Tensor:
            """The full tensor, on every rank. Ranks fill in their boxes and take the greatest of each byte, so that
            any dtype is moved as it is, and what several ranks hold counts once."""
            full = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            for box, local in self.boxes.items():
                read_box(full, box).copy_(local)
            for axis in (self.part.mesh.get_group(), self.part.cut_group):
                collectives.all_reduce_max(full.view(-1).view(torch.uint8), axis)
            return full

        def redistribute(self, device_mesh=None, placements=None, **_options) -> DTensor:
            if not all(placement.is_replicate() for placement in placements or self.placements):
                raise NotImplementedError(f"a part of ShardedLion's state can be gathered, not made {placements}")
            return DTensor.from_local(self.full_tensor(), self.device_mesh, self.placements, run_check=False)

    for name in ("to", "cpu", "clone", "detach"):  # torch 2.11 dispatches what is a DTensor past __torch_dispatch__
        setattr(GatherableTensor, name, functools.partialmethod(BoxedTensor.of_each_box, getattr(Tensor, name)))
    return GatherableTensor
