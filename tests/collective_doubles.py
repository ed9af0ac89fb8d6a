"""Stand-ins for ``lion_dist.sharding.collectives`` that record, delay, or make an early read visible."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch import Tensor

from lion_dist.sharding import collectives


@contextlib.contextmanager
def recorded_reductions(events: list | None = None) -> Iterator[list]:
    """Appends ("reduce", elements of the bucket) when a reduce-scatter starts."""
    events = [] if events is None else events
    original = collectives.reduce_scatter

    def reduce_scatter(output, flat, group, **settings):
        events.append(("reduce", flat.numel()))
        return original(output, flat, group, **settings)

    with mock.patch.object(collectives, "reduce_scatter", reduce_scatter):
        yield events


@contextlib.contextmanager
def poisoned_gathers(events: list | None = None) -> Iterator[list]:
    """A gather that is under way reads as NaN wherever it may not be read, and ends when somebody waits for it.

    Appends ("gather starts", elements) and ("gather ends", elements).
    """
    events = [] if events is None else events
    original = collectives.all_gather

    def all_gather(flat: Tensor, shard: Tensor, group):
        events.append(("gather starts", flat.numel()))
        mine = shard.clone()
        flat.fill_(float("nan"))
        shard.copy_(mine)

        def finish() -> None:
            events.append(("gather ends", flat.numel()))
            original(flat, shard, group)()

        return finish

    with mock.patch.object(collectives, "all_gather", all_gather):
        yield events
