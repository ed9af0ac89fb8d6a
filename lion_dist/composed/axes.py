"""The model-parallel axes of a ``ShardedLion``: what its ranks ask of those that hold other parts of the model.

Along ``tensor`` ranks hold the same parameters, cut or whole, and agree about everything. Along ``pipeline`` they hold
others, and share the norm of the gradients and what follows from it: one factor, one verdict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from lion_dist import values
from lion_dist.composed.model_parallel import ModelParallel
from lion_dist.composed.places import ModelPlace, checksum
from lion_dist.local_shard import LocalShard, local_tensor
from lion_dist.sharding import collectives
from lion_dist.sharding.grad_norm import GradNorm, SumOfSquares
from lion_dist.sharding.process_groups import ShardGroups, resolve_groups

if TYPE_CHECKING:
    from lion_dist.optional_guards import BorrowedGroups


@dataclass(frozen=True)
class JoinedGroups:
    """Ranks of several axes, for what asks for no more than that."""

    axes: tuple[ProcessGroup, ...]
    times: int = 1  # there are so many of them, along an axis with other ranks between

    @property
    def num_ranks(self) -> int:
        count = self.times
        for axis in self.axes:
            count *= axis.size()
        return count


class ModelAxes:
    """Args: ``given``: by the program; its groups are used until :meth:`take_own_groups`."""

    def __init__(self, given: ModelParallel):
        remedy = "Pass lion_dist.ModelParallel(tensor=mesh['tp'], pipeline=mesh['pp']), for example."
        values.instance("model_parallel", given, ModelParallel, remedy)
        self._given = given
        tensor, pipeline, expert = (
            None if where is None else resolve_groups(where).shard_group
            for where in (given.tensor, given.pipeline, given.expert)
        )
        self._groups, self._expert = ShardGroups(tensor, pipeline), expert
        self._has_dtensors = False
        self._places: dict[Parameter, ModelPlace] = {}
        self._names: dict[Parameter, str] = {}
        self.tied_names: dict[Parameter, str] = {}  # of parameters that an earlier stage has too, the name there
        self._stages_with: dict[str, int] = {}  # how many have the parameter of this label
        self._labels = {name: label for label, name in given.tied.items()}

    @property
    def tensor(self) -> ProcessGroup | None:
        return self._groups.shard_group

    @property
    def pipeline(self) -> ProcessGroup | None:
        return self._groups.replicate_group

    def take_own_groups(self, own: BorrowedGroups) -> None:
        """All ranks together: of one axis, and of the next."""
        self._groups = own.like(self._groups)
        self._expert = own.like(ShardGroups(self._expert)).shard_group

    def alike(self, groups: ShardGroups) -> JoinedGroups:
        """The ranks that train the same parameters as this one: data-parallel and tensor-parallel ones."""
        return JoinedGroups((*groups.axes, *(() if self.tensor is None else (self.tensor,))))

    def holders(self, param: Parameter | None, groups: ShardGroups) -> JoinedGroups:
        """The ranks that hold parts or copies of ``param``, which ``groups`` share; None: of another parameter."""
        axes = list(self.alike(groups).axes)
        if param is not None:
            cut = self.cut_group(param)
            axes += [] if cut is None or cut in axes else [cut]
            label = self._labels.get(self._names.get(param))
            return JoinedGroups(tuple(axes), self._stages_with.get(label, 1))
        return JoinedGroups(tuple(axes))

    def all_ranks(self, groups: ShardGroups) -> JoinedGroups:
        return JoinedGroups((*groups.axes, *self._groups.axes))

    def check_consolidation(self) -> None:
        """Raise RuntimeError where no rank can have the whole state."""
        if self.pipeline is not None:
            raise RuntimeError(
                "consolidate_state_dict() gathers the state of one model, and each pipeline stage has another part of "
                "it, with parameters numbered from 0. Save with lion_dist.checkpoint, which goes by name and holds all "
                "stages."
            )

    # ---- parameters

    def note_kinds(self, params: Sequence[Parameter]) -> None:
        """Before :meth:`add` of any of them."""
        self._has_dtensors |= any(LocalShard.of(param).is_dtensor for param in params)

    def check(self, name: str, param: Parameter) -> ModelPlace:
        """Where ``param`` lies in the whole model. TypeError or ValueError where that is not known, or not possible."""
        label = self._labels.get(name)
        place = self._place_of(name, param)
        is_first = self.tensor is None or self.tensor.rank() == 0
        return dataclasses.replace(place, is_tied=label is not None, is_counted=place.is_cut or is_first)

    def add(self, name: str, param: Parameter) -> ModelPlace:
        self._places[param], self._names[param] = self.check(name, param), name
        return self._places[param]

    def _place_of(self, name: str, param: Parameter) -> ModelPlace:
        if LocalShard.of(param).is_dtensor:
            self._check_mesh(name, param)
            return ModelPlace.of_dtensor(param)
        if self.tensor is None:
            return ModelPlace.of_whole(param)
        if self._given.cut_dim is None:
            if not self._has_dtensors:
                raise ValueError(
                    f"parameter {name!r} is a plain tensor, and whether the {self.tensor.size()} tensor-parallel ranks "
                    "hold parts of it or copies is not known. Pass ModelParallel(cut_dim=...), a function of name and "
                    "parameter that returns the dimension that is cut, or None for a copy."
                )
            return ModelPlace.of_whole(param)
        dim = self._given.cut_dim(name, param)
        if dim is None:
            return ModelPlace.of_whole(param)
        if isinstance(dim, bool) or not isinstance(dim, int) or not -param.ndim <= dim < param.ndim:
            raise ValueError(
                f"cut_dim({name!r}, ...) must be a dimension of a tensor of shape {tuple(param.shape)} or None, got "
                f"{dim!r}"
            )
        return ModelPlace.of_part(param, dim % param.ndim, self.tensor.rank(), self.tensor.size())

    def _check_mesh(self, name: str, param: Parameter) -> None:
        mesh = LocalShard.of(param).mesh
        ranks = mesh.mesh.flatten().tolist()
        if mesh.ndim != 1 or (len(ranks) > 1 and self._axis_of(ranks) is None):
            raise ValueError(
                f"parameter {name!r} is a DTensor over {mesh}, which is none of the axes of "
                "ModelParallel: pass tensor=mesh['tp'], or expert=mesh['ep'], as parallelize_module() was given it. "
                "For parameters that FSDP2 shards use lion_dist.Lion."
            )

    def _axis_of(self, ranks: list[int]) -> ProcessGroup | None:
        axes = (axis for axis in (self.tensor, self._expert) if axis is not None)
        return next((axis for axis in axes if dist.get_process_group_ranks(axis) == ranks), None)

    def cut_group(self, param: Parameter) -> ProcessGroup | None:
        """The ranks that hold the other parts of ``param``; None: this one holds it whole."""
        if not self._places[param].is_cut:
            return None
        mesh = LocalShard.of(param).mesh
        if mesh is not None:
            return self._axis_of(mesh.mesh.flatten().tolist())
        return self.tensor

    def place(self, param: Parameter) -> ModelPlace:
        return self._places[param]

    def bucket_key(self, param: Parameter) -> tuple:
        """Parameters of one bucket have it in common. It is the same along ``tensor``, as all buckets are."""
        return self._places[param].is_cut, self._places[param].is_tied

    def largest_numel(self, param: Parameter) -> int:
        """Elements that any rank along ``tensor`` holds of ``param``."""
        group, numel = self.cut_group(param), self._places[param].shape.numel()
        return numel if group is None else -(-numel // group.size())

    def is_counted(self, param: Parameter) -> bool:
        return self._places[param].is_counted

    def copies(self) -> list[tuple[str, Tensor, ShardGroups]]:
        """What ranks along ``tensor`` hold alike, as ``observers.copies_of``."""
        if self.tensor is None:
            return []
        groups = ShardGroups(self.tensor)
        return [(self._names[p], local_tensor(p), groups) for p, place in self._places.items() if not place.is_cut]

    # ---- construction

    def number(self, starts: dict[Parameter, int], names: Mapping[Parameter, str], numel: int) -> None:
        """Number the elements of all stages one after another, tied ones once; the first stage that has one counts it.

        Args:
            starts: of each parameter in this stage, from 0; changed.
            numel: elements in this stage.
        """
        if self.pipeline is None:
            return
        mine = {label: (starts[param], name) for param, name in names.items() if (label := self._labels.get(name))}
        unknown = [name for name in self._labels if name not in names.values()]
        stages = collectives.gather_objects((numel, mine, unknown), self.pipeline)
        for stage, (_, _, theirs) in enumerate(stages):
            if theirs:
                raise ValueError(
                    f"tied names {theirs[0]!r} on pipeline stage {stage}, which has no such parameter. Pass the name "
                    "that the parameter has on that stage."
                )
        rank, first = self.pipeline.rank(), 0
        owners: dict[str, tuple[int, int, str]] = {}
        firsts = []
        for stage, (count, tied, _) in enumerate(stages):
            firsts.append(first)
            for label, (start, name) in tied.items():
                owners.setdefault(label, (stage, first + start, name))
                self._stages_with[label] = self._stages_with.get(label, 0) + 1
            first += count
        for param, name in names.items():
            stage, start, first_name = owners.get(self._labels.get(name), (rank, firsts[rank] + starts[param], name))
            starts[param] = start
            if first_name != name:
                self.tied_names[param] = first_name
            if stage != rank:
                self._places[param] = dataclasses.replace(self._places[param], is_counted=False)

    def check_copies(self, names: Mapping[Parameter, str]) -> None:
        """Raise ValueError on every rank where what is held as a copy is none: training would not make it one."""
        copied = {name: checksum(p) for p, name in names.items() if not self._places[p].is_cut}
        tied = {
            label: (tuple(param.shape), str(param.dtype), *checksum(param))
            for param, name in names.items()
            if (label := self._labels.get(name))
        }
        found = None
        for rank, theirs in enumerate(collectives.gather_objects(copied, self.tensor)):
            for name in copied:
                if theirs[name] != copied[name] and found is None:
                    found = (
                        f"parameter {name!r} counts as a copy of the one on tensor-parallel rank {rank} and differs "
                        "from it. Make them equal before ShardedLion is made; or, if it is a part of a tensor, let "
                        "ModelParallel(cut_dim=...) say so."
                    )
        for stage, theirs in enumerate(collectives.gather_objects(tied, self.pipeline)):
            for label in theirs.keys() & tied.keys():
                if theirs[label] != tied[label] and found is None:
                    found = (
                        f"the parameter tied as {label!r} differs between this pipeline stage and stage {stage}. Copy "
                        "one stage's into the other before ShardedLion is made."
                    )
        for axis in self._groups.axes:
            found = next((f for f in collectives.gather_objects(found, axis) if f is not None), None)
        if found is not None:
            raise ValueError(found)

    # ---- every step

    def grad_norm(self, groups: ShardGroups, device: torch.device, sum_of_squares: SumOfSquares) -> GradNorm:
        from lion_dist.composed.norm import NormOfParts

        return NormOfParts(groups, device, sum_of_squares, self)

    def join(self, total: Tensor, used: Tensor, also: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What data-parallel ranks have found, over all ranks: one message an axis.

        Args:
            total: [] fp64, the sum of squares of what is counted here.
            used: [params] fp32, 1 where there was a gradient.
            also: [n] fp64, to be summed along ``tensor``.
        """
        if self.tensor is not None:
            message = torch.cat([total.reshape(1), also, used.double()])
            collectives.all_reduce(message, self.tensor)
            total, also, used = message.split([1, len(also), len(used)])
            total, used = total[0], (used > 0).float()
        if self.pipeline is not None:
            total = total.clone()
            collectives.all_reduce(total, self.pipeline)
        return total, used, also
