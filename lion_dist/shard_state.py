"""What this rank keeps of one bucket for Lion: momentum and main params of its shard, and the slices to update."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from lion_dist.averages import KIND as AVERAGE
from lion_dist.averages import init_average
from lion_dist.boxed_tensor import BoxedTensor
from lion_dist.config import PrecisionPolicy
from lion_dist.kernels.update import LionTensors
from lion_dist.local_shard import LocalShard
from lion_dist.main_params import init_main_param, sync_main_param_
from lion_dist.sharding import collectives
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.memory_format import MemoryFormat
from lion_dist.sharding.process_groups import ProcessGroup

if TYPE_CHECKING:
    from lion_dist.composed.places import ModelPlace


class ShardState:
    """This rank's optimizer state of one bucket.

    Args:
        group: the param group; lr, betas and weight_decay are read from it at each step.
        index_starts: of the bucket's parameters (``sharding/layout.py``).
        places: of the bucket's parameters in the whole ones, where ranks hold parts of the model.
        cut_group: the ranks that hold the other parts of these parameters.
        ema_decay: of the average of the weights.

    Attributes:
        exp_avg: [shard_numel], fp32 | bf16.
        main_param: [shard_numel], fp32 | int16 remainder, or None.
        weight_avg: [shard_numel], fp32 | bf16, or None.
        steps: [slices] int64 with stochastic rounding, or None.
        tensors: the slices as the update reads them, views of the above and of the bucket's parameters; padding
            between them is never read. None when this rank owns nothing but padding.
        slice_params: [slices] int64 on the device, the position in the bucket of each slice's parameter.
        param_numels: [params] int64 on the device, elements of each whole parameter.
        is_counted: of the ranks that hold these parameters (tensor parallel copies), this one counts them.
    """

    def __init__(
        self,
        bucket: Bucket,
        group: dict,
        precision: PrecisionPolicy,
        index_starts: list[int],
        places: Sequence[ModelPlace] | None = None,
        cut_group: ProcessGroup | None = None,
        ema_decay: float | None = None,
    ):
        self.bucket, self.group, self.cut_group = bucket, group, cut_group
        self.places = [None] * len(bucket.params) if places is None else list(places)
        self.is_counted = places is None or places[0].is_counted
        params, dtype = bucket.param_shard, bucket.param_shard.dtype
        self.exp_avg = torch.zeros_like(params, dtype=precision.momentum_dtype_for(dtype))
        self.main_param = init_main_param(params, precision.main_params_for(dtype))
        self.weight_avg = init_average(params, precision.ema_dtype)
        self.stochastic_momentum = precision.momentum_rounding == "stochastic" and self.exp_avg.dtype == torch.bfloat16
        self.steps = None
        if precision.is_stochastic(dtype):
            self.steps = torch.zeros(len(bucket.slices), dtype=torch.int64, device=params.device)
        self.slice_params = torch.tensor([s.param for s in bucket.slices], dtype=torch.int64).to(params.device)
        numels = [
            n if p is None else p.shape.numel() for n, p in zip(bucket.layout.param_numels, self.places, strict=True)
        ]
        self.param_numels = torch.tensor(numels).to(params.device)
        self._grad_slices: list[Tensor] | None = None
        self.tensors = None
        if bucket.slices:
            self.tensors = LionTensors(
                params=self.slices_of(params),
                exp_avgs=self.slices_of(self.exp_avg),
                mains=None if self.main_param is None else self.slices_of(self.main_param),
                index_starts=[index_starts[s.param] + s.param_start for s in bucket.slices],
                steps=self.steps,
                stochastic_momentum=self.stochastic_momentum,
                averages=None if self.weight_avg is None else self.slices_of(self.weight_avg),
                ema_decay=ema_decay,
            )

    @property
    def elementwise(self) -> dict[str, Tensor]:
        """State of one number for each element, by kind: what there is of [shard_numel]."""
        kinds = {"exp_avg": self.exp_avg, "main_param": self.main_param, AVERAGE: self.weight_avg}
        return {kind: flat for kind, flat in kinds.items() if flat is not None}

    def grad_slices(self) -> list[Tensor]:
        """The reduced gradients of ``tensors``; views, made once where they can be."""
        grad = self.bucket.finish_grad_sync()
        if grad is not self.bucket.grad_shard:  # a sum over micro-batches, which lives for one step
            return self.slices_of(grad)
        if self._grad_slices is None:
            self._grad_slices = self.slices_of(grad)
        return self._grad_slices

    def slices_of(self, shard: Tensor) -> list[Tensor]:
        """The pieces of a [shard_numel] tensor that belong to parameters."""
        first, _ = self.bucket.layout.shard_range(self.bucket.groups.shard_rank)
        return [shard[s.bucket_start - first : s.bucket_stop - first] for s in self.bucket.slices]

    def local_shards(self, shard: Tensor) -> list[LocalShard]:
        """Return what a [shard_numel] tensor holds of each of the bucket's parameters; of many that is nothing."""
        held = dict.fromkeys(range(len(self.bucket.params)), (0, shard[:0]))
        held |= {
            s.param: (s.param_start, view) for s, view in zip(self.bucket.slices, self.slices_of(shard), strict=True)
        }
        formats = zip(self.bucket.formats, self.places, strict=True)
        return [LocalShard.of_range(f.shape, *held[i], f.dims, place) for i, (f, place) in enumerate(formats)]

    @property
    def owner(self) -> tuple[int, int]:
        """Which of how many ranks that divide the bucket's parameters among them this is."""
        groups, cut = self.bucket.groups, self.cut_group
        parts, part = (1, 0) if cut is None else (cut.size(), cut.rank())
        return part * groups.shard_world_size + groups.shard_rank, parts * groups.shard_world_size

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of this rank by kind."""
        return {
            "params": self.bucket.flat_params.nbytes,
            "main_params": 0 if self.main_param is None else self.main_param.nbytes,
            "exp_avg": self.exp_avg.nbytes,
            **({} if self.weight_avg is None else {AVERAGE: self.weight_avg.nbytes}),
            "grads": self.bucket.grad_shard_nbytes(),
        }

    def resync(self) -> None:
        """The owner's parameters and state become everybody's: the first replica's, then along the shard group."""
        for tensor in (self.bucket.param_shard, *self.elementwise.values(), self.steps):
            if tensor is not None:
                words = tensor.view(torch.uint8)  # gloo knows no int16
                collectives.broadcast(words, self.bucket.groups.replicate_group)
        self.bucket.groups.all_gather(self.bucket.flat_params, self.bucket.param_shard)()

    def refresh_main(self) -> None:
        """Let fp32 main params follow parameters that were changed from outside."""
        if self.main_param is not None and self.main_param.dtype == torch.float32:
            sync_main_param_(self.main_param, self.bucket.param_shard)

    def begin_average(self) -> None:
        """Let the average begin at the parameters as they are now."""
        if self.weight_avg is not None:
            self.weight_avg.copy_(self.bucket.param_shard)

    def state(self, boxed: Callable[..., BoxedTensor] = BoxedTensor) -> dict[Parameter, dict[str, Tensor]]:
        """``{parameter: {"exp_avg": ..., "main_param": ..., "step": ...}}`` of all of the bucket's parameters, live.

        A tensor is the full one where this rank holds all, else what ``boxed`` makes of this rank's boxes. The
        remainder of "split" main params is the bf16 of the same bits, as in ``main_params.py``.
        """
        bucket = self.bucket
        flats = {
            k: flat.view(torch.bfloat16) if flat.dtype == torch.int16 else flat for k, flat in self.elementwise.items()
        }
        owned = {piece.param: i for i, piece in enumerate(bucket.slices)}
        scalar = MemoryFormat.row_major(torch.Size(()))
        state: dict[Parameter, dict[str, Tensor]] = {param: {} for param in bucket.params}
        for kind, flat in flats.items():
            held = zip(bucket.params, bucket.formats, self.local_shards(flat), strict=True)
            for param, memory_format, local in held:
                state[param][kind] = self._full_or_boxed(memory_format, local, boxed)
        for position, param in enumerate(bucket.params if self.steps is not None else ()):
            i = owned.get(position)
            local = self.steps[:0] if i is None else self.steps[i : i + 1]
            state[param]["step"] = (
                self._full_or_boxed(scalar, LocalShard.of_range(scalar.shape, 0, local), boxed)
                if self.bucket.shapes[position].numel()
                else self.steps.new_zeros(())  # nobody counts for it
            )
        return state

    def _full_or_boxed(
        self, memory_format: MemoryFormat, local: LocalShard, boxed: Callable[..., BoxedTensor]
    ) -> Tensor:
        groups = self.bucket.groups.shard_group, self.cut_group, self.group.get("process_group")
        is_alone = all(group is None for group in groups)
        if not local.shape.numel() or is_alone:
            return memory_format.place_in(local.tensor)
        return local.boxed(boxed)


