"""The parameters of a ``ShardedLion``: checked as they come, named, numbered, and the ranks that share each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from lion_dist.config import PrecisionPolicy
from lion_dist.hyperparameters import check_hyperparameters
from lion_dist.local_shard import LocalShard, local_tensor
from lion_dist.param_checks import check_param
from lion_dist.sharding.process_groups import ShardGroups, resolve_groups

if TYPE_CHECKING:
    from lion_dist.composed.axes import ModelAxes
    from lion_dist.optional_guards import BorrowedGroups


class ShardedParams:
    """What is known of the parameters beside their tensors.

    Args:
        module: gives parameters their names; None: they are numbered.
        groups: the ranks of parameters whose param group has no ``process_group`` of its own.
        parts: the ranks that hold other parts of the model; None: there are none.

    Attributes:
        names: of the optimizer's parameters; they need not be the module's.
        module_names: of the module's parameters.
        frozen: parameters that have no bucket yet, and their groups.
        own_groups: set when ranks begin to communicate; None: they have not begun.
        index_starts: the global element index of each parameter's first element (``sharding/layout.py``).
    """

    def __init__(
        self,
        module: nn.Module | None,
        groups: ShardGroups,
        precision: PrecisionPolicy,
        parts: ModelAxes | None = None,
    ):
        self.groups, self.precision, self.parts = groups, precision, parts
        self.module_names = {} if module is None else {p: clean_name(n) for n, p in module.named_parameters()}
        self.module = module
        self.names: dict[Parameter, str] = {}
        self.frozen: dict[Parameter, dict] = {}
        self.index_starts: dict[Parameter, int] = {}
        self.own_groups: BorrowedGroups | None = None
        self._labels: dict[Parameter, str] = {}
        self._numel = self._num_groups = 0
        self._resolved: dict[object, ShardGroups] = {}

    def names_of(self, group: dict) -> list[str]:
        """Name the parameters of a param group, whether it has been added or not yet."""
        if "param_names" in group:
            return list(group["param_names"])
        if all(param in self.names for param in group["params"]):
            return [self.names[param] for param in group["params"]]
        first = len(self.names)
        return [self.module_names.get(p, f"param.{first + i}") for i, p in enumerate(group["params"])]

    def first_device(self) -> torch.device:
        """ValueError where there are no parameters."""
        if not self.names:
            raise ValueError("ShardedLion got no parameters: every param group is empty")
        return next(iter(self.names)).device

    def others_in_module(self) -> list[Tensor]:
        """Parameters of the module that are not the optimizer's, and the module's buffers."""
        if self.module is None:
            return []
        others = (p.data for p in self.module.parameters() if p not in self.names)
        return [local_tensor(tensor) for tensor in (*others, *self.module.buffers())]

    def unfrozen(self) -> list[tuple[Parameter, dict]]:
        """Parameters that take gradients and have no bucket yet, and their groups."""
        return [(p, g) for p, g in self.frozen.items() if p.requires_grad]

    def groups_for(self, group: dict) -> ShardGroups:
        """The optimizer's own groups. The first call for other ranks than before makes some, all of them together."""
        given = self._given_groups(group)
        return given if self.own_groups is None else self.own_groups.like(given)

    def _given_groups(self, group: dict) -> ShardGroups:
        where = group.get("process_group")
        if where is None:
            return self.groups
        if not isinstance(where, DeviceMesh | ProcessGroup):
            return resolve_groups(where)  # which refuses it
        if where not in self._resolved:
            self._resolved[where] = resolve_groups(where)
        return self._resolved[where]

    def check(self, group: dict, first: Parameter | None) -> None:
        """Raise TypeError or ValueError unless ``group`` can be trained. ``first``: of all parameters."""
        check_hyperparameters(group)
        self._given_groups(group)
        names = self.names_of(group)
        if len(set(group["params"])) < len(names):
            raise ValueError(f"a param group holds a parameter more than once: {', '.join(names)}")
        taken = set(self.names.values())
        for name in names:
            if name in taken:
                raise ValueError(
                    f"two parameters are called {name!r}, and checkpoints go by name. Pass names that differ, such as "
                    "('actor.' + name, parameter), or parameters without names."
                )
            taken.add(name)
        if self.parts is not None:
            self.parts.note_kinds(group["params"])
        for name, param in zip(names, group["params"], strict=True):
            if param.device != first.device:
                raise ValueError(
                    f"ShardedLion expects parameters on one device, got {first.device} and {param.device} (first: "
                    f"{name!r}). Move the model before constructing the optimizer."
                )
            check_param(param, f"parameter {name!r}")
            self.precision.main_params_for(param.dtype)
            if self.parts is not None:
                self.parts.check(name, param)
            elif LocalShard.of(param).is_dtensor:
                raise TypeError(
                    f"parameter {name!r} is a DTensor: it is sharded already. Use lion_dist.Lion, which updates local "
                    "shards in place; or, for tensor parallel, pass model_parallel=ModelParallel(tensor=mesh['tp'])."
                )

    def add(self, group: dict) -> None:
        """Name and number the parameters of a checked ``group``."""
        self._num_groups += 1
        for name, param in zip(self.names_of(group), group["params"], strict=True):
            self.names[param] = name
            if group.get("process_group") is not None:
                self._labels[param] = own_label(self._num_groups, len(self._labels))
            self.index_starts[param], numel = self._numel, param.numel()
            if self.parts is not None:
                place = self.parts.add(name, param)
                self.index_starts[param] += place.first_index
                numel = place.shape.numel()
            self._numel += numel

    def number_over_parts(self) -> None:
        """Let the global element indices go on from pipeline stage to stage; all ranks together."""
        if self.parts is not None:
            self.parts.number(self.index_starts, self.names, self._numel)

    def check_copies(self, groups: list[dict]) -> None:
        """Raise ValueError unless what other ranks hold as copies of parameters of ``groups`` are copies."""
        if self.parts is not None:
            self.parts.check_copies({param: self.names[param] for group in groups for param in group["params"]})

    def label(self, param: Parameter) -> str:
        """A name that is the same on all ranks: experts of several groups of ranks may have names of their own."""
        return self._labels.get(param) or self.names[param]


def own_label(group: int, position: int) -> str:
    """Label a parameter whose name may differ between ranks."""
    return f"parameter {position} of param group {group}, which has a process_group of its own"


def clean_name(name: str) -> str:
    """A parameter's name without what torch.compile and checkpoint wrappers put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
