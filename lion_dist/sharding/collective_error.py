"""What a rank was doing when it lost the others, where the backend says "Application timeout caused pair closure"."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

REMEDY = (
    "Another rank has ended (its own log says why), or it runs other collectives than this one: ranks must call "
    "step(), clip_grad_norm_(), grad_norm(), metrics(), check_replicas(), resync_params() and add_param_group() "
    "equally often and in one order, and run as many synchronized backward passes (outside of no_sync())."
)


class CollectiveError(RuntimeError):
    """A collective failed, or another rank did not come to it in time. ``__cause__`` is the backend's error.

    Whoever knows more of what this rank was doing adds it with :meth:`during` while the error passes by.

    Attributes:
        doing: from the collective outwards, e.g. ``["all_to_all_single", "summing the gradients of ...", "step()"]``.
    """

    def __init__(self, collective: str, group: ProcessGroup, backend_says: str):
        super().__init__(collective, backend_says)
        self.doing = [collective]
        self.backend_says, self.timeout = backend_says, timeout_of(group)

    @property
    def is_explained(self) -> bool:
        """Whether it says more than the collective."""
        return len(self.doing) > 1

    def during(self, what: str) -> None:
        self.doing.append(what)

    def __str__(self) -> str:
        rank = f"rank {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "this process"
        limit = f"the group's time-out is {self.timeout.total_seconds():g} s"
        where = f"{rank} waited in vain for other ranks ({limit}): {', '.join(self.doing)}."
        return f"{where} {REMEDY} The backend says: {self.backend_says}"


def timeout_of(group: ProcessGroup) -> timedelta:
    """How long ``group`` waits for a rank. Backends for tests have no options: torch's default."""
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", distributed_c10d.default_pg_timeout)


def attempt(collective: Callable, *args, group: ProcessGroup, **kwargs):
    """``collective(...)``; a failure of the backend comes out as CollectiveError. (Where each call counts, inline.)"""
    try:
        return collective(*args, group=group, **kwargs)
    except RuntimeError as error:
        raise explained(error, collective.__name__, group) from error


def explained(error: RuntimeError, collective: str, group: ProcessGroup) -> CollectiveError:
    """For what torch.distributed raises. Memory that has run out is no other rank's fault, and is raised as it is."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return CollectiveError(collective, group, f"{error!s:.300}")
