"""A whole training step of ``ShardedLion`` as one CUDA graph.

What is in the graph, in this order: the all-gather of the parameters that the step before has updated, bucket by bucket
beside the forward; forward, backward and the reductions; clipping, the check and the update. So the gather of step n
is at the head of the graph of step n + 1, where it stays hidden, and between two replays **parameters are stale**: each
rank holds its own shard's new values and the others' old ones. Whatever comes between (an evaluation, a checkpoint, an
eager step) waits for parameters as it always does, by the module's hooks or ``finish_param_sync()``; the difference is
that the gather starts only then, so all ranks have to come to it. The next replay gathers once more, which changes
nothing.

Alternatives considered:

* The gather at the end of the graph: it is exposed there, 0.8 to 2.8 ms of a step of 40.
* Two graphs, of which one gathers: a second launch, and the gather no longer overlaps the forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lion_dist.param_sync import LeaveStale
from lion_dist.sharded_lion import ShardedLion

Output = TypeVar("Output")


class CapturedStep(Generic[Output]):
    """Calls ``step`` eagerly a few times, then captures it in a CUDA graph and replays that.

    Every call is one training step, whatever it is made of::

        def step(tokens):
            loss = model(tokens)
            loss.backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        train_step = CapturedStep(step, optimizer)
        for tokens in batches:
            loss = train_step(tokens)

    A learning rate or weight decay that changes between steps has to be a tensor on the device, which schedulers of
    torch fill in place: ``ShardedLion(..., lr=torch.tensor(1e-4, device="cuda"))``. A float is part of the graph.

    Args:
        step: takes tensors and returns tensors (any structure of them). It runs forward, backward and
            ``optimizer.step()``, and must not wait for the device.
        optimizer: the one that ``step`` steps.
        warm_up: eager calls before the capture; lazily made state (tables, communicators) has to exist by then.
        pool: of ``torch.cuda.graph_pool_handle()``, to share memory with other graphs; None: one of its own.

    Raises:
        ValueError: the optimizer does in each step what cannot be captured.
    """

    def __init__(
        self,
        step: Callable[..., Output],
        optimizer: ShardedLion,
        *,
        warm_up: int = 3,
        pool: tuple[int, int] | None = None,
    ):
        _refuse_what_cannot_be_captured(optimizer)
        if not isinstance(warm_up, int) or warm_up < 1:
            raise ValueError(f"warm_up must be a whole number of eager steps of at least 1, got {warm_up!r}")
        self._step, self._optimizer, self._left = step, optimizer, warm_up
        self._pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self._stream = torch.cuda.Stream(optimizer.buckets[0].device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs = None
        self._constants: list[tuple] = []

    def __call__(self, *inputs: Tensor) -> Output:
        """One training step. From the capture on, what it returns is overwritten by the next call.

        Raises:
            RuntimeError: something that the graph holds as a constant has changed since the capture.
            ValueError: inputs of another number, shape, dtype or device than those that were captured.
        """
        if self._graph is None and self._left:
            self._left -= 1
            return self._on_own_stream(lambda: self._step(*inputs))
        if self._graph is None:
            self._capture(inputs)
        else:
            self._check_constants()
            self._copy_in(inputs)
        self._optimizer.before_replay()
        self._graph.replay()
        self._optimizer.after_replay()
        return self._outputs  # pyrefly: ignore[bad-return] # the capture has set them

    def _on_own_stream(self, function: Callable[[], Output]) -> Output:
        """Autograd remembers the stream on which a parameter's gradient is first accumulated: the capture's."""
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            output = function()
        outer.wait_stream(self._stream)
        return output

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        optimizer, graph = self._optimizer, torch.cuda.CUDAGraph()
        optimizer.finish_param_sync()
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        self._constants = _constants_of(optimizer)
        # thread_local: NCCL's watchdog asks for its events in another thread.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        outer = torch.cuda.current_stream(self._stream.device)
        try:
            with capture, optimizer.capturing(LeaveStale()):
                self._outputs = self._step(*self._inputs)
        except BaseException:  # nothing has run: parameters are as they were, but their gather was only captured
            for bucket in optimizer.buckets:
                bucket.leave_stale()
            self._undo_begin(outer)
            raise
        self._graph = graph

    def _undo_begin(self, outer: torch.cuda.Stream) -> None:
        """Where a capture was invalidated, its end fails in torch 2.11 before it has given back the stream and told the
        allocator, which then fails whenever it would free memory, and aborts the process at its exit."""
        torch.cuda.set_stream(outer)
        with contextlib.suppress(RuntimeError):  # "not currently recording": the capture did end
            torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)

    def _copy_in(self, inputs: tuple[Tensor, ...]) -> None:
        found = [(tuple(tensor.shape), tensor.dtype) for tensor in inputs]
        captured = [(tuple(tensor.shape), tensor.dtype) for tensor in self._inputs]
        if found != captured:
            raise ValueError(
                f"the step was captured over inputs {captured}, got {found}. Pad the batch, or call the step itself "
                "for this one."
            )
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor, non_blocking=True)

    def _check_constants(self) -> None:
        now = _constants_of(self._optimizer)
        if now != self._constants:
            before, after = next(pair for pair in zip(self._constants, now, strict=False) if pair[0] != pair[1])
            raise RuntimeError(
                f"the captured step holds {before[0]} = {before[1]} as a constant, and it is {after[1]} now. Give lr "
                "and weight_decay as tensors on the device; after other changes make a new CapturedStep."
            )


def _constants_of(optimizer: ShardedLion) -> list[tuple]:
    constants = []
    for i, group in enumerate(optimizer.param_groups):
        for key in ("lr", "weight_decay", "betas", "max_lr"):
            value = group.get(key)
            constants.append((f"{key} of param group {i}", "a tensor" if isinstance(value, Tensor) else value))
        trained = sum(param.requires_grad for param in group["params"])
        constants.append((f"the number of trained parameters of param group {i}", trained))
    return constants


def _refuse_what_cannot_be_captured(optimizer: ShardedLion) -> None:
    if not isinstance(optimizer, ShardedLion):
        raise ValueError(
            f"CapturedStep is for ShardedLion, got a {type(optimizer).__name__}. Other optimizers leave nothing in "
            "flight between steps: use torch.cuda.graph."
        )
    if not optimizer.buckets:
        raise ValueError(
            "CapturedStep records the update of trained parameters, and this ShardedLion has none: all are frozen. Set "
            "requires_grad before it is made, or call the step itself."
        )
    if optimizer.buckets[0].device.type != "cuda":
        raise ValueError(
            f"CUDA graphs need parameters on a GPU, got {optimizer.buckets[0].device}. Call the step itself."
        )
    sharding = optimizer.sharding
    reasons = {
        'param_sync="coded" reads the length of its messages on the host; use param_sync="gather"': (
            sharding.param_sync == "coded"
        ),
        "update_in_backward=True gathers parameters inside backward; use update_in_backward=False": (
            sharding.update_in_backward
        ),
        f"check_replicas_every={sharding.check_replicas_every} counts steps on the host; use 0, and check_replicas()": (
            sharding.check_replicas_every > 0
        ),
        f"metrics_every={optimizer.metrics_every} counts steps on the host; use 0": optimizer.metrics_every > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"this ShardedLion cannot be captured: {reason}.")
