"""The ranks that save or load together: what fails on one fails on all, so that none waits for a rank that gave up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from lion_dist.checkpoint.errors import CheckpointError
from lion_dist.sharding.collectives import gather_objects
from lion_dist.sharding.process_groups import backend_for

T = TypeVar("T")
# CheckpointException is torch.distributed.checkpoint's, and derives from BaseException.
FAILURES = (Exception, CheckpointException)

_group_of_world: tuple[Any, Any] | None = None  # process groups: the default one, and the one made for it


class Ranks:
    """All ranks of the default process group, on a gloo group of their own; or this process alone (group None).

    A group of its own because a save in the background must not mix with the collectives of training, and because
    plans and verdicts are host objects.
    """

    def __init__(self, group: ProcessGroup | None):
        self.group = group

    @classmethod
    def here(cls) -> Ranks:
        """Every rank takes part. The first call in a process group makes the gloo group, and so does the first one
        after a failed exchange, which leaves a gloo group broken for good.

        Its time-out is torch's default (30 minutes), not that of training's group: ranks wait in it while others write,
        and a slow file system must not fail a save. So they meet in training's group first, where a rank that has died
        is found as soon as in a step, and agree on whether to connect: an exchange may fail on some of them only.
        Where training's group carries no CPU tensors (NCCL alone) they do not: it may have no communicator of all ranks
        yet, which takes memory on every GPU, and this rank's GPU need not be the current one.

        Raises:
            CheckpointError: a rank did not come.
        """
        global _group_of_world
        if not dist.is_initialized():
            return cls(None)
        world = dist.group.WORLD
        is_connected = _group_of_world is not None and _group_of_world[0] is world
        with _explained():
            training = world if backend_for(world, torch.device("cpu")) == "gloo" else None
            if not all(gather_objects(is_connected, training)):
                _group_of_world = world, dist.new_group(backend="gloo")
        return cls(_group_of_world[1])

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value`` (a small picklable object), in rank order, on every rank."""
        if self.group is None:
            return [value]
        with self.exchanging():
            return gather_objects(value, self.group)

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Around collectives: a failure of theirs comes out as CheckpointError, and the next save makes a new group."""
        global _group_of_world
        try:
            with _explained():
                yield
        except CheckpointError:
            if _group_of_world is not None and _group_of_world[1] is self.group:
                _group_of_world = None
            raise

    def agree(self, function: Callable[[], T]) -> T:
        """Call ``function`` on every rank; it must not communicate.

        Raises:
            CheckpointError: on every rank, when it failed on any.
        """
        result: Any = None
        failure = None
        try:
            result = function()
        except FAILURES as error:
            failure = error
        messages = self.gather(None if failure is None else describe(failure))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed:
            where = "" if self.size == 1 or len(failed) == self.size else f"rank {failed[0]}: "
            raise CheckpointError(where + messages[failed[0]]) from failure
        return result

    def on_first(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the first rank; every rank gets its (small, picklable) result, or its error."""
        result: Any = self.agree(lambda: function() if self.is_first else None)
        return self.gather(result)[0]


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises
        raise CheckpointError(
            "the ranks lost each other while they saved or loaded: one of them died, came too late or did not come. "
            "Look at the log of the one that says something else. If all of them go on, the next save connects them "
            f"anew; if it fails too, restart from the newest checkpoint. {describe(error)}"
        ) from error


def describe(failure: BaseException) -> str:
    """What went wrong, without the layers around it."""
    if isinstance(failure, CheckpointError):
        return str(failure)
    if isinstance(failure, CheckpointException):
        rank, (cause, _) = min(failure.failures.items())
        return f"rank {rank}: {describe(cause)}"
    return f"{type(failure).__name__}: {failure}"
