"""Schedules of ``torch.distributed.pipelining``: which of a step's backward passes sends gradients.

A schedule runs one backward pass for each micro-batch and stage of this rank. Under ZeRO stage 1 gradients add up on
their rank, and only the last pass of a step sends them. torch's stages tell that to DDP and FSDP alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed.pipelining.stage import _PipelineStageBase

from lion_dist.sharded_lion import ShardedLion


def reduce_in_last_backward(optimizer: ShardedLion, *stages: _PipelineStageBase) -> Callable[[], None]:
    """Let a schedule over ``stages``, all those of this rank, send gradients in its last backward pass only.

    Under ZeRO stage 2 every pass sends, as it does within ``no_sync()``. Not for schedules that compute gradients of
    weights apart from backward (zero bubble): call those within ``optimizer.no_sync()``, and
    ``optimizer.backward_without_batch()`` after.

    Returns:
        what undoes it.

    Raises:
        TypeError: ``stages`` are no stages of ``torch.distributed.pipelining``.
    """
    for stage in stages:
        if not isinstance(stage, _PipelineStageBase) or not hasattr(stage, "backward_maybe_with_nosync"):
            raise TypeError(f"a stage of torch.distributed.pipelining is expected, got {type(stage).__name__}")
    finished: set[int] = set()  # stages whose last backward of this step has begun

    def wrap(number: int, backward: Callable) -> Callable:
        def wrapped(backward_type: str, bwd_kwargs: dict, last_backward: bool = False) -> Any:
            if last_backward:
                finished.add(number)
            if len(finished) < len(stages):
                with optimizer.no_sync():
                    return backward(backward_type, bwd_kwargs, last_backward=last_backward)
            finished.clear()
            return backward(backward_type, bwd_kwargs, last_backward=last_backward)

        return wrapped

    for number, stage in enumerate(stages):
        stage.backward_maybe_with_nosync = wrap(number, stage.backward_maybe_with_nosync)

    def undo() -> None:
        for stage in stages:
            del stage.backward_maybe_with_nosync

    return undo
