"""``TwoLevels``, which a program passes as ``process_group``, and what it becomes: the groups of both levels.

Shards are numbered by the place in the node first: rank ``l`` of node ``n`` of M has shard ``l * M + n``. So what one
rank of each node has together, M shards, is one piece of the flat buffer. Inside a node, ranks reduce and gather such
pieces; across nodes, they reduce and gather the shards of their own piece. Nothing is reordered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from lion_dist import values
from lion_dist.sharding import collectives
from lion_dist.sharding.collectives import Work
from lion_dist.sharding.process_groups import ShardGroups, resolve_groups


@dataclass(frozen=True)
class TwoLevels:
    """The data-parallel ranks, as nodes with ranks in them; all of them share the state.

    ::

        mesh = init_device_mesh("cuda", (nodes, 8), mesh_dim_names=("node", "local"))
        ShardedLion(..., process_group=TwoLevels(mesh))

    Args:
        mesh: 2-D with names, (nodes, ranks of a node); of a larger mesh the two axes, ``mesh["node", "local"]``.
    """

    mesh: DeviceMesh

    def __post_init__(self):
        mesh = self.mesh
        if not isinstance(mesh, DeviceMesh) or mesh.ndim != 2 or not mesh.mesh_dim_names:
            found = f"a mesh of axes {mesh.mesh_dim_names or mesh.ndim}" if isinstance(mesh, DeviceMesh) else None
            raise ValueError(
                f"TwoLevels takes a 2-D DeviceMesh with names, got {found or values.shown(mesh)}. Pass "
                "init_device_mesh(device, (nodes, ranks_per_node), mesh_dim_names=('node', 'local')), or these two "
                "axes of a larger mesh: mesh['node', 'local']."
            )

    def shard_groups(self) -> ShardGroups:
        """All ranks of the mesh together, the first time."""
        across, inside = (resolve_groups(self.mesh[name]).shard_group for name in self.mesh.mesh_dim_names or ())
        flat = self.mesh._flatten().get_group()
        if across is None or inside is None:
            return resolve_groups(flat)  # of one level
        return ShardGroups(flat, levels=LevelGroups(inside, across, tuple(self.mesh.mesh.t().flatten().tolist())))


@dataclass(frozen=True)
class LevelGroups:
    """The groups of both levels.

    Attributes:
        inside: the ranks of this node.
        across: the ranks with this one's place in every node.
        ranks: of both, global, in the order of their shards.
    """

    inside: ProcessGroup
    across: ProcessGroup
    ranks: tuple[int, ...]

    def of(self, own: Callable[[ProcessGroup], ProcessGroup]) -> LevelGroups:
        return LevelGroups(own(self.inside), own(self.across), self.ranks)

    def piece_of(self, flat: Tensor) -> Tensor:
        """What the ranks of ``across`` have together of ``flat`` [numel], a view."""
        return flat.view(self.inside.size(), -1)[self.inside.rank()]

    def all_gather(self, flat: Tensor, shard: Tensor) -> Work:
        """As ``collectives.all_gather``, across nodes first: each shard goes to each node once."""
        return self.gather_over(flat, shard, lambda piece: collectives.all_gather(flat, piece, self.inside))

    def gather_over(self, flat: Tensor, shard: Tensor, gather_inside: Callable[[Tensor], Work]) -> Work:
        """``gather_inside`` fills ``flat`` with the pieces of this node's ranks."""
        piece = self.piece_of(flat)
        first = collectives.all_gather(piece, shard, self.across)
        return _one_after_another(first, lambda: gather_inside(piece), flat.device)


def _one_after_another(first: Work, second: Callable[[], Work], device: torch.device) -> Work:
    """The ``Work`` of both; on a stream, the second is enqueued at once."""
    if device.type == "cuda":
        first()
        return second()

    def finish() -> None:
        first()
        second()()

    return finish