class ShardBatch:
    """Shards that one launch updates: of one param group, on the same ranks, and alike in dtypes.

    Attributes:
        tensors: all their slices, or None when this rank owns only padding of them.
        slice_params: [slices] int64 on the device, the position of each slice's parameter among all of the shards'.
        param_numels: [params] int64 on the device, elements of each whole parameter.
    """

    def __init__(self, shards: Sequence[ShardState]):
        self.shards, self.group, self.groups = list(shards), shards[0].group, shards[0].bucket.groups
        self.is_counted = shards[0].is_counted
        self.owning = [shard for shard in shards if shard.tensors is not None]
        self.tensors = None
        self.param_numels = torch.cat([shard.param_numels for shard in shards])
        self.slice_params = params_of_slices(shards).to(self.param_numels.device)
        if not self.owning:
            return
        parts = [shard.tensors for shard in self.owning]
        self.tensors = LionTensors(
            params=[x for part in parts for x in part.params],
            exp_avgs=[x for part in parts for x in part.exp_avgs],
            mains=None if parts[0].mains is None else [x for part in parts for x in part.mains],
            index_starts=[x for part in parts for x in part.index_starts],
            steps=None if parts[0].steps is None else torch.cat([part.steps for part in parts]),
            stochastic_momentum=parts[0].stochastic_momentum,
            averages=None if parts[0].averages is None else [x for part in parts for x in part.averages],
            ema_decay=parts[0].ema_decay,
        )
        if self.tensors.steps is not None:  # one memory for the batch and its shards
            counts = self.tensors.steps.split([len(part.params) for part in parts])
            for shard, part, steps in zip(self.owning, parts, counts, strict=True):
                shard.steps = part.steps = steps

    def grads(self) -> list[Tensor]:
        return [grad for shard in self.owning for grad in shard.grad_slices()]

    @property
    def num_slices(self) -> int:
        return sum(len(shard.bucket.slices) for shard in self.shards)


