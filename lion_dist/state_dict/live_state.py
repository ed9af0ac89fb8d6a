"""The live state of a ``ShardedLion``, and its format in ``state_dict()``.

    {"state": {i: {"exp_avg": ..., "main_param": ..., "step": ...}},    i counts parameters over all param groups
     "param_groups": [{"lr": ..., "betas": ..., "weight_decay": ..., "params": [i, ...]}],
     "counters": [2] int64, steps taken and skipped}

That is torch's format and plain ``Lion``'s. Values are live: a ``BoxedTensor`` over this rank's part, or a view of the
full tensor where one rank holds all. The state of the first parameter holds ``counters`` too, because
``torch.distributed.checkpoint.state_dict`` hands on ``state`` and ``param_groups`` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter

from lion_dist.boxed_tensor import BoxedTensor
from lion_dist.shard_state import ShardState


@dataclass(frozen=True)
class LiveState:
    """What the state dicts of one ``ShardedLion`` are made of.

    Attributes:
        names: of its parameters, frozen ones too.
        counters: [2] int64 on the device.
        decoupled_from: what ``decoupled_weight_decay`` divides the weight decay by.
        spike_window: of ``skip_spikes``, on the device; None without.
    """

    param_groups: list[dict]
    shards: Sequence[ShardState]
    names: Mapping[Parameter, str]
    counters: Tensor
    decoupled_from: float | None
    spike_window: Tensor | None = None

    @property
    def params(self) -> list[Parameter]:
        """List the parameters in the order in which a state dict counts them."""
        return [param for group in self.param_groups for param in group["params"]]

    def by_param(self, boxed_for: Callable[[ShardState], Callable[..., BoxedTensor]]) -> dict[Parameter, dict]:
        """The state of each parameter, in order; ``{}`` of a frozen one that was never trained."""
        found = {param: kinds for shard in self.shards for param, kinds in shard.state(boxed_for(shard)).items()}
        for param in self.params:
            if param in found:
                found[param]["counters"] = self.counters
                break
        return {param: found.get(param, {}) for param in self.params}

    def packed(self, state: dict[Parameter, dict]) -> dict:
        """``state`` of each parameter as a state dict."""
        indexed = {i: kinds for i, kinds in enumerate(state.values()) if kinds}
        return {"state": indexed, "param_groups": self.packed_groups(), "counters": self.counters} | self.guard()

    def guard(self) -> dict[str, Tensor]:
        return {} if self.spike_window is None else {"spike_guard": self.spike_window}

    def packed_groups(self) -> list[dict]:
        """Param groups as torch packs them. A process group cannot be saved; its key stays, for readers that look for
        the keys that the optimizer has."""
        groups, first = [], 0
        for group in self.param_groups:
            count = len(group["params"])
            packed = {key: None if key == "process_group" else value for key, value in group.items() if key != "params"}
            groups.append(packed | {"params": list(range(first, first + count))})
            first += count
        return groups

    def whole_groups(self) -> list[dict]:
        """Param groups as a file of one rank holds them: with names, and nothing that only ``ShardedLion`` reads."""
        packed = [{key: value for key, value in g.items() if key != "process_group"} for g in self.packed_groups()]
        names = [[self.names[param] for param in group["params"]] for group in self.param_groups]
        return [group | {"param_names": members} for group, members in zip(packed, names, strict=True)]
