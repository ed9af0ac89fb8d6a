"""What refuses or warns of a user's misuse: the seam to ``guards/``, a room that can be removed.

The core calls the methods of one object. Where the room is missing another one has them, and lets everything pass.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from lion_dist.kernels import backends
from lion_dist.sharded_params import ShardedParams
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.grad_norm import GradNorm
from lion_dist.sharding.process_groups import Progress, ShardGroups

if TYPE_CHECKING:
    from lion_dist.ddp_takeover import Takeover
    from lion_dist.guards.lion_guards import LionGuards
    from lion_dist.guards.own_groups import OwnGroups
    from lion_dist.guards.sharded_guards import ShardedGuards
    from lion_dist.lion import Lion
    from lion_dist.sharded_lion import ShardedLion
    from lion_dist.step_gradients import StepGradients

    Guards: TypeAlias = "ShardedGuards | NoGuards"
    BorrowedGroups: TypeAlias = "OwnGroups | GivenGroups"
    GuardsOfLion: TypeAlias = "LionGuards | NoLionGuards"


def make_guards(optimizer: ShardedLion, params: ShardedParams, choices: tuple) -> Guards:
    """``choices``: of the optimizer, which have to be the same on all ranks."""
    if not _has_guards():
        return NoGuards()
    from lion_dist.guards.sharded_guards import ShardedGuards

    return ShardedGuards(optimizer, params, choices)


def make_lion_guards(optimizer: Lion, groups: Sequence[dict] = ()) -> GuardsOfLion:
    """``groups``: param groups that ``optimizer`` has already."""
    if not _has_guards():
        return NoLionGuards()
    from lion_dist.guards.lion_guards import LionGuards

    return LionGuards(optimizer, groups)


class NoLionGuards:
    """The place of ``LionGuards``."""

    def add_group(self, group: dict) -> None: ...

    def check_group(self, group: dict, is_first_step: bool) -> None: ...

    def note_step(self, any_gradients: bool) -> None: ...


class NoAgreement:
    """The place of ``StepAgreement``: ranks do not compare what they multiply with and train."""

    def __init__(self, device: torch.device):
        self._nothing = torch.zeros(0, dtype=torch.float64, device=device)

    def begin(self) -> Tensor:
        return self._nothing

    def end(self, total: Tensor) -> None: ...

    def exchange(self) -> None: ...


class GivenGroups:
    """The place of ``OwnGroups``: collectives run in the program's groups, beside whatever else runs there."""

    def like(self, given: ShardGroups) -> ShardGroups:
        return given

    def give_back(self) -> None: ...


class NoGuards:
    """The place of ``ShardedGuards``, which says what each method is for."""

    agreement: NoAgreement

    def check_group(self, group: dict) -> None: ...

    def check_model(self, taken: Takeover | None) -> None: ...

    def borrow_groups(self, progress: Progress) -> BorrowedGroups:
        return GivenGroups()

    def check_agreement(self, groups: list[dict]) -> None: ...

    def watch(self, gradients: StepGradients, norm: GradNorm) -> None:
        self.agreement = NoAgreement(norm.device)

    def note_params(self) -> None: ...

    def find_wrapper(self) -> str | None: ...

    def before_reducing(self) -> None: ...

    def check_unfrozen(self, params: Sequence[Parameter]) -> None: ...

    def refuse_late_grads(self) -> None: ...

    def check_updated(self, begun: set[Bucket]) -> None: ...

    def check_moved(self, bucket: Bucket, moved: Sequence[int], buckets: Sequence[Bucket]) -> None: ...

    def before_closure(self) -> None: ...

    def check_step(self, leaves_gathers: bool) -> bool:
        return True  # parameters may have moved within the module: nobody has looked

    def note_step(self, buckets: Sequence[Bucket]) -> None: ...

    def end_step(self) -> None: ...

    def close(self) -> None: ...


@functools.cache
def _has_guards() -> bool:
    if backends.has_room("guards"):
        return True
    warnings.warn(
        "lion_dist: this copy has no guards/, so a model or a step that cannot train as it says is not refused. "
        "Install lion-dist anew to change that.",
        stacklevel=4,
    )
    return False
