"""Update a bucket from within backward, as soon as its gradients have been reduced."""

from __future__ import annotations

from collections.abc import Callable

from lion_dist.sharding.bucket import Bucket, GradState
from lion_dist.sharding.comm_stream import CommStream


class BackwardUpdates:
    """Called with each bucket whose reduction has just been started; sees to it that ``update(bucket)`` follows.

    On a CUDA stream the update joins the queue at once, behind the reduction. On a CPU only the host can wait, so a
    bucket is updated when the next one's reduction is under way; or, where backward may not wait, at its end.
    """

    def __init__(self, stream: CommStream, update: Callable[[Bucket], None], may_wait: bool = True):
        self.stream, self._update, self._may_wait = stream, update, may_wait
        self.begun: set[Bucket] = set()  # in this step
        self._waiting: list[Bucket] = []

    def __call__(self, bucket: Bucket) -> None:
        if bucket in self.begun:
            raise RuntimeError(
                "a second synchronized backward pass in one step: with update_in_backward=True the first has updated "
                "the parameters. Put every backward pass of a step but the last inside no_sync()."
            )
        self.begun.add(bucket)
        if self.stream.stream is not None:
            with self.stream.fork():
                self._update(bucket)
            return
        self._waiting.append(bucket)
        if len(self._waiting) > 1 and self._may_wait:
            self._update(self._waiting.pop(0))

    def finish(self) -> None:
        """Every bucket that was begun is updated."""
        while self._waiting:
            self._update(self._waiting.pop(0))

    def refuse_reduced_since(self) -> None:
        """Raise RuntimeError when a bucket that has been updated has gradients of this step again."""
        for bucket in self.begun:
            if bucket.grad_state is not GradState.EMPTY:
                raise RuntimeError(
                    f"bucket of {bucket.names[0]!r}: a backward pass inside no_sync() followed the one that updated "
                    "its parameters, and would not count. With update_in_backward=True the last backward of a step is "
                    "the one outside of no_sync(). Call zero_grad() on every rank."
                )

    def forget_step(self) -> None:
        self._waiting = [bucket for bucket in self._waiting if not bucket.is_interrupted]
        try:
            self.finish()  # what has begun is not half a step
        finally:
            self._waiting.clear()
            self.begun.clear()
