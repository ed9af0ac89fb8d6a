"""``ShardedLion.load_state_dict()``: what can be loaded into the live state (``live_state.py``), and how."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lion_dist import values
from lion_dist.adopted_state import adopt_groups, warn_of_lost_average
from lion_dist.averages import KIND as AVERAGE
from lion_dist.boxed_tensor import BoxedTensor, can_read, read_box
from lion_dist.boxes import Box
from lion_dist.local_shard import local_tensor
from lion_dist.main_params import main_param_as
from lion_dist.shard_state import ShardState
from lion_dist.state_dict.live_state import LiveState

OWN_KEYS = ("params", "param_names", "process_group")  # of param groups: a loaded state does not change them


class LoadPlan:
    """A state dict that has been checked against a live optimizer; nothing has changed before :meth:`apply`.

    It is a :meth:`ShardedLion.state_dict` of the same rank (or one whose boxes hold what this rank needs), or the full
    state of ``ShardedLion``, ``Lion`` or lion-pytorch's Lion, of which each rank takes its slices. As with ``Lion``,
    main params are made from the parameters where the state has none, averages begin there, and a parameter without
    state starts afresh.

    Raises:
        ValueError: what cannot be loaded, and why.
    """

    def __init__(self, live: LiveState, state_dict: Any):
        groups = _checked_groups(live, state_dict)
        saved = _saved_by_param(live, groups, state_dict["state"])
        self._live = live
        self._copies = [planned for shard in live.shards for planned in _copies_of(shard, saved)]
        kept = any(shard.weight_avg is not None for shard in live.shards)
        self._loses_average = not kept and any(AVERAGE in kinds for kinds in saved.values())
        self._counters = _counters_in(state_dict, live)
        self._settings = [
            _settings(i, *pair, live.decoupled_from)
            for i, pair in enumerate(zip(live.param_groups, groups, strict=True))
        ]

    def apply(self) -> None:
        """Change the live state."""
        if self._loses_average:
            warn_of_lost_average()
        momenta = [planned.saved for planned in self._copies if planned.kind == "exp_avg"]
        found = {saved.dtype for saved in momenta if saved is not None}
        kept = {shard.exp_avg.dtype for shard in self._live.shards}
        if not found <= kept:
            names = (", ".join(sorted(map(str, dtypes))) for dtypes in (found, kept))
            warnings.warn(
                "lion_dist: the loaded exp_avg is {}; it is kept as {}, the configured momentum dtype.".format(*names),
                stacklevel=4,
            )
        for planned in self._copies:
            planned.apply()
        self._live.counters.copy_(self._counters)
        for group, settings in zip(self._live.param_groups, self._settings, strict=True):
            group.update(settings)


@dataclass(frozen=True)
class _Copy:
    """A box of one kind of state, from a saved tensor into the shard.

    Attributes:
        target, param: views of the shard's state and of the parameter.
        saved: the full tensor or boxes; None: there is none, and the state starts afresh.
    """

    kind: str
    box: Box
    target: Tensor
    param: Tensor
    saved: Tensor | None

    def apply(self) -> None:
        if self.saved is None:
            if self.kind == AVERAGE or (self.kind == "main_param" and self.target.dtype == torch.float32):
                self.target.copy_(self.param)
            else:
                self.target.zero_()
            return
        source = read_box(self.saved, self.box)
        if source.data_ptr() == self.target.data_ptr():  # loaded in place
            return
        self.target.copy_(main_param_as(self.target.dtype, source, self.param) if self.kind == "main_param" else source)


def _copies_of(shard: ShardState, saved: Mapping[Parameter, dict[str, Tensor]]) -> Iterator[_Copy]:
    """What this rank's part of the bucket needs.

    Raises:
        ValueError: a saved tensor does not hold it.
    """
    bucket = shard.bucket
    held = {kind: shard.local_shards(flat) for kind, flat in shard.elementwise.items()}
    here = shard.local_shards(bucket.param_shard)
    for i, position in enumerate(piece.param for piece in bucket.slices):
        owner, name, value = bucket.params[position], bucket.names[position], here[position]
        targets = [(kind, *item) for kind, shards in held.items() for item in shards[position].boxes.items()]
        if shard.steps is not None:
            targets.append(("step", Box((), ()), shard.steps[i]))
        for kind, box, target in targets:
            source = saved[owner].get(kind)
            if source is not None and not can_read(source, box):
                raise ValueError(_other_part(f"{kind} of {name!r}", source, shard))
            yield _Copy(kind, box, target, value.boxes.get(box, value.tensor), source)


def _other_part(what: str, source: BoxedTensor, shard: ShardState) -> str:
    here = "this is rank {} of {}".format(*shard.owner)
    if source.part is None:
        return f"the saved {what} is a part that does not hold what this rank owns ({here}): {source}"
    if (source.part.rank, source.part.num_ranks) == shard.owner:
        return (
            f"the saved {what} is {source.part}, as this is, but of other buckets. Construct the optimizer with the "
            "bucket_numel and param groups that it was saved with, or load a full state (consolidate_state_dict) or a "
            "checkpoint of lion_dist.checkpoint, which go anywhere."
        )
    return (
        f"the saved {what} is {source.part}, and {here}: the rest is not in this state. Give each rank the file that "
        "it saved, or save the full state: consolidate_state_dict(to=0) on all ranks, then full_state_dict() on rank 0."
    )


# ---- checks


def _checked_groups(live: LiveState, state_dict: Any) -> list[dict]:
    """The saved param groups, of as many parameters as the live ones."""
    values.state_dict(state_dict)
    groups = state_dict["param_groups"]
    counts = [[len(group["params"]) for group in side] for side in (groups, live.param_groups)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the saved state has param groups of {counts[0]} parameters, this optimizer of {counts[1]}. Construct it "
            "with the groups that were saved."
        )
    return list(groups)


def _saved_by_param(live: LiveState, groups: Sequence[Mapping], state: Mapping) -> dict[Parameter, dict[str, Tensor]]:
    """The saved state of each live parameter, checked; ``{}`` where there is none."""
    ids = [i for group in groups for i in group["params"]]
    if not all(isinstance(i, int | str) for i in ids):
        raise ValueError('"params" of the saved param groups must be numbers or names, as state_dict() gives them')
    params = dict(zip(ids, _in_saved_order(live, groups), strict=True))
    if len(params) < len(ids):
        raise ValueError("the saved param groups hold a parameter more than once")
    unknown = [key for key in state if key not in params]
    if unknown:
        raise ValueError(f"the saved state has {len(unknown)} parameters that no saved param group has: {unknown[:8]}")
    places = {
        param: place for shard in live.shards for param, place in zip(shard.bucket.params, shard.places, strict=True)
    }
    saved: dict[Parameter, dict[str, Tensor]] = {param: {} for param in params.values()}
    for key, kinds in state.items():
        if kinds:
            place = places.get(params[key])
            shape = params[key].shape if place is None else place.shape
            saved[params[key]] = _checked_state(kinds, shape, live.names[params[key]])
            if params[key] not in places:
                raise ValueError(
                    f"the saved state has a momentum of {live.names[params[key]]!r}, which is frozen here. Construct "
                    "ShardedLion before requires_grad_(False), or leave this parameter's entry out of the state."
                )
    return saved


def _in_saved_order(live: LiveState, groups: Sequence[Mapping]) -> list[Parameter]:
    """The live parameters, group by group, in the order of the saved ones.

    That is their own order, as in torch, unless a saved group names the same parameters in another.
    """
    ordered: list[Any] = []  # parameters
    by_name = {name: param for param, name in live.names.items()}
    for i, (group, saved) in enumerate(zip(live.param_groups, groups, strict=True)):
        names, members = saved.get("param_names") or saved["params"], group["params"]
        if len(names) != len(members):
            raise ValueError(f"param group {i} of the saved state has {len(names)} names for {len(members)} parameters")
        named = [by_name.get(name) for name in names]  # None: numbered, or called otherwise here
        if set(named) == set(members):
            ordered += named
            continue
        triples = zip(names, named, members, strict=True)
        moved = [name for name, param, own in triples if param is not None and param is not own]
        if moved:
            raise ValueError(
                f"param group {i} of the saved state holds {moved[0]!r} where this optimizer has another parameter "
                f"({len(moved)} such). Construct it with the param groups that were saved."
            )
        ordered += members
    return ordered


def _checked_state(kinds: object, whole: torch.Size, name: str) -> dict[str, Tensor]:
    if not isinstance(kinds, Mapping) or "exp_avg" not in kinds:
        found = sorted(map(str, kinds)) if isinstance(kinds, Mapping) else type(kinds).__name__
        raise ValueError(
            f"the saved state of {name!r} has {found} but no 'exp_avg': it is not a Lion's (nor an Adam's). "
            "Start with fresh optimizer state instead."
        )
    checked = {}
    for kind, shape in (("exp_avg", whole), ("main_param", whole), (AVERAGE, whole), ("step", torch.Size(()))):
        value = kinds.get(kind)
        if value is None:
            continue
        if not isinstance(value, Tensor | int | float):
            raise ValueError(f"the saved {kind} of {name!r} is a {type(value).__name__}, not a tensor")
        value = value if isinstance(value, Tensor) else torch.tensor(value)  # other Lions count steps in an int
        if value.shape != shape:
            raise ValueError(f"the saved {kind} of {name!r} has shape {tuple(value.shape)}, here it is {tuple(shape)}")
        if kind in ("exp_avg", AVERAGE) and not value.dtype.is_floating_point:
            what = "momentum" if kind == "exp_avg" else "average"
            raise ValueError(f"the saved {kind} of {name!r} is {value.dtype}, which is no {what}")
        checked[kind] = _local(value, f"{kind} of {name!r}")
    return checked


def _local(value: Tensor, what: str) -> Tensor:
    """What torch's ``set_optimizer_state_dict`` hands over (a replicated DTensor, or a live tensor that was sent the
    full one) as the full tensor that this rank holds."""
    received = value.received.full if hasattr(value, "received") else None
    local = value if isinstance(value, BoxedTensor) else local_tensor(value)
    local = local if received is None else received
    if local.shape != value.shape:
        raise ValueError(
            f"the saved {what} is a DTensor of which this rank holds {tuple(local.shape)} of {tuple(value.shape)}. "
            "Load a full state, or go through lion_dist.checkpoint."
        )
    return local


def _counters_in(state_dict: Mapping, live: LiveState) -> Tensor:
    """Return the saved counts of steps taken and skipped; zeros where the optimizer that saved counts none."""
    kept = [kinds["counters"] for kinds in state_dict["state"].values() if kinds and "counters" in kinds]
    counters = state_dict.get("counters", kept[0] if kept else torch.zeros_like(live.counters))
    if not isinstance(counters, Tensor) or counters.shape != live.counters.shape:
        raise ValueError(f'"counters" of the saved state must be two numbers in a tensor, got {counters!r}')
    return _local(counters, "counters")


def _settings(position: int, group: dict, saved: Mapping, decoupled_from: float | None) -> dict:
    """The settings of the live group after loading the saved one; unknown keys as ``Lion`` takes them."""
    taken = {key: copy.deepcopy(value) for key, value in saved.items() if key not in OWN_KEYS}
    if isinstance(taken.get("betas"), list):
        taken["betas"] = tuple(taken["betas"])
    try:
        (adopted,) = adopt_groups([taken], [group], {}, decoupled_from)
    except (TypeError, ValueError) as error:
        raise ValueError(f"param group {position} of the saved state: {error}") from error
    return adopted
