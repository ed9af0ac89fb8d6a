"""A step that happens inside backward: each bucket is updated as soon as its gradients are reduced."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lion_dist.full_params import FullParams
from lion_dist.shard_state import ShardBatch, UpdateOrder
from lion_dist.sharded_params import ShardedParams
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.scheduler import GradScheduler
from lion_dist.step_gradients import StepGradients
from lion_dist.update_in_backward.updates import BackwardUpdates
from lion_dist.update_terms import UpdateTerms

if TYPE_CHECKING:
    from lion_dist.optional_guards import Guards

_requires_grad = operator.attrgetter("requires_grad")


class BackwardStep:
    """Sees to it that backward updates, and finishes at ``step()`` what backward has not come to.

    Args:
        order: the batches, one a bucket.
        terms: returns what updates are made with now.
        update, send: of a batch, as in a step outside of backward.
    """

    def __init__(
        self,
        params: ShardedParams,
        guards: Guards,
        full_params: FullParams,
        gradients: StepGradients,
        scheduler: GradScheduler,
        stream: CommStream,
        order: UpdateOrder,
        terms: Callable[[], UpdateTerms],
        update: Callable[[ShardBatch, Tensor | None, UpdateTerms], None],
        send: Callable[[ShardBatch], None],
        *,
        may_wait: bool,
    ):
        self._params, self._guards, self._full_params, self._gradients = params, guards, full_params, gradients
        self._scheduler, self._stream, self._order = scheduler, stream, order
        self._terms, self._update, self._send = terms, update, send
        self._updates = BackwardUpdates(stream, self._update_bucket, may_wait)
        self._last_update = stream.new_event()
        scheduler.after_start = self._updates

    @torch.no_grad()
    def _update_bucket(self, bucket: Bucket) -> None:
        batch, params = self._order.batch_of(bucket), self._full_params
        params.note_sync_starts()
        bucket.finish_param_sync()  # one whose modules did not run forward since the last step
        params.follow_outside_writes(batch.shards)
        params.begin_updates([bucket])
        trained, active = [param.requires_grad for param in bucket.params], None
        if not all(trained):
            active = torch.tensor([trained[s.param] for s in bucket.slices], dtype=torch.float32)
            active = active.to(bucket.device, non_blocking=True)
        with bucket.clock.phase("update", bucket.label):
            self._update(batch, active, self._terms())
        self._stream.record_event(self._last_update)
        params.note_updates([bucket], filter(_requires_grad, bucket.params))
        self._send(batch)
        params.end_updates([bucket])

    def finish(self, loss_scale: Tensor | None) -> None:
        """Every bucket has been updated, or its update is queued.

        Raises:
            RuntimeError: inside ``no_sync()``, under a GradScaler, or gradients came after the update.
        """
        if self._scheduler.in_no_sync:
            raise RuntimeError("step() inside no_sync(): the step's last backward pass has to run outside of it")
        if loss_scale is not None:
            raise RuntimeError("a GradScaler judges gradients before the update: use update_in_backward=False with it")
        self._guards.check_updated(self._updates.begun)
        self._scheduler.start_all_but(self._updates.begun)
        with self._stream.fork(), self._gradients.clock.phase("norm"):
            self._guards.agreement.exchange()
            self._stream.record_event(self._last_update)  # it has read a learning rate or divisor on the device, too
        if self._params.unfrozen():
            self._gradients.adopt_unfrozen()
            self._scheduler.start_all_but(self._updates.begun)
        self._updates.finish()
        self._updates.refuse_reduced_since()
        # A learning rate or divisor on the device may be changed from here on; the updates have read it.
        self._stream.wait_event(self._last_update)
        self._stream.release()

    def forget_step(self) -> None:
        self._updates.forget_step()
