"""The launches of a ``Lion`` step: parameters of one group that are alike, flattened, and known from the last step."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lion_dist.adopted_state import fits
from lion_dist.averages import KIND as AVERAGE
from lion_dist.kernels.update import LionTensors
from lion_dist.local_shard import check_memory, flat, local_tensor
from lion_dist.param_checks import check_grad, check_no_overlap
from lion_dist.update_batch import STATE_KEYS, GlobalIndex, KnownBatches, OwnWrites, UpdateBatch

if TYPE_CHECKING:
    from lion_dist.lion import Lion
    from lion_dist.optional_guards import GuardsOfLion

_grad = operator.attrgetter("grad")


class LionBatches:
    """Sorts the parameters of ``optimizer`` into launches, and keeps them while parameters, gradients and state stay.

    Attributes:
        own_writes: which writes of parameters were the optimizer's.
    """

    def __init__(self, optimizer: Lion, guards: GuardsOfLion):
        self._optimizer, self._guards = optimizer, guards
        self.own_writes = OwnWrites()
        self._known: dict[int, KnownBatches] = {}  # by id of the param group, from the last step
        self._index: GlobalIndex | None = None  # of the known batches; None: no random bits were drawn

    def of(self, group: dict) -> list[tuple[UpdateBatch, Sequence[Tensor]]]:
        """The group's parameters that have a gradient, in batches of like tensors (one launch each), and gradients."""
        params = group["params"]
        grads = list(map(_grad, params))
        types = set(map(type, grads))
        if type(None) in types:
            types.discard(type(None))
            params, grads = [p for p in params if p.grad is not None], [g for g in grads if g is not None]
        known = self._known.get(id(group))
        if known is None or not known.holds(params):
            self._guards.check_group(group, is_first_step=not self._known)
            if known is not None:
                self.own_writes.take_over(known.batches)
            known = KnownBatches(params)
        grads = known.placements.local_grads(grads, types)
        matched = known.match(grads, self._optimizer.state)
        if matched is None:
            self.own_writes.take_over(known.batches)
            self._create_states()  # all at once: a group's that comes later would outdate this group's batches
            matched = self._sort(params, grads)
            known.set_batches([batch for batch, _ in matched], self._optimizer.state)
            self._known[id(group)] = known
        return matched

    def forget(self) -> None:
        """State or parameters were replaced: make every batch anew."""
        self._known.clear()

    def follow_moved_params(self) -> None:
        """Global indices count all parameters: where one was swapped, added or removed, those behind it moved."""
        if self._index is None or self._index.holds_for(self._optimizer.param_groups):
            return
        for known in self._known.values():
            self.own_writes.take_over(known.batches)
        self._known.clear()
        self._index = None

    def _create_states(self) -> None:
        """Make the state of every parameter with a gradient. State that a user put there, or of a parameter that has
        changed dtype or device, is made to fit."""
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                check_memory(local_tensor(param), "a parameter")
                state = optimizer.state_of(param)
                if not fits(param, state, optimizer.precision.state_dtypes(param.dtype)):
                    optimizer.state[param] = optimizer.adopt_state(param, state)

    def _sort(self, params: list[Tensor], grads: Sequence[Tensor]) -> list[tuple]:
        alike: dict[tuple, list[int]] = {}
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            check_grad(param, grad)
            check_no_overlap(param, "a parameter")
            alike.setdefault((grad.device, param.dtype, grad.dtype), []).append(i)
        result = []
        for (_, _, grad_dtype), positions in alike.items():
            members = [params[i] for i in positions]
            states = [self._optimizer.state_of(p) for p in members]
            tensors = self._flatten(members, states)
            batch = UpdateBatch(positions, members, states, tensors, grad_dtype, self.own_writes)
            result.append((batch, [grads[i].contiguous() for i in positions]))
        return result

    def _flatten(self, params: list[Tensor], states: list[dict]) -> LionTensors:
        optimizer = self._optimizer
        columns = {key: [flat(s[key]) for s in states] for key in STATE_KEYS[:3] if key in states[0]}
        index = steps = None
        if "step" in states[0]:
            if self._index is None:
                self._index = GlobalIndex(optimizer.param_groups)
            index, steps = self._index, torch.stack([s["step"] for s in states])
            for state, step in zip(states, steps.unbind(), strict=True):  # views: one addition counts all
                state["step"] = step
        return LionTensors(
            params=[flat(p) for p in params],
            exp_avgs=columns["exp_avg"],
            mains=columns.get("main_param"),
            averages=columns.get(AVERAGE),
            ema_decay=optimizer.rule.ema_decay,
            index_starts=None if index is None else [index.of(p) for p in params],
            steps=steps,
            stochastic_momentum=optimizer.precision.momentum_rounding == "stochastic"
            and states[0]["exp_avg"].dtype == torch.bfloat16,
        )
