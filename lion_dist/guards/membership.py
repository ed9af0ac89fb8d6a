"""Whether the param groups and the module still hold the parameters that the optimizer trains.

A parameter that is put in another's place (``group["params"][i] = ...``, a resized embedding,
``load_state_dict(assign=True)``) has neither hooks nor a place in a bucket: it would never be trained, without a word.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import nn
from torch.nn import Parameter

from lion_dist.sharded_params import clean_name
from lion_dist.update_batch import same_objects

_parameters = operator.attrgetter("_parameters")


class Membership:
    """The parameters of the groups, and where in the module they are, as they were when the optimizer took them."""

    def __init__(self, module: nn.Module | None):
        self._module = module
        self._groups: list[dict] = []
        self._params: list[list[Parameter]] = []  # of each group
        self._in_module: dict[Parameter, str] = {}  # the optimizer's, by their names in the module
        self._others: set[Parameter] = set()  # parameters of the module that are not the optimizer's
        self._owners: list[nn.Module] = []  # modules with parameters of the optimizer, once for each,
        self._names: list[str] = []  # the name that it has there,
        self._owned: list[Parameter] = []  # and the parameter
        self._parents: list[dict[str, nn.Module | None]] = []  # the same of modules in modules
        self._child_names: list[str] = []
        self._children: list[nn.Module] = []

    def note(self, groups: Sequence[dict]) -> None:
        """Take the present parameters of ``groups`` and of the module for those that belong."""
        self._groups, self._params = list(groups), [list(group["params"]) for group in groups]
        if self._module is not None:
            self._note_module()

    def _note_module(self) -> None:
        trained = {param for params in self._params for param in params}
        present = _params_of(self._module)
        self._in_module = {param: name for param, name in present.items() if param in trained}
        self._others = present.keys() - trained
        owned = [
            (owner, name, param)
            for owner in self._module.modules()
            for name, param in dict.items(owner._parameters)
            if param in trained
        ]
        modules = [(parent._modules, *item) for parent in self._module.modules() for item in parent._modules.items()]
        self._owners, self._names, self._owned = map(list, zip(*owned, strict=True)) if owned else ([], [], [])
        self._parents, self._child_names, self._children = (
            map(list, zip(*modules, strict=True)) if modules else ([], [], [])
        )

    def check(self, groups: Sequence[dict]) -> bool:
        """Whether parameters have moved within the module (tied, parametrized): whoever looked at it looks again.

        Raises:
            RuntimeError: the groups hold other parameters, or the module has others in the place of the optimizer's.
        """
        if not same_objects(groups, self._groups):
            raise RuntimeError(
                "optimizer.param_groups holds other groups than ShardedLion was given: their settings and parameters "
                "would have no effect. Use add_param_group(), or close() this optimizer and construct another."
            )
        for i, (group, params) in enumerate(zip(groups, self._params, strict=True)):
            if not same_objects(group["params"], params):
                raise RuntimeError(
                    f"param group {i} holds other parameters than ShardedLion was given: new ones are not in its "
                    "buckets and would never be trained. Use add_param_group() for them, or close() this optimizer "
                    "and construct another."
                )
        if self._module_is_the_same():
            return False
        self._refuse_replaced()
        self._note_module()
        return True

    def _module_is_the_same(self) -> bool:
        # Hundreds of looks in every step, so they are taken by map; past AwaitedParameters, whose readers wait.
        owned = map(dict.get, map(_parameters, self._owners), self._names)
        children = map(dict.get, self._parents, self._child_names)
        return all(map(operator.is_, owned, self._owned)) and all(map(operator.is_, children, self._children))

    def _refuse_replaced(self) -> None:
        present = _params_of(self._module)
        gone = [name for param, name in self._in_module.items() if param not in present]
        known = {param for params in self._params for param in params} | self._others
        new = [name for param, name in present.items() if param.requires_grad and param not in known]
        if gone and new:
            raise RuntimeError(
                f"the module no longer has {_listed(gone)}, which ShardedLion trains, and has got {_listed(new)}, "
                "which it does not: by load_state_dict(assign=True), resizing, another layer, FSDP or fully_shard, "
                "or a parametrization such as weight_norm. Do that first and construct the optimizer after, or "
                "close() this one and construct another."
            )


def _params_of(module: nn.Module) -> dict[Parameter, str]:
    """Return each parameter's first name; unlike ``named_parameters()``, do not wait for parameters in flight."""
    params: dict[Parameter, str] = {}
    for prefix, owner in module.named_modules():
        for name, param in dict.items(owner._parameters):
            if param is not None:
                params.setdefault(param, clean_name(f"{prefix}.{name}" if prefix else name))
    return params


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