def params_of_slices(shards: Sequence[ShardState]) -> Tensor:
    """[slices of all shards] int64: where each slice's parameter is among those of all buckets."""
    firsts = itertools.accumulate((len(shard.bucket.params) for shard in shards), initial=0)
    places = [first + s.param for first, shard in zip(firsts, shards, strict=False) for s in shard.bucket.slices]
    return torch.tensor(places, dtype=torch.int64)


class UpdateOrder:
    """The batches of all shards, in the order in which a step updates them.

    Args:
        one_by_one: a batch is one shard; else as :func:`make_batches`.
    """

    def __init__(self, device: torch.device, *, one_by_one: bool):
        self.batches: list[ShardBatch] = []
        self._device, self._one_by_one = device, one_by_one
        self._slice_params: Tensor | None = None  # [slices of all shards] int64: the parameter of each, among all

    def add(self, shards: Sequence[ShardState]) -> None:
        self.batches += [ShardBatch([shard]) for shard in shards] if self._one_by_one else make_batches(shards)
        shards = [shard for batch in self.batches for shard in batch.shards]
        self._slice_params = params_of_slices(shards).to(self._device)

    def with_used(self, used: Tensor) -> Iterator[tuple[ShardBatch, Tensor]]:
        """Each batch, and of its slices whether the parameter was used: [slices] fp32. ``used``: [params] fp32."""
        by_slice = used.index_select(0, self._slice_params).split([batch.num_slices for batch in self.batches])
        return zip(self.batches, by_slice, strict=True)

    def batch_of(self, bucket: Bucket) -> ShardBatch:
        """Where a batch is one shard."""
        return next(batch for batch in self.batches if batch.shards[0].bucket is bucket)


def make_batches(shards: Sequence[ShardState]) -> list[ShardBatch]:
    """Batches of 1, 4, 16, ... shards in order: few launches, and the first parameters leave after one bucket's update.

    (A launch takes 0.2 to 0.4 ms of the host within a step. One a bucket were 8 ms a step with 38 buckets on an H200.)
    """
    batches = []
    for _, run in itertools.groupby(shards, _launch_key):
        left, size = list(run), 1
        while left:
            batches.append(ShardBatch(left[:size]))
            left, size = left[size:], 4 * size
    return batches


def _launch_key(shard: ShardState) -> tuple:
    bucket = shard.bucket
    dtypes = bucket.reduce_dtype, shard.exp_avg.dtype, bucket.param_shard.dtype
    return id(shard.group), bucket.groups, shard.cut_group, shard.is_counted, *dtypes
