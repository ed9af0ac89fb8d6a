"""What one launch of ``Lion`` updates, flattened once, and the cheap question whether that still holds.

``Lion.step()`` asks it of every parameter at every step, so it is asked of whole lists by ``map``: half the host time
of looking at one parameter after the other.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lion_dist.grad_placement import GradPlacements
from lion_dist.kernels.update import LionTensors
from lion_dist.local_shard import LocalShard, local_tensor, local_tensors
from lion_dist.main_params import sync_main_param_

_shape, _layout, _dtype, _version = map(operator.attrgetter, ("shape", "layout", "dtype", "_version"))
_exp_avg = operator.itemgetter("exp_avg")
STATE_KEYS = ("exp_avg", "main_param", "weight_avg", "step")


def same_objects(some: Collection, others: Collection) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _params_of(groups: Sequence[dict]) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


class GlobalIndex:
    """The global element index (``sharding/layout.py``) of the first element here of each parameter, counted once."""

    def __init__(self, groups: Sequence[dict]):
        self._params = _params_of(groups)
        ends = itertools.accumulate(p.numel() for p in self._params)
        self._starts = dict(zip(self._params, itertools.chain([0], ends), strict=False))

    def of(self, param: Tensor) -> int:
        return self._starts[param] + LocalShard.of(param).first_index

    def holds_for(self, groups: Sequence[dict]) -> bool:
        """Whether the groups have the parameters that were counted, in their order."""
        return same_objects(_params_of(groups), self._params)


class OwnWrites:
    """After our last write of each parameter: its version counter, and where it was. Batches know it for theirs."""

    def __init__(self):
        self._marks: dict[int, tuple[int | None, int]] = {}  # by id of the parameter

    def note(self, param: Tensor) -> None:
        """Fresh main params equal ``param``."""
        self._marks[id(param)] = param._version, local_tensor(param).data_ptr()

    def forget(self, param: Tensor) -> None:
        self._marks.pop(id(param), None)

    def take_over(self, batches: Iterable[UpdateBatch]) -> None:
        """Keep what ``batches`` know, for those that take their place."""
        for batch in batches:
            if batch.has_fp32_main:
                marks = zip(batch.written, batch.addresses, strict=True)
                self._marks.update(zip(map(id, batch.params), marks, strict=True))

    def versions(self, params: Sequence[Tensor], addresses: Sequence[int]) -> list[int | None]:
        """The version counter after our last write of each; None where that was elsewhere, or is unknown."""
        marks = [self._marks.get(id(param), (None, None)) for param in params]
        return [version if at == now else None for (version, at), now in zip(marks, addresses, strict=True)]


class UpdateBatch:
    """What one launch updates: parameters of one group alike in device, dtype and gradient dtype.

    Args:
        positions: of ``params`` among the group's parameters that have a gradient.
        states: their optimizer state.
        tensors: the flattened params and state.
        own_writes: where to look up who has written the parameters.

    Attributes:
        addresses: where the local memory of each parameter begins.
        has_fp32_main: there are fp32 main params, which follow parameters that somebody else writes.
        written: then, the version counter that our last step left on each parameter; None: unknown.
    """

    def __init__(
        self,
        positions: list[int],
        params: list[Tensor],
        states: list[dict],
        tensors: LionTensors,
        grad_dtype: torch.dtype,
        own_writes: OwnWrites,
    ):
        self.positions, self.params, self.states, self.tensors = positions, params, states, tensors
        local = local_tensors(params)
        alike = {
            _layout: torch.strided,
            _dtype: grad_dtype,
            Tensor.get_device: tensors.params[0].get_device(),  # a quarter of the time that .device takes; a CPU is -1
            Tensor.is_contiguous: True,
        }
        self._expected = {_shape: list(map(_shape, local))} | {ask: [a] * len(local) for ask, a in alike.items()}
        self._are_plain = local is params  # and stay so: a DTensor in their place would be at address 0
        self.addresses = self._addresses_of(params)
        self.has_fp32_main = tensors.mains is not None and tensors.mains[0].dtype == torch.float32
        self.written = own_writes.versions(params, self.addresses) if self.has_fp32_main else []
        self._exp_avg_addresses = self._addresses_of(map(_exp_avg, states))
        others = [operator.itemgetter(key) for key in STATE_KEYS[1:] if key in states[0]]
        self._other_state = [(get, list(map(get, states))) for get in others]
        # Non-contiguous parameters are updated in a copy, and the copy is made anew at each step. (What is contiguous
        # stays so at its address, unless somebody transposes a square matrix in place: still_holds() looks.)
        self.copied = [(p, copy) for p, copy in zip(local, tensors.params, strict=True) if not p.is_contiguous()]

    @functools.cached_property
    def full_numels(self) -> Tensor:
        """[T] int64 on the device: elements of the full parameters, of which this rank may hold shards."""
        return torch.tensor([param.numel() for param in self.params]).to(self.tensors.device)

    def _addresses_of(self, tensors: Iterable[Tensor]) -> list[int]:
        return list(map(Tensor.data_ptr, tensors if self._are_plain else map(local_tensor, tensors)))

    def still_holds(self) -> bool:
        """Parameters and state are where they were: a user may put others in their place."""
        local = self.params if self._are_plain else local_tensors(self.params)
        if self.copied or list(map(Tensor.data_ptr, local)) != self.addresses:
            return False
        return all(map(Tensor.is_contiguous, local)) and self._has_its_state()

    def _has_its_state(self) -> bool:
        try:
            if self._addresses_of(map(_exp_avg, self.states)) != self._exp_avg_addresses:
                return False
            return all(all(map(operator.is_, map(get, self.states), kept)) for get, kept in self._other_state)
        except (KeyError, TypeError):  # a user has removed some of it, or put a number in its place
            return False

    def accepts(self, grads: Sequence[Tensor]) -> bool:
        """Local gradients of the right dtype, shape and layout for these parameters."""
        return all(list(map(ask, grads)) == answers for ask, answers in self._expected.items())

    def follow_outside_writes(self) -> None:
        """Let fp32 main params follow parameters that somebody else has written since our last step, or put elsewhere
        (load_state_dict, EMA, ``param.data = ...``)."""
        if not self.has_fp32_main:
            return
        versions = list(map(_version, self.params))
        if versions == self.written:
            return
        mains = zip(self.written, versions, self.tensors.params, self.tensors.mains, strict=True)
        for before, now, low_precision, main in mains:
            if before != now:
                sync_main_param_(main, low_precision)

    def end_update(self) -> None:
        """The tensors have been updated: so are the parameters, and their version counters say it."""
        for param, copy in self.copied:
            param.copy_(copy.view_as(param))
        torch.autograd.graph.increment_version(self.params)  # the Triton kernel writes behind autograd's back
        if self.has_fp32_main:
            self.written = list(map(_version, self.params))


class KnownBatches:
    """The batches of one param group, as long as the same parameters have gradients and the same state."""

    def __init__(self, params: Sequence[Tensor]):
        self.placements = GradPlacements(params)
        self.batches: list[UpdateBatch] = []
        self._params = list(params)
        self._states: list[dict] | None = None  # all of the optimizer's, when the batches were made

    def set_batches(self, batches: list[UpdateBatch], state: Mapping[Tensor, dict]) -> None:
        """Keep ``batches``, made of these parameters with what is in ``state`` now."""
        self.batches, self._states = batches, list(state.values())

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters that it was made of."""
        return same_objects(params, self._params)

    def match(self, grads: Sequence[Tensor], state: Mapping[Tensor, dict]):
        """[(batch, its local gradients)] when everything is as it was, else None."""
        if self._states is None or not same_objects(state.values(), self._states):
            return None
        result = []
        for batch in self.batches:
            own = grads if len(self.batches) == 1 else [grads[i] for i in batch.positions]
            if not (batch.accepts(own) and batch.still_holds()):
                return None
            result.append((batch, own))
        return result
