"""When gradients move: hooks on autograd, and the order in which reductions start.

A backward pass visits the buckets roughly in reverse; each rank starts their reductions in exactly that
order, whatever became ready first, because collectives of one group must match across ranks. What is still missing at
the end of a pass (parameters unused on this rank) is sent as zeros then.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Sequence

import torch
from torch.autograd import Variable
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from lion_dist.sharding.bucket import Bucket, GradState


def not_traced(function: Callable) -> Callable:
    """``function``, into which torch.compile does not look.

    Hooks run hundreds of times a step, and torch.compiler's full ``disable`` takes 10 us a call. This one takes none,
    but what ``function`` calls may be traced: the rare call that does something goes through the full one. (They are
    not decorators, which would import torch._dynamo together with this module: 0.6 s.)
    """
    return torch.compiler.disable(function, recursive=False)


# Whose hook takes a parameter's gradients. Not an attribute of the parameter: that would be pickled with the model.
_scheduler_of: WeakIdKeyDictionary = WeakIdKeyDictionary()  # Parameter -> weak reference to its GradScheduler


def held_weakly(method: Callable[[Parameter], None]) -> Callable[[Parameter], None]:
    """``method`` as a hook on parameters that does not keep its object alive; without it, it does nothing.

    Python's garbage collector does not see through post-accumulate-grad hooks (torch 2.13): a cycle of parameter, hook,
    scheduler, bucket and parameter would stay for good, and with it the memory of a model that is long forgotten.
    """
    reference, function = weakref.ref(method.__self__), method.__func__  # WeakMethod does the same in Python

    def hook(param: Parameter) -> None:
        alive = reference()
        if alive is not None:
            function(alive, param)

    return hook


class PassEnd:
    """What autograd calls at the end of one backward pass; it drops it uncalled when an exception ends the pass."""

    def __init__(self, finish: Callable[[PassEnd], None]):
        self._finish = finish

    def __call__(self) -> None:
        self._finish(self)


class GradScheduler:
    """Starts the reduction of each bucket from backward, in one order on every rank.

    A bucket's gradients leave when all hooks of its last parameter have run, those that the program has registered
    after this scheduler's too: they see ``.grad``, and may change it.

    Args:
        keep_local_grads: through ``no_sync`` passes gradients stay in ``p.grad`` (stage 1); False reduces always.

    Attributes:
        after_start: called with each bucket whose reduction was started outside ``no_sync``, the last of a step.
    """

    def __init__(self, keep_local_grads: bool):
        self.keep_local_grads = keep_local_grads
        self._hook = not_traced(held_weakly(self._on_grad))
        self._start_ready = torch.compiler.disable(self._start_ready)
        self.in_no_sync = False
        self.is_closed = False
        self._handles: list[RemovableHandle] = []
        self._order: list[Bucket] = []  # the order in which reductions start
        self._place: dict[Parameter, tuple[Bucket, int]] = {}
        self._next = 0  # position in _order of the bucket to start next
        self._started: set[Bucket] = set()  # in this pass
        self._pass_is_open = False
        self._pass_end: weakref.ref[PassEnd] | None = None  # of the pass that is open
        self._was_cut_short = False  # the last pass, by an exception
        self._waits_for_hooks = False  # a bucket is ready, but for later hooks of its last parameter
        self.version = 0  # changes with every gradient that is kept or sent
        self.after_start: Callable[[Bucket], None] | None = None
        self._pending_local = False  # a no_sync pass left gradients behind that no later pass has taken along

    def add_buckets(self, buckets: Sequence[Bucket]) -> None:
        """Buckets in forward order; between steps only."""
        self._order = [*reversed(buckets), *self._order]
        for bucket in buckets:
            for position, param in enumerate(bucket.params):
                self._place[param] = (bucket, position)
                self._handles.append(param.register_post_accumulate_grad_hook(self._hook))
                _scheduler_of[param] = weakref.ref(self)

    @staticmethod
    def refuse_others(params: Sequence[Parameter], names: Sequence[str]) -> None:
        """Raise ValueError when another scheduler would take the gradients of one of ``params``."""
        for param, name in zip(params, names, strict=True):
            other = _scheduler_of.get(param)
            if other is not None and other() is not None:
                gc.collect()  # it may be waiting for no more than that
                if other() is not None:
                    raise ValueError(
                        f"parameter {name!r} belongs to another ShardedLion, whose hooks would take its gradients: "
                        "this one would train nothing. Call the other's close() first."
                    )

    def close(self) -> None:
        """Gradients stay with autograd from here on."""
        self.is_closed = True
        for handle in self._handles:
            handle.remove()
        for param in self._place:
            _scheduler_of.pop(param, None)
        self._handles.clear()

    def bucket_of(self, param: Parameter) -> Bucket:
        return self._place[param][0]

    def place_of(self, param: Parameter) -> tuple[Bucket, int] | None:
        """The bucket of ``param`` and its position there."""
        return self._place.get(param)

    def _on_grad(self, param: Parameter) -> None:
        if self._waits_for_hooks:  # all that were waited for have run
            self._waits_for_hooks = False
            self._start_ready()
        bucket, position = self._place[param]
        if self._pass_is_open and bucket in self._started:
            raise RuntimeError(
                f"parameter {bucket.names[position]!r} received a second gradient in one backward pass, after its "
                "bucket was reduced. Reentrant activation checkpointing does that to shared parameters: use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        if self.in_no_sync and self.keep_local_grads:
            self._pending_local = True
            self.version += 1
            return
        if not self._pass_is_open:
            self.open_pass()
        bucket.register_grad_ready(position)
        if bucket.all_grads_ready():
            if next(reversed(param._post_accumulate_grad_hooks.values())) is self._hook:
                self._start_ready()
            else:
                self._waits_for_hooks = True

    def open_pass(self) -> None:
        """A backward pass begins; its end sends what is still missing.

        Raises:
            RuntimeError: an exception has ended the last pass when a part of its gradients had been reduced.
        """
        if self._pass_is_open:
            return
        if self._was_cut_short and self._started:
            raise RuntimeError(
                "an exception has ended the last backward pass when a part of its gradients had been reduced; those of "
                "another pass cannot be added to them. Call zero_grad() on every rank before the next backward."
            )
        end = PassEnd(self._end_pass)
        Variable._execution_engine.queue_callback(end)
        self._pass_end = weakref.ref(end, self._cut_pass_short)
        self._pass_is_open = True

    def _end_pass(self, end: PassEnd) -> None:
        if self._pass_end is not None and self._pass_end() is end:  # else zero_grad() has run within the pass
            self.finish_pass()

    def _cut_pass_short(self, end: weakref.ref[PassEnd]) -> None:
        if self._pass_end is end:
            self._pass_is_open, self._was_cut_short = False, True

    def _start_ready(self) -> None:
        while self._next < len(self._order) and self._order[self._next].all_grads_ready():
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._order[self._next]
        self._next += 1
        self._started.add(bucket)
        self.version += 1
        self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        bucket.start_grad_sync()
        if self.after_start is not None and not self.in_no_sync:
            self.after_start(bucket)

    def start_all_but(self, begun: Collection[Bucket]) -> None:
        """Start the reductions of a step that backward has not started: of a rank without a batch, of new buckets."""
        buckets = [bucket for bucket in self._order if bucket not in begun]
        for bucket in buckets:  # nothing is updated before it is known that all can be
            bucket.check_grads()
        for bucket in buckets:
            self._start(bucket)
        self._close_pass()

    def finish_pass(self) -> None:
        """Start the reductions that this pass has not started yet: parameters without a gradient count as zeros."""
        for bucket in self._order[self._next :]:  # none is started before it is known that all can be
            bucket.check_grads()
        while self._next < len(self._order):
            self._start_next()
        self._close_pass()

    def _close_pass(self) -> None:
        self._next = 0
        self._started.clear()
        self._pass_end = None
        self._pass_is_open = self._was_cut_short = self._pending_local = self._waits_for_hooks = False

    def finish_backward(self) -> None:
        """Every bucket's gradients of this step have been reduced, or are on their way.

        A rank that had no batch takes part with zeros; gradients that ``no_sync`` passes have left, or that the program
        has written where no pass ran, are sent now. That depends on passes alone and not on what is in ``.grad``, so
        ranks agree on what is sent whichever of them have gradients.
        """
        nothing_reduced = all(bucket.grad_state is GradState.EMPTY for bucket in self._order)
        if nothing_reduced or self._pass_is_open or self._was_cut_short or self._pending_local:
            self.finish_pass()

    def start_added(self) -> None:
        """Start the reductions of buckets that have come since backward ran: of parameters unfrozen in this step."""
        for bucket in self._order:
            if bucket.grad_state is GradState.EMPTY:
                bucket.start_grad_sync()

    def join_backward(self) -> None:
        """This rank has no micro-batch where others run one: it takes part with what is in ``.grad``, or zeros."""
        if self.in_no_sync and self.keep_local_grads:
            self._pending_local = True  # as on the ranks that run it
        else:
            self.finish_pass()

    def reset(self) -> None:
        """Forget the gradients of this step, local ones too."""
        for bucket in self._order:
            bucket.reset_grad()
            for param in bucket.params:
                param.grad = None
        self._close_pass()
