"""Model and optimizer as named boxes of full tensors: what this rank owns, as views of the live memory.

The names are those of the unwrapped model, whatever engine holds it::

    model.<name>                              a parameter or persistent buffer
    optimizer.<name>.exp_avg | main_param | weight_avg     fp32, bf16 or int16, in the parameter's full shape
    optimizer.<name>.step                     [] int64, with stochastic rounding
    counters                                  [2] int64, steps taken and skipped (ShardedLion)
    spike_guard                               fp64, the window of skip_spikes (``spike_guard.py``)
"""

from __future__ import annotations

import dataclasses
import numbers
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from lion_dist import values
from lion_dist.boxed_tensor import BoxedTensor
from lion_dist.checkpoint import fsdp1
from lion_dist.checkpoint.errors import CheckpointError
from lion_dist.lion import Lion
from lion_dist.local_shard import LocalShard
from lion_dist.sharded_lion import ShardedLion
from lion_dist.sharded_params import clean_name
from lion_dist.sharding.process_groups import RankGroups, ShardGroups

GROUP_KEYS = ("lr", "betas", "weight_decay", "initial_lr", "max_lr")  # of a param group, and saved with it


@dataclass
class ShardedParamState:
    """What this rank owns of one parameter and of its optimizer state; every rank that has it lists it.

    Attributes:
        value: of the parameter, which every engine cuts into the same boxes as its state.
        state: ``exp_avg`` and, where there are such, ``main_param`` and ``weight_avg``; empty when the optimizer does
            not hold the parameter.
        step: [] int64 with stochastic rounding, where this rank owns elements: nobody counts for others.
        is_plain: every rank holds all of it, in ordinary tensors, and a save takes a part from each.
        num_ranks: that hold some of it or all; None: all ranks there are.
        is_saved: another rank saves the same boxes where this one does not.
    """

    value: BoxedTensor
    state: dict[str, BoxedTensor] = field(default_factory=dict)
    step: Tensor | None = None
    is_plain: bool = False
    num_ranks: int | None = None
    is_saved: bool = True


@dataclass
class ShardedState:
    """A model and its optimizer.

    Attributes:
        tied: {second name: first name} of parameters that are one tensor.
        param_groups: hyperparameters and, under ``"params"``, names.
        finish_load: called on every rank after the tensors have been loaded; it may communicate.
        own_buffers: names of those that this rank saves; None: all. (``parts.py`` says so, of all ranks.)
        elsewhere: names of parameters and buffers that other ranks hold and this one does not.
    """

    params: dict[str, ShardedParamState]
    buffers: dict[str, BoxedTensor]
    counters: Tensor | None
    spike_window: Tensor | None
    tied: dict[str, str]
    param_groups: list[dict]
    finish_load: Callable[[], None]
    own_buffers: Set[str] | None = None
    elsewhere: Set[str] = frozenset()

    def only_to_save(self) -> ShardedState:
        """Without what other ranks save."""
        own = self.buffers if self.own_buffers is None else self.own_buffers
        return dataclasses.replace(
            self,
            params={name: param for name, param in self.params.items() if param.is_saved},
            buffers={name: buffer for name, buffer in self.buffers.items() if name in own},
        )

    def tensors(self) -> dict[str, BoxedTensor]:
        """Everything, by its name in a checkpoint."""
        named = {f"model.{name}": buffer for name, buffer in self.buffers.items()}
        for name, param in self.params.items():
            named[f"model.{name}"] = param.value
            named |= {f"optimizer.{name}.{kind}": held for kind, held in param.state.items()}
            if param.step is not None:
                named[f"optimizer.{name}.step"] = boxed(param.step)
        if self.counters is not None:
            named["counters"] = boxed(self.counters)
        if self.spike_window is not None:
            named["spike_guard"] = boxed(self.spike_window)
        return named


