"""The parameters of a ``ShardedLion``: checked as they come, named, numbered, and the ranks that share each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from lion_dist.config import PrecisionPolicy
from lion_dist.hyperparameters import check_hyperparameters
from lion_dist.local_shard import LocalShard
from lion_dist.param_checks import check_param
from lion_dist.sharding.agreement import check_ranks_agree
from lion_dist.sharding.memory_checks import check_memory
from lion_dist.sharding.memory_format import MemoryFormat
from lion_dist.sharding.own_groups import OwnGroups
from lion_dist.sharding.process_groups import ShardGroups, resolve_groups


class ShardedParams:
    """What is known of the parameters beside their tensors.

    Args:
        module: gives parameters their names; None: they are numbered.
        groups: the ranks of parameters whose param group has no ``process_group`` of its own.
        choices: of the optimizer, which have to be the same on all ranks.

    Attributes:
        names: of the optimizer's parameters; they need not be the module's.
        module_names: of the module's parameters.
        frozen: parameters that have no bucket yet, and their groups.
        own_groups: set when ranks begin to communicate; None: the given groups are used as they are.
        index_starts: the global element index of each parameter's first element (``sharding/layout.py``).
    """

    def __init__(self, module: nn.Module | None, groups: ShardGroups, precision: PrecisionPolicy, choices: tuple = ()):
        self.groups, self.precision, self._choices = groups, precision, choices
        self.module_names = {} if module is None else {p: clean_name(n) for n, p in module.named_parameters()}
        self.module = module
        self.names: dict[Parameter, str] = {}
        self.frozen: dict[Parameter, dict] = {}
        self.index_starts: dict[Parameter, int] = {}
        self.own_groups: OwnGroups | None = None
        self._numel = 0
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
        return [*(p.data for p in self.module.parameters() if p not in self.names), *self.module.buffers()]

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
        for name, param in zip(names, group["params"], strict=True):
            if param.device != first.device:
                raise ValueError(
                    f"ShardedLion expects parameters on one device, got {first.device} and {param.device} (first: "
                    f"{name!r}). Move the model before constructing the optimizer."
                )
            check_param(param, f"parameter {name!r}")
            self.precision.main_params_for(param.dtype)
            if LocalShard.of(param).is_dtensor:
                raise TypeError(
                    f"parameter {name!r} is a DTensor: it is sharded already. Use lion_dist.Lion, which updates local "
                    "shards in place."
                )
        self.check_memory({n: p for n, p in zip(names, group["params"], strict=True) if p.requires_grad})

    def check_memory(self, params: dict[str, Parameter]) -> None:
        """Raise ValueError unless ``params``, which are about to get buckets, can move there."""
        others = {name: param for param, name in (self.module_names | self.names).items()}
        if self.module is not None:
            others |= {f"buffer {clean_name(name)}": buffer for name, buffer in self.module.named_buffers()}
        for dtype in dict.fromkeys(param.dtype for param in params.values()):
            alike = {name: param for name, param in params.items() if param.dtype == dtype}
            check_memory(alike, others | params, row_major=self.precision.is_stochastic(dtype))

    def add(self, group: dict) -> None:
        """Name and number the parameters of a checked ``group``."""
        for name, param in zip(self.names_of(group), group["params"], strict=True):
            self.names[param] = name
            self.index_starts[param] = self._numel
            self._numel += param.numel()

    def check_agreement(self, groups: list[dict]) -> None:
        """Raise ValueError on every rank unless ``groups`` and the optimizer's choices are the same on all."""
        torch_release = torch.__version__.split("+")[0]  # builds for other devices compute alike
        entries = [("torch", (torch_release,)), ("ShardedLion", tuple(map(str, self._choices)))]
        for axis in self.groups_for({}).axes:
            check_ranks_agree(entries + self._described(groups), axis)

    def _described(self, groups: list[dict]) -> list[tuple[str, tuple]]:
        """What has to be the same on all ranks, as entries for ``check_ranks_agree``."""
        entries = []
        for i, group in enumerate(groups):
            settings = [str(_number(group.get(key))) for key in ("lr", "betas", "weight_decay", "max_lr")]
            entries.append((f"param group {i}: lr, betas, weight_decay, max_lr", tuple(settings)))
            for name, param in zip(self.names_of(group), group["params"], strict=True):
                dims = MemoryFormat.of(param).dims  # flat buffers are broadcast and summed as they lie in memory
                order = () if dims is None else (f"in memory by dimensions {dims}",)
                entries.append((name, (tuple(param.shape), str(param.dtype), param.requires_grad, *order)))
        return entries


def refuse_sparse_gradients(names: Mapping[Parameter, str], module: nn.Module | None) -> None:
    """Raise TypeError when a layer of ``module`` gives one of the parameters sparse gradients."""
    for layer in [] if module is None else module.modules():
        weight = layer.weight if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse else None
        if weight in names and weight.requires_grad:
            raise TypeError(
                f"the gradient of {names[weight]!r} is sparse, and Lion has no sparse update. Use "
                f"nn.{type(layer).__name__}(sparse=False): untouched rows stay where they are without it too."
            )


def _number(value):
    return value.tolist() if isinstance(value, Tensor) else value


def clean_name(name: str) -> str:
    """A parameter's name without what torch.compile and checkpoint wrappers put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
