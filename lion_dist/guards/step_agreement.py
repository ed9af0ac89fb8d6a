"""Do all ranks take the same step? What each multiplies with, and which parameters it trains, compared in every step.

At construction ranks compare everything (``agreement.py``). Later a program may set a learning rate, a divisor or a
norm to clip by on some ranks only. Nothing would say so: each rank updates its own shard, and all ranks gather the same
wrong parameters; or, where shards have replicas, those drift apart.

So one number more travels in the message that a step sends anyway: a hash of all these values. Hashes are integers
small enough that their sum over ranks is exact in fp64, and a rank compares it with ``ranks * its own``. If all are
equal, it is; if they are not, it could be by accident on a few ranks of 2^40 steps.

On a CPU the comparison comes at once. On a GPU the host does not wait for it: it is copied to the host, and read when
the next step compares, by then long there. Only then do ranks tell each other their values, to name what differs. They
do so through the store in which they have met, for ranks that find a difference may be at different places by then.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from lion_dist.guards.agreement import Entry
from lion_dist.guards.step_choices import RankChoices, StepChoices
from lion_dist.sharding import collectives
from lion_dist.sharding.process_groups import RankGroups

HASH_BITS = 40
PATIENCE = timedelta(seconds=60)  # with a rank that does not say what it has: it may have ended

_ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)


class DisagreementError(RuntimeError):
    """Ranks multiply with different numbers, or train different parameters; raised on every rank."""


@dataclass(frozen=True)
class _Message:
    """This rank's part of one message, for as long as nobody has looked at its sum."""

    number: int
    choices: StepChoices
    own: Tensor  # [1] fp64


class StepAgreement:
    """Compares what the ranks of ``groups`` have chosen, once a message; all ranks call everything together."""

    def __init__(self, groups: RankGroups, device: torch.device, choices: RankChoices):
        self._groups, self._device, self._choices = groups, device, choices
        # Ranks that are only pretended send nothing.
        self._is_on = groups.num_ranks > 1 and all(dist.get_backend(axis) != "fake" for axis in groups.axes)
        self._nothing = torch.zeros(0, dtype=torch.float64, device=device)
        self._bits = min(HASH_BITS, 52 - groups.num_ranks.bit_length())
        self._messages = 0
        self._last: tuple[int, Tensor] | None = None  # the last hash of choices without tensors, and it on the device
        self._message: _Message | None = None
        self._copied: torch.cuda.Event | None = None  # when the outcome of _message is on the host
        self._on_host: Tensor | None = None

    def begin(self) -> Tensor:
        """[1] fp64 on the device, to be summed over all ranks and given to :meth:`end`; [0] where nothing is compared.

        Raises:
            DisagreementError: the last message has shown a difference, on a GPU.
        """
        if not self._is_on:
            return self._nothing
        self.wait()
        self._messages += 1
        choices = self._choices.now()
        self._message = _Message(self._messages, choices, self._hash(choices))
        return self._message.own

    def end(self, total: Tensor) -> None:
        """``total``: the sum over ranks.

        Raises:
            DisagreementError: there is a difference, on a CPU.
        """
        if not self._is_on:
            return
        differs = torch.sub(total, self._message.own, alpha=self._groups.num_ranks)
        if not differs.is_cuda:
            self._on_host = differs
            self.wait()
        elif self._is_captured():  # what is replayed is not looked at
            self._message = None
        else:
            if self._copied is None:
                self._copied, self._on_host = torch.cuda.Event(), torch.empty(1, dtype=torch.float64, pin_memory=True)
            self._on_host.copy_(differs, non_blocking=True)
            self._copied.record()

    def wait(self) -> None:
        """Look at what the last message has shown.

        Raises:
            DisagreementError: a difference.
        """
        if self._message is None or self._is_captured():
            return
        message, self._message = self._message, None
        if self._copied is not None:
            self._copied.synchronize()
        if self._on_host.item():
            raise DisagreementError(_say(self._everybodys(message)))

    def exchange(self) -> None:
        """:meth:`begin` and :meth:`end`, by a message of its own."""
        if self._is_on:
            total = self.begin().clone()
            for axis in self._groups.axes:
                collectives.all_reduce(total, axis)
            self.end(total)

    def end_step(self) -> None:
        """The step's updates have been made with what :class:`RankChoices` finds now."""
        if self._is_on:
            self._choices.end_step()

    def _hash(self, choices: StepChoices) -> Tensor:
        digest = hashlib.blake2b(repr(choices).encode(), digest_size=8).digest()
        number, tensors = int.from_bytes(digest) >> (64 - self._bits), choices.tensors()
        if tensors:
            return hash_on_device(tensors, number, self._bits, self._device)
        if self._last is not None and self._last[0] == number:  # most steps are like the one before
            return self._last[1]
        own = torch.full((1,), float(number), dtype=torch.float64, device=self._device)
        if not self._is_captured():  # its memory would be the graph's
            self._last = number, own
        return own

    def _is_captured(self) -> bool:
        """Whether a CUDA graph records this step."""
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _everybodys(self, message: _Message) -> list[tuple[int, list[Entry]]]:
        """(global rank, its entries) of every rank, as far as they say so in time; in the order of ranks."""
        everybody = [(dist.get_rank(), message.choices.entries())]
        for axis in self._groups.axes:
            everybody = [one for some in _exchange(everybody, axis, message.number) for one in some]
        return sorted(everybody)


def hash_on_device(tensors: Sequence[Tensor], number: int, bits: int, device: torch.device) -> Tensor:
    """[1] fp64, an integer below 2^bits: of ``number`` and the values of ``tensors``, each [] or [1]."""
    values = torch.stack([tensor.reshape(()).to(device, torch.float64) for tensor in tensors]).view(torch.int64)
    total = torch.full((), number, dtype=torch.int64, device=device)
    for value in values.unbind():  # each mixed with those before: so it matters which is which
        total = (total ^ (value ^ (value >> 32))) * _signed(_ODD[0])
        total = (total ^ (total >> 29)) * _signed(_ODD[1])
    return ((total >> 20) & (2**bits - 1)).double().reshape(1)


def _signed(word: int) -> int:
    return word - 2**64


def _exchange(value: object, axis: ProcessGroup, number: int) -> list:
    """Every rank's ``value``, through the store; without those of ranks that do not come."""
    store = distributed_c10d._get_default_store()
    keys = [f"{axis.group_name}/disagreement {number}/{rank}" for rank in range(axis.size())]
    store.set(keys[axis.rank()], pickle.dumps(value))
    values = []
    for key in keys:
        try:
            store.wait([key], PATIENCE)
        except RuntimeError:  # it has ended, or it is stuck: the others' values are enough for an error
            continue
        values.append(pickle.loads(store.get(key)))
    return values


def _say(everybody: list[tuple[int, list[Entry]]]) -> str:
    first, reference = everybody[0]
    for rank, entries in everybody[1:]:
        for (name, mine), (_, theirs) in zip(reference, entries, strict=False):
            if repr(mine) != repr(theirs):
                return (
                    f"ranks do not take the same step: {name} is {theirs!r} on rank {rank} and {mine!r} on rank "
                    f"{first}. Set it alike on every rank: from the same numbers, or broadcast from one rank."
                )
    return (
        "ranks do not take the same step: a value on the device (a learning rate, a divisor, a loss scale) differed; "
        f"they have become equal since, or ranks other than {[rank for rank, _ in everybody]} have the difference."
    )