def collect(model: nn.Module, optimizer: Lion | ShardedLion) -> ShardedState:
    """The live state of ``model`` and ``optimizer``, whose engine is found out from them. It does not communicate."""
    if not isinstance(optimizer, Lion | ShardedLion):
        raise CheckpointError(
            f"the optimizer is a {type(optimizer).__name__}, not lion_dist's Lion or ShardedLion. Of a wrapper, pass "
            "the one inside; for another optimizer's file see lion-dist checkpoint convert."
        )
    optimizer.weight_swap.refuse("a checkpoint of model and optimizer")
    values.instance("model", model, nn.Module, "Pass the model whose parameters the optimizer was given.")
    model = _unwrapped(model)
    _refuse_extra_state(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without backward its parameters are full ones, not the optimizer's
    flats = fsdp1.flat_params(model)
    names = _names_by_param(model, flats)
    _refuse_unknown_params(optimizer, names)
    num_ranks, tied = None, _tied_names(model, flats)
    if isinstance(optimizer, ShardedLion):
        parts = optimizer.parts
        for param, name in ({} if parts is None else parts.tied_names).items():  # the name on the first stage with it
            tied[names[param][0]], names[param] = name, [name]
        params, finish = _of_sharded_lion(optimizer, names), lambda: _gather_params(optimizer)
        num_ranks = _holders(optimizer, None, optimizer.groups).num_ranks
    else:
        params, finish = _of_lion(model, optimizer, flats)
    groups = _param_groups(optimizer, names, flats)
    for _, param in _plain_params(model, flats):
        is_plain = LocalShard.of(param).is_plain
        params.setdefault(names[param][0], ShardedParamState(boxed(param.detach()), {}, None, is_plain, num_ranks))
    return ShardedState(
        params,
        {name: boxed(buffer) for name, buffer in _persistent_buffers(model)},
        optimizer.counters if isinstance(optimizer, ShardedLion) else None,
        optimizer.spike_window,
        tied,
        groups,
        finish,
    )


def boxed(tensor: Tensor) -> BoxedTensor:
    """Return what is here of ``tensor``, as boxes of the full one."""
    try:
        return LocalShard.of(tensor).boxed()
    except ValueError as error:
        raise CheckpointError(str(error)) from None


# ---- what ranks must agree about

_SAMPLE = 256  # elements of a tensor


def descriptions(state: ShardedState, with_contents: bool) -> dict[str, str]:
    """Describe of each parameter what must be equal on all ranks, so that what they save by its name is one tensor.

    Of parameters that every rank holds whole that is the contents too, but only a sample of them is looked at: it finds
    tensors that ranks train apart (experts, stages, hand-made tensor parallel), not a flipped bit.
    """
    groups = {name: i for i, group in enumerate(state.param_groups) for name in group["params"]}
    result = {}
    for name, param in state.params.items():
        where = f"in param group {groups[name]}" if name in groups else "in no param group"
        words = [f"{tuple(param.value.shape)} {param.value.dtype} {where}"]
        if param.is_plain and with_contents:
            for kind, held in {"value": param.value, **param.state}.items():
                words += [f"{kind} {_checksum(local)}" for local in held.boxes.values()]
        result[name] = ", ".join(words)
    return result


def _checksum(tensor: Tensor) -> str:
    """CRC-32 of evenly spaced elements."""
    each = int(_SAMPLE ** (1 / max(1, tensor.ndim)))
    sample = tensor[tuple(slice(None, None, max(1, size // each)) for size in tensor.shape)]
    return f"{zlib.crc32(sample.cpu().contiguous().view(-1).view(torch.uint8).numpy()):08x}"


# ---- engines


def _of_lion(model: nn.Module, optimizer: Lion, flats: list[fsdp1.FlatParam]):
    """Plain parameters, DTensors and FSDP1's flat parameters."""
    optimized = {p for group in optimizer.param_groups for p in group["params"]}
    params = {}
    for name, param in _plain_params(model, flats):
        if _has_state(param, optimizer, optimized):
            state = optimizer.state_of(param)
            kinds = {kind: boxed(tensor) for kind, tensor in state.items() if kind != "step"}
            shard = LocalShard.of(param)
            step = state.get("step") if shard.tensor.numel() else None
            params[name] = ShardedParamState(boxed(param.detach()), kinds, step, shard.is_plain)
    finishes = []
    for flat in flats:
        owned, finish = _of_flat_param(flat, optimizer, optimized)
        params |= owned
        finishes.append(finish)

    def finish_load() -> None:
        for finish in finishes:
            finish()

    return params, finish_load


def _has_state(param: Tensor, optimizer: Lion, optimized: set) -> bool:
    """A frozen parameter has state when it was trained before."""
    return param in optimized and bool(param.requires_grad or optimizer.state.get(param))


def _of_flat_param(flat: fsdp1.FlatParam, optimizer: Lion, optimized: set):
    params: dict[str, ShardedParamState] = {}
    steps: dict[Tensor, list[Tensor]] = {}  # a flat parameter has one step, its file one for each original
    for original in flat.originals:
        held = original.range
        param = params[original.name] = ShardedParamState(flat.shard_of_value(original).boxed())
        if not _has_state(held.optimized, optimizer, optimized):
            continue
        for kind, tensor in optimizer.state_of(held.optimized).items():
            if kind == "step" and held.numel:
                param.step = tensor.clone()
                steps.setdefault(tensor, []).append(param.step)
            elif kind != "step":
                param.state[kind] = flat.shard_of_state(original, tensor).boxed()

    def finish() -> None:
        for step, of_originals in steps.items():
            step.copy_(torch.stack(of_originals).max())

    return params, finish


def _of_sharded_lion(optimizer: ShardedLion, names: dict[Parameter, list[str]]) -> dict[str, ShardedParamState]:
    optimizer.finish_param_sync()
    params = {}
    for shard in optimizer.shards:
        bucket = shard.bucket
        flats = {"value": bucket.param_shard, **shard.elementwise}
        local = {kind: shard.local_shards(flat) for kind, flat in flats.items()}
        steps = (
            {} if shard.steps is None else {s.param: step for s, step in zip(bucket.slices, shard.steps, strict=True)}
        )
        for i, param in enumerate(bucket.params):
            kinds = {kind: shards[i].boxed() for kind, shards in local.items()}
            held = ShardedParamState(kinds.pop("value"), kinds, steps.get(i), is_saved=shard.is_counted)
            held.num_ranks = _holders(optimizer, param, bucket.groups).num_ranks
            params[names[param][0]] = held
    return params


def _holders(optimizer: ShardedLion, param: Parameter | None, groups: ShardGroups) -> RankGroups:
    """The ranks that hold parts or copies of ``param``, which ``groups`` share; None: of another parameter."""
    parts = optimizer.parts
    return groups if parts is None else parts.holders(param, groups)


def _gather_params(optimizer: ShardedLion) -> None:
    """Each rank has loaded its shard of the parameters: make them full again."""
    for bucket in optimizer.buckets:
        bucket.groups.all_gather(bucket.flat_params, bucket.param_shard)()
    optimizer.keep_averages()


# ---- names


def _plain_params(model: nn.Module, flats: list[fsdp1.FlatParam]) -> Iterator[tuple[str, Parameter]]:
    """Parameters that are not part of a flat one."""
    flattened = {param for flat in flats for param in (flat.param, *flat.optimized)}
    for name, param in model.named_parameters():
        if param not in flattened:
            yield fsdp1.unwrapped_name(clean_name(name)), param


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer not in seen:
                seen.add(buffer)
                yield fsdp1.unwrapped_name(clean_name(f"{prefix}.{name}" if prefix else name)), buffer


def _names_by_param(model: nn.Module, flats: list[fsdp1.FlatParam]) -> dict[Parameter, list[str]]:
    names = {param: [name] for name, param in _plain_params(model, flats)}
    for flat in flats:
        for original in flat.originals:
            names.setdefault(original.range.optimized, []).append(original.name)
    return names


def _tied_names(model: nn.Module, flats: list[fsdp1.FlatParam]) -> dict[str, str]:
    tied = {second: first for flat in flats for second, first in flat.tied.items()}
    firsts = {param: name for name, param in _plain_params(model, flats)}
    for name, param in model.named_parameters(remove_duplicate=False):
        name = fsdp1.unwrapped_name(clean_name(name))
        if param in firsts and firsts[param] != name:
            tied[name] = firsts[param]
    return tied


def _param_groups(
    optimizer: Lion | ShardedLion, names: dict[Parameter, list[str]], flats: list[fsdp1.FlatParam]
) -> list[dict]:
    places = {original.name: original.place for flat in flats for original in flat.originals}
    groups = []
    for group in optimizer.param_groups:
        settings = {key: _plain(group[key]) for key in GROUP_KEYS if key in group}
        members = [name for p in group["params"] for name in names[p]]
        if all(name in places for name in members):  # flat parameters do not come in the order of the model
            members.sort(key=places.__getitem__)
        groups.append(settings | {"params": members})
    return groups


def _plain(value):
    """Convert to JSON's values: numbers may be tensors or NumPy's, ``betas`` any sequence of them."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(map(_plain, value))
    found = values.plain_list(values.plain(value))
    return float(found) if isinstance(found, numbers.Real) and not isinstance(found, int) else found


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without DDP and torch.compile around it, in whatever order."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _refuse_unknown_params(optimizer: Lion | ShardedLion, names: dict[Parameter, list[str]]) -> None:
    for i, group in enumerate(optimizer.param_groups):
        unknown = [p for p in group["params"] if p not in names]
        if unknown:
            raise CheckpointError(
                f"param group {i} holds a parameter of shape {tuple(unknown[0].shape)} that the model does not have. "
                "Pass save() and load() the model whose parameters the optimizer was given."
            )


def _refuse_extra_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"module {name!r} ({type(module).__name__}) keeps extra state, an object that would need pickling. "
                "Make it buffers, or pass it in save(extra=...)."
            )
