"""A bucket: parameters that are communicated together, and the state of that communication.

The tensors of a bucket, with N = shard_world_size and the geometry of ``layout.py``:

    flat_params  [numel]        the parameters lie in it, each with a storage of its own; full on every rank
    param_shard  [shard_numel]  this rank's part of flat_params, a view
    grad_shard   [shard_numel]  this rank's part of the gradients summed over ranks (and micro-batches)

What moves the bytes is a ``Transport``, which keeps the buffers in which gradients are sent or received.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.nn import Parameter

from lion_dist.grad_placement import local_grads_like
from lion_dist.local_shard import local_tensor, local_tensors
from lion_dist.sharding.buffers import views_of
from lion_dist.sharding.collective_error import CollectiveError
from lion_dist.sharding.collectives import COMPLETED, Work
from lion_dist.sharding.comm_stream import CommStream
from lion_dist.sharding.layout import BucketLayout
from lion_dist.sharding.memory_format import MemoryFormat, move_in
from lion_dist.sharding.phases import NO_CLOCK, PhaseLabels, in_phase
from lion_dist.sharding.process_groups import ShardGroups
from lion_dist.sharding.transport import Transport

_grad, _shape, _layout = map(operator.attrgetter, ("grad", "shape", "layout"))


class GradState(Enum):
    __hash__ = object.__hash__  # Enum's is a function in Python, which every transition would call four times

    EMPTY = "no gradient of this step has been reduced"
    SYNCING = "a reduce-scatter is under way"
    REDUCED = "grad_shard holds the sum of all reductions of this step"


class ParamState(Enum):
    __hash__ = object.__hash__

    FULL = "flat_params is the same on every rank"
    GATHERING = "the other shards are on their way: only param_shard may be read"
    STALE = "param_shard is new, the other shards are old, and nothing is on its way"


_GRAD_TRANSITIONS = {
    (GradState.EMPTY, GradState.SYNCING),
    (GradState.SYNCING, GradState.REDUCED),
    (GradState.REDUCED, GradState.SYNCING),  # the next micro-batch adds to it
    (GradState.REDUCED, GradState.EMPTY),
    (GradState.SYNCING, GradState.EMPTY),  # an exception has ended the reduction
    (GradState.EMPTY, GradState.EMPTY),
}
_PARAM_TRANSITIONS = {
    (ParamState.FULL, ParamState.GATHERING),
    (ParamState.GATHERING, ParamState.FULL),
    (ParamState.FULL, ParamState.STALE),
    (ParamState.STALE, ParamState.STALE),  # another replay of a captured step
    (ParamState.STALE, ParamState.GATHERING),
    (ParamState.GATHERING, ParamState.STALE),  # of a capture that failed
}


class Bucket:
    """Parameters alike in group, dtype, device and ranks, in one flat buffer.

    Args:
        params: they move into the flat buffer; their values are kept, and the strides of those without gaps.
        names: for errors.
        groups: the ranks that share and replicate the bucket.
        transport: of ``groups``; it moves the bucket's bytes.
        reduce_dtype: of gradients while they are sent.
        ordered_sum: gradients are summed in fp32 in rank order (see ``collectives.reduce_scatter``).
        stream: where communication is enqueued.
        clock: told when this bucket packs, waits or starts a gather.
        row_major: parameters of other strides become row-major.
    """

    def __init__(
        self,
        params: Sequence[Parameter],
        names: Sequence[str],
        groups: ShardGroups,
        transport: Transport,
        *,
        reduce_dtype: torch.dtype,
        ordered_sum: bool,
        stream: CommStream,
        clock: PhaseLabels = NO_CLOCK,
        row_major: bool = False,
    ):
        self.params, self.names, self.groups = list(params), list(names), groups
        local = local_tensors(params)
        self._holds_parts = local is not params  # of DTensors
        self.layout = BucketLayout(tuple(p.numel() for p in local), groups.shard_world_size)
        self.slices = self.layout.slices(groups.shard_rank)
        self.reduce_dtype, self.stream, self.clock = reduce_dtype, stream, clock
        self.shapes = [p.shape for p in local]
        self.formats = [MemoryFormat.row_major(p.shape) if row_major else MemoryFormat.of(p) for p in local]

        self._transport = transport
        self._params_buffer = transport.allocate(self.layout.numel, params[0].dtype)
        self.flat_params = self._params_buffer.flat
        self._places = views_of(self.flat_params, self.layout, self.formats)
        for param, place in zip(params, self._places, strict=True):
            move_in(param, place)
        local = local_tensors(params)
        self._addresses, self._strides = list(map(Tensor.data_ptr, local)), list(map(Tensor.stride, local))
        start, stop = self.layout.shard_range(groups.shard_rank)
        self.param_shard = self.flat_params[start:stop]

        self._reduce_scatter = transport.reduce_scatter(self.layout, self.formats, reduce_dtype, ordered=ordered_sum)
        summed_dtype = torch.float32 if ordered_sum else reduce_dtype
        self._grad_shard = torch.zeros(self.layout.shard_numel, dtype=summed_dtype, device=self.device)
        self._accumulator: Tensor | None = None  # fp32, when micro-batches are added up over a 16-bit wire

        self.grad_state = GradState.EMPTY
        self.param_state = ParamState.FULL
        self.used = [False] * len(params)  # which parameters had a gradient on this rank since reset_grad()
        self._missing = set(range(len(params)))  # which have none yet in this backward pass
        self._reduction: Work | None = None  # under way
        self._gather: Work = COMPLETED
        self._grad_event, self._param_event = stream.new_event(), stream.new_event()
        self._param_stream: torch.cuda.Stream | None = None

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def label(self) -> str:
        """For the profiler and for errors."""
        return f"{self.names[0]} .. {self.names[-1]}" if len(self.names) > 1 else self.names[0]

    @property
    def grad_shard(self) -> Tensor:
        """[shard_numel], the same tensor for the life of the bucket; ``finish_grad_sync()`` returns it or another."""
        return self._grad_shard

    @property
    def squares(self) -> Tensor | None:
        """[n] fp64: sums of squares of parts of what ``finish_grad_sync()`` returns, where they cost nothing."""
        return self._reduce_scatter.squares

    def _set_grad_state(self, new: GradState) -> None:
        if (self.grad_state, new) not in _GRAD_TRANSITIONS:
            raise RuntimeError(f"bucket of {self.names[0]!r}: gradients cannot go {self.grad_state.name} -> {new.name}")
        self.grad_state = new

    def _set_param_state(self, new: ParamState) -> None:
        if (self.param_state, new) not in _PARAM_TRANSITIONS:
            raise RuntimeError(
                f"bucket of {self.names[0]!r}: parameters cannot go {self.param_state.name} -> {new.name}"
            )
        self.param_state = new

    # ---- gradients: register_grad_ready ... start_grad_sync ... finish_grad_sync ... reset_grad

    def register_grad_ready(self, position: int) -> None:
        """The gradient of ``params[position]`` is complete for this backward pass."""
        self._missing.discard(position)

    def all_grads_ready(self) -> bool:
        """Whether every parameter that takes a gradient has one in this backward pass."""
        for position in self._missing:  # not any(...): that takes three times as long, once for every gradient
            if self.params[position].requires_grad:
                return False
        return True

    @in_phase("grad_sync")
    def start_grad_sync(self) -> None:
        """Start the reduce-scatter of the gradients there are (zeros for the others), and forget them.

        A gradient counts whoever wrote it into ``.grad``: autograd or the program.
        """
        if self.grad_state is GradState.SYNCING:
            self.complete_reduction()
            self._refuse_interrupted()
        grads = self._local_grads()
        self.check_grads(grads)
        adds_up = self.grad_state is GradState.REDUCED
        self._set_grad_state(GradState.SYNCING)
        self.used = [grad is not None or used for grad, used in zip(grads, self.used, strict=True)]
        with self.stream.fork():  # packing and sending too: backward goes on beside it
            output = self._grad_accumulator() if adds_up else self._grad_shard
            try:
                self._reduction = self._reduce_scatter.start(
                    grads, output, adds_up=adds_up, complete=self.complete_reduction
                )
            except CollectiveError as error:
                self._explain(error, "starting to reduce the gradients")
                raise
            for param in self.params:
                param.grad = None
            self.stream.complete_enqueued(self.complete_reduction)  # it joins the queue, as the buffer's next use will
        self._missing = set(range(len(self.params)))

    def check_grads(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """Raise TypeError or ValueError when one of ``grads`` (None: those there are) cannot be reduced.

        Autograd gives a gradient its parameter's shape; ``.grad.data`` takes any, and copying would broadcast it.
        """
        grads = self._local_grads() if grads is None else grads
        present = [grad for grad in grads if grad is not None]
        if list(map(_shape, present)) == self.shapes and set(map(_layout, present)) == {torch.strided}:
            return
        for name, grad, shape in zip(self.names, grads, self.shapes, strict=True):
            if grad is None or (grad.shape == shape and grad.layout is torch.strided):
                continue
            if grad.layout is not torch.strided:
                raise TypeError(
                    f"the gradient of {name!r} is sparse, and Lion has no sparse update. Use "
                    "nn.Embedding(sparse=False): untouched rows stay where they are without it too."
                )
            raise ValueError(
                f"the gradient of {name!r} has shape {tuple(grad.shape)}, the parameter {tuple(shape)}. "
                "Call zero_grad() and run backward again; do not assign to .grad.data."
            )

    def complete_reduction(self) -> None:
        """Bring a reduction under way to its end. On a CUDA stream it is enqueued already and this costs nothing."""
        if self._reduction is None:
            return
        reduction, self._reduction = self._reduction, None
        try:
            reduction()
        except CollectiveError as error:
            self._explain(error, "reducing the gradients")
            raise
        self._set_grad_state(GradState.REDUCED)
        self.stream.record_event(self._grad_event)

    def _explain(self, error: CollectiveError, what: str) -> None:
        """Say in ``error`` what this bucket was doing, unless it had to wait for another one, which has said it."""
        if not error.is_explained:
            first, last = repr(self.names[0]), repr(self.names[-1])
            self.groups.progress.explain(error, f"{what} of {first}" + f" to {last}" * (first != last))

    def _grad_accumulator(self) -> Tensor:
        """What this step's further micro-batches are added to: fp32, whatever the wire carries."""
        if self._grad_shard.dtype == torch.float32:
            return self._grad_shard
        if self._accumulator is None:
            self._accumulator = self._grad_shard.float()
        return self._accumulator

    @in_phase("grad_sync")
    def finish_grad_sync(self) -> Tensor:
        """The gradients of this rank's shard [shard_numel], summed over ranks and micro-batches of this step."""
        self.complete_reduction()
        self.stream.wait_event(self._grad_event)
        if self.grad_state is not GradState.REDUCED:
            self._refuse_interrupted()
            raise RuntimeError(
                f"bucket of {self.names[0]!r}: no gradient has been reduced ({self.grad_state.name}); "
                "start_grad_sync() comes first"
            )
        return self._grad_shard if self._accumulator is None else self._accumulator

    def note_written_grad(self, position: int) -> None:
        """The program has written what ``finish_grad_sync()`` returns, at ``params[position]``."""
        self.used[position] = True
        self._reduce_scatter.note_written(self.finish_grad_sync())

    def reset_grad(self) -> None:
        """Forget this step's gradients, also those under way. From every state, whatever exception has led to it."""
        nothing_used, nothing_ready = not any(self.used), len(self._missing) == len(self.params)
        if self.grad_state is GradState.EMPTY and nothing_used and nothing_ready:  # zero_grad() after step()
            return
        self.complete_reduction()  # what is under way writes to grad_shard: when this raises, it is for the next call
        self._set_grad_state(GradState.EMPTY)
        self._accumulator = None
        self.used = [False] * len(self.params)
        self._missing = set(range(len(self.params)))

    @property
    def is_interrupted(self) -> bool:
        """Whether an exception has ended a reduction: nothing is under way, and the gradients are not reduced."""
        return self.grad_state is GradState.SYNCING and self._reduction is None

    def _refuse_interrupted(self) -> None:
        if self.is_interrupted:
            raise RuntimeError(
                f"bucket of {self.names[0]!r}: an exception has ended the reduction of its gradients. Call zero_grad() "
                "on every rank, and run the step again from its first backward."
            )

    # ---- parameters: (the shard is updated) ... start_param_sync ... finish_param_sync

    @in_phase("param_sync")
    def start_param_sync(self, start: Callable[[], Work] | None = None) -> None:
        """Start what makes ``flat_params`` full again; ``param_shard`` may be read but not written.

        ``start`` is called where communication is queued; None: an all-gather.
        """
        self._set_param_state(ParamState.GATHERING)
        with self.stream.fork() as self._param_stream:
            try:
                self._gather = self._all_gather() if start is None else start()
            except CollectiveError as error:
                self._explain(error, "starting to gather the parameters")
                raise
            self.stream.record_event(self._param_event)

    def leave_stale(self) -> None:
        """The shard is updated, and its gather is left to whoever needs the parameters."""
        self._set_param_state(ParamState.STALE)
        self._gather = COMPLETED

    def _all_gather(self) -> Work:
        return self._transport.all_gather(self._params_buffer, self.param_shard)

    def finish_param_sync(self) -> None:
        """What follows may read every parameter. Costs nothing when no gather is under way."""
        if self.param_state is ParamState.FULL:
            return
        if self.param_state is ParamState.STALE:
            self.start_param_sync()
        with self.clock.phase("param_sync", self.label):
            try:
                self._gather()  # and again, if an exception ends it
            except CollectiveError as error:
                self._explain(error, "gathering the parameters")
                raise
            self._gather = COMPLETED
            self.stream.wait_event(self._param_event)
            # Whoever asks first may be on a stream of its own.
            self.stream.wait_event(self._param_event, self._param_stream)
        self._set_param_state(ParamState.FULL)

    def _local_grads(self) -> list[Tensor | None]:
        """What of each parameter's gradient belongs to this rank (that of a DTensor may have to be summed first)."""
        grads = list(map(_grad, self.params))
        return local_grads_like(grads, self.params) if self._holds_parts else grads

    def moved_params(self) -> list[int]:
        """Positions of the parameters that were given other memory or strides since (``param.data = ...``)."""
        local = local_tensors(self.params) if self._holds_parts else self.params
        addresses, strides = list(map(Tensor.data_ptr, local)), list(map(Tensor.stride, local))
        if addresses == self._addresses and strides == self._strides:
            return []
        now, then = zip(addresses, strides, strict=True), zip(self._addresses, self._strides, strict=True)
        return [i for i, (a, b) in enumerate(zip(now, then, strict=True)) if a != b and self.shapes[i].numel()]

    def gather_again(self) -> None:
        """Make ``flat_params`` full whatever it holds: an exception may have ended an update or a gather."""
        self.finish_param_sync()
        self.start_param_sync()
        self.finish_param_sync()

    def take_back_params(self, moved: Sequence[int]) -> None:
        """Parameters at ``moved`` lie in ``flat_params`` again, with the values that they have where they are now. Not
        while a gather is under way.

        Raises:
            RuntimeError: one of another dtype, device or shape, which only a new optimizer can train.
        """
        for i in moved:
            param, place = self.params[i], self._places[i]
            local = local_tensor(param)
            if (param.dtype, param.device, local.shape) != (place.dtype, place.device, place.shape):
                raise RuntimeError(
                    f"parameter {self.names[i]!r} is {param.dtype} {tuple(local.shape)} on {param.device} now and was "
                    f"{place.dtype} {tuple(place.shape)} on {place.device} when ShardedLion was made. Convert or move "
                    "the model first, and construct the optimizer after."
                )
            move_in(param, place)

    def place_of(self, position: int) -> Tensor:
        """The memory in ``flat_params`` that is that of ``params[position]``."""
        return self._places[position]

    def name_at(self, address: int) -> str | None:
        """The name of the parameter whose place in ``flat_params`` ``address`` is within; None: there is none."""
        for name, start, place in zip(self.names, self._addresses, self._places, strict=True):
            if 0 <= address - start < place.nbytes:
                return name
        return None

    def grad_shard_nbytes(self) -> int:
        return self._grad_shard.nbytes + (0 if self._accumulator is None else self._accumulator.nbytes)
