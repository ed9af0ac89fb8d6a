"""Others who would reduce the same gradients: DDP, FSDP and their kind, around a model that a sharded optimizer trains.

Such a wrapper takes gradients from autograd's hooks as the optimizer does: each takes what the other left, and the
result is wrong in a plausible way. A module does not know what it is wrapped in, so the modules that are alive are
looked through: when the optimizer is made, and once more before its first step, for a wrapper made in between.
"""

from __future__ import annotations

import functools
import gc
import operator
from collections.abc import Container, Iterable, Mapping

from torch import nn
from torch.nn import Parameter

ENGINES = ("DeepSpeedEngine", "FSDPModule")  # by name: no library needs to be installed
SHARDED = {"FlatParameter": "FullyShardedDataParallel", "DTensor": "fully_shard"}  # parameters, and who makes them
REPLACED = "DDPWithoutReducer"  # a DistributedDataParallel that has left its gradients to a sharded optimizer
REMEDY = (
    "Pass the bare module and call it, not the wrapper: ShardedLion reduces the gradients itself, and makes replicas "
    "equal when it is constructed. A DistributedDataParallel (not a subclass) may stay where it comes before the "
    "optimizer, as ShardedLion(ddp.parameters(), module=ddp), which replaces its reducer. With FSDP, fully_shard or "
    "DeepSpeed use lion_dist.Lion."
)

_grad = operator.attrgetter("grad")


@functools.cache
def wrapper_name(kind: type) -> str | None:
    """The class for which modules of ``kind`` reduce gradients, or None.

    Wrappers of torch, apex, fairscale and Megatron are all called "...DataParallel".
    """
    if kind.__name__ == REPLACED:
        return None
    names = (base.__name__ for base in kind.__mro__)
    return next((name for name in names if name.endswith("DataParallel") or name in ENGINES), None)


def find_wrapper(
    params: Iterable[Parameter], module: nn.Module | None, replaced: nn.Module | None = None
) -> str | None:
    """The name of a data-parallel wrapper, not ``replaced``, that holds one of ``params`` or is in ``module``."""
    params = set(params)
    inside = [] if module is None else (wrapper_name(type(child)) for child in module.modules())
    found = next((name for name in inside if name is not None), None)
    if found is None and _find_around(params, replaced) is not None:
        gc.collect()  # it may be waiting for no more than that
        found = _find_around(params, replaced)
    return found


def _find_around(params: set[Parameter], replaced: nn.Module | None) -> str | None:
    objects = gc.get_objects()
    # The types first, in C: a large job has a million objects, and a Python loop over them takes 0.1 s. type(), not
    # isinstance(), which asks lazy proxies for their class.
    kinds = {kind: wrapper_name(kind) for kind in set(map(type, objects)) if issubclass(kind, nn.Module)}
    wrappers = {kind: name for kind, name in kinds.items() if name is not None}
    for candidate in objects if wrappers else ():
        name = wrappers.get(type(candidate))
        if name is not None and candidate is not replaced and not params.isdisjoint(candidate.parameters()):
            return name
    return None


def refuse_wrapped(params: Iterable[Parameter], module: nn.Module | None, replaced: nn.Module | None = None) -> None:
    """Raise TypeError when gradients of ``params`` or ``module`` are reduced by somebody else than ``replaced``."""
    found = find_wrapper(params, module, replaced)
    if found is not None:
        raise TypeError(f"the model is wrapped in {found}, which reduces gradients too. {REMEDY}")


def refuse_sharded_since(known: Container[Parameter], module: nn.Module | None) -> None:
    """Raise TypeError when parameters of ``module`` have been replaced by shards; ``known``: those it had before."""
    for param in [] if module is None else module.parameters():
        if param not in known and type(param).__name__ in SHARDED:
            raise TypeError(
                f"{SHARDED[type(param).__name__]} has replaced the module's parameters since ShardedLion was "
                f"constructed: it would train the old ones, which nobody reads. {REMEDY}"
            )


def refuse_late_grads(names: Mapping[Parameter, str], module: nn.Module | None) -> None:
    """Raise RuntimeError when one of the parameters has a gradient after the gradients of the step were reduced.

    Args:
        names: of parameters whose ``.grad`` the reductions have emptied, and of frozen ones.
    """
    grads = list(map(_grad, names))
    if grads.count(None) == len(grads):
        return
    late, name = next((p, name) for (p, name), grad in zip(names.items(), grads, strict=True) if grad is not None)
    wrapper = find_wrapper(names, module)
    if wrapper is not None:
        raise RuntimeError(
            f"{name!r} has a gradient that {wrapper} has left after its own reduction: the model is wrapped in it. "
            f"{REMEDY}"
        )
    if not late.requires_grad:
        raise RuntimeError(
            f"{name!r} has a gradient and does not require one, so it would not be trained. Call requires_grad_() on "
            "it on every rank, or set its .grad to None."
        )
    raise RuntimeError(
        f"{name!r} has a gradient again after those of this step had been reduced, so it would not count. Write into "
        ".grad before the step's last backward, or let every rank call backward_without_batch() after it: what was "
        "written is added as one more micro-batch. set_full_grad() replaces a gradient that has been reduced. "
        "(A second data-parallel wrapper around the model leaves such gradients, too.)"
    )
