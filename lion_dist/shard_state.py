"""What this rank keeps of one bucket for Lion: momentum and main params of its shard, and the slices to update."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lion_dist.boxes import BoxedTensor, boxes_over
from lion_dist.coded_sync.shard_codec import CodedSlice, ShardCodec
from lion_dist.config import PrecisionPolicy
from lion_dist.kernels.reference import StepScalars
from lion_dist.kernels.update import LionTensors, count_aligned_elements
from lion_dist.lion import main_for, refresh_main_
from lion_dist.sharding import collectives
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.memory_format import MemoryFormat


class BucketShard:
    """This rank's optimizer state of one bucket.

    Args:
        group: the param group; lr, betas and weight_decay are read from it at each step.
        canonical_starts: of the bucket's parameters (``sharding/layout.py``).

    Attributes:
        exp_avg: [shard_numel], fp32 | bf16.
        main_param: [shard_numel], fp32 | int16 remainder, or None.
        steps: [slices] int64 with stochastic rounding, or None.
        tensors: the slices as the update reads them, views of the above and of the bucket's parameters; padding
            between them is never read. None when this rank owns nothing but padding.
        slice_params: [slices] int64 on the device, the position in the bucket of each slice's parameter.
        param_numels: [params] int64 on the device, elements of each whole parameter.
    """

    def __init__(self, bucket: Bucket, group: dict, precision: PrecisionPolicy, canonical_starts: list[int]):
        self.bucket, self.group = bucket, group
        params, dtype = bucket.param_shard, bucket.param_shard.dtype
        self.exp_avg = torch.zeros_like(params, dtype=precision.momentum_dtype_for(dtype))
        self.main_param = main_for(params, precision.main_params_for(dtype))
        self.stochastic_momentum = precision.momentum_rounding == "stochastic" and self.exp_avg.dtype == torch.bfloat16
        self.steps = None
        if precision.is_stochastic(dtype):
            self.steps = torch.zeros(len(bucket.slices), dtype=torch.int64, device=params.device)
        self.slice_params = torch.tensor([s.param for s in bucket.slices], dtype=torch.int64).to(params.device)
        self.param_numels = torch.tensor(bucket.layout.param_numels).to(params.device)
        self._grad_slices: list[Tensor] | None = None
        self.tensors = None
        if bucket.slices:
            self.tensors = LionTensors(
                params=self.slices_of(params),
                exp_avgs=self.slices_of(self.exp_avg),
                mains=None if self.main_param is None else self.slices_of(self.main_param),
                index_starts=[canonical_starts[s.param] + s.param_start for s in bucket.slices],
                steps=self.steps,
                stochastic_momentum=self.stochastic_momentum,
            )

    def make_codec(self, precision: PrecisionPolicy, canonical_starts: list[int], backend: str) -> ShardCodec:
        """For param_sync="coded"."""
        layout = self.bucket.layout
        slices = []
        for rank in range(layout.shard_world_size):
            first, _ = layout.shard_range(rank)
            rows = []
            for row, s in enumerate(layout.slices(rank)):
                canonical_start = canonical_starts[s.param] + s.param_start
                rows.append(CodedSlice(row, s.bucket_start - first, s.bucket_stop - first, canonical_start))
            slices.append(rows)
        return ShardCodec(
            self.bucket.param_shard.dtype,
            self.main_param is not None,
            layout.shard_numel,
            slices,
            self.bucket.groups.shard_rank,
            self.bucket.device,
            precision.seed,
            backend,
        )

    def begin_codes(
        self,
        codec: ShardCodec,
        scalars: StepScalars,
        moves: Tensor,  # [slices] bool on the device: those that this step's update does not leave as they are
        cautious_lrs: Tensor | None,  # [slices] fp32
    ) -> None:
        """Before the update: what the codes of this step are relative to."""
        codec.begin(*self._rates(scalars, moves, cautious_lrs), self.steps, self.bucket.param_shard)

    def update_and_encode(self, codec: ShardCodec, scalars: StepScalars, moves: Tensor, grad_scale: Tensor) -> None:
        """The update of this shard and its codes in one launch. ``moves``: as for :meth:`begin_codes`."""
        codec.begin(*self._rates(scalars, moves, None), self.steps, None)
        codec.update_and_encode(
            self.bucket.param_shard,
            self.main_param,
            self.exp_avg,
            self.bucket.finish_grad_sync(),
            scalars,
            grad_scale=grad_scale,
            moves=moves,
            steps=self.steps,
            stochastic_momentum=self.stochastic_momentum,
        )
        if self.steps is not None:
            self.steps += moves

    @staticmethod
    def _rates(scalars: StepScalars, moves: Tensor, cautious_lrs: Tensor | None) -> tuple[Tensor, Tensor]:
        """lr and decay of each slice, [slices] fp32; 0 and 1 where nothing moves. ``moves``: [slices] bool."""
        rates = torch.empty(2, len(moves), dtype=torch.float32, device=moves.device)
        for rate, value in zip(rates, (scalars.lr, scalars.decay), strict=True):
            rate.fill_(value)
        lr, decay = rates
        if cautious_lrs is not None:
            lr = cautious_lrs
        return torch.where(moves, lr, 0.0), torch.where(moves, decay, 1.0)

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

    def count_aligned(self, scalars: StepScalars, grad_scale: Tensor) -> Tensor:
        """[params] int64: of each of the bucket's parameters, the elements here that the cautious step moves."""
        counts = torch.zeros_like(self.param_numels)
        if self.tensors is None:
            return counts
        aligned = count_aligned_elements(self.tensors, self.grad_slices(), scalars, grad_scale=grad_scale)
        return counts.index_add_(0, self.slice_params, aligned)

    def resync(self) -> None:
        """The owner's parameters and state become everybody's: the first replica's, then along the shard group."""
        for tensor in (self.bucket.param_shard, self.main_param, self.exp_avg, self.steps):
            if tensor is not None:
                words = tensor.view(torch.uint8)  # gloo knows no int16
                collectives.broadcast(words, self.bucket.groups.replicate_group)
        collectives.all_gather(self.bucket.flat_params, self.bucket.param_shard, self.bucket.groups.shard_group)()

    def refresh_main(self) -> None:
        """Let fp32 main params follow parameters that were changed from outside."""
        if self.main_param is not None and self.main_param.dtype == torch.float32:
            refresh_main_(self.main_param, self.bucket.param_shard)

    def state(self, boxed: Callable[..., BoxedTensor] = BoxedTensor) -> dict[Parameter, dict[str, Tensor]]:
        """``{parameter: {"exp_avg": ..., "main_param": ..., "step": ...}}`` of all of the bucket's parameters, live.

        A tensor is the full one where this rank holds all, else what ``boxed`` makes of this rank's boxes. The
        remainder of "split" main params is the bf16 of the same bits, as in ``engine_state.py``.
        """
        bucket = self.bucket
        flats = {"exp_avg": self.exp_avg}
        if self.main_param is not None:
            is_remainder = self.main_param.dtype == torch.int16
            flats["main_param"] = self.main_param.view(torch.bfloat16) if is_remainder else self.main_param
        owned = {piece.param: i for i, piece in enumerate(bucket.slices)}
        state: dict[Parameter, dict[str, Tensor]] = {param: {} for param in bucket.params}
        for kind, flat in flats.items():
            slices = self.slices_of(flat)
            for position, param in enumerate(bucket.params):
                i = owned.get(position)
                local, start = (flat[:0], 0) if i is None else (slices[i], bucket.slices[i].param_start)
                state[param][kind] = self._full_or_boxed(bucket.formats[position], start, local, boxed)
        for position, param in enumerate(bucket.params if self.steps is not None else ()):
            i = owned.get(position)
            local = self.steps[:0] if i is None else self.steps[i : i + 1]
            state[param]["step"] = (
                self._full_or_boxed(MemoryFormat.row_major(torch.Size(())), 0, local, boxed)
                if param.numel()
                else self.steps.new_zeros(())  # nobody counts for it
            )
        return state

    def _full_or_boxed(
        self, memory_format: MemoryFormat, start: int, local: Tensor, boxed: Callable[..., BoxedTensor]
    ) -> Tensor:
        """``local`` [n] holds the range from ``start`` of a tensor, in its memory order."""
        shape, dims = memory_format.shape, memory_format.dims
        if not shape.numel() or (self.bucket.groups.shard_group is None and self.group.get("process_group") is None):
            return memory_format.place_in(local)
        return boxed(shape, boxes_over(shape, start, local, dims), dtype=local.dtype, device=local.device)


class ShardBatch:
    """Bucket shards that one launch updates: of one param group, on the same ranks, and alike in dtypes.

    Attributes:
        tensors: all their slices, or None when this rank owns only padding of them.
    """

    def __init__(self, shards: Sequence[BucketShard]):
        self.shards, self.group, self.groups = list(shards), shards[0].group, shards[0].bucket.groups
        self.owning = [shard for shard in shards if shard.tensors is not None]
        self.tensors = None
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


def params_of_slices(shards: Sequence[BucketShard], device: torch.device) -> Tensor:
    """[slices of all shards] int64: where each slice's parameter is among those of all buckets."""
    firsts = itertools.accumulate((len(shard.bucket.params) for shard in shards), initial=0)
    places = [first + s.param for first, shard in zip(firsts, shards, strict=False) for s in shard.bucket.slices]
    return torch.tensor(places, dtype=torch.int64).to(device)


def make_batches(shards: Sequence[BucketShard]) -> list[ShardBatch]:
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


def _launch_key(shard: BucketShard) -> tuple:
    bucket = shard.bucket
    return id(shard.group), bucket.groups, bucket.reduce_dtype, shard.exp_avg.dtype, bucket.param_shard.dtype
