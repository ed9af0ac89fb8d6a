"""What this rank keeps of one bucket for Lion: momentum and main params of its shard, and the slices to update."""

from __future__ import annotations

import torch
from torch import Tensor

from lion_dist.config import PrecisionPolicy
from lion_dist.kernels.codes_shard import CodedSlice, ShardCodec
from lion_dist.kernels.reference import StepScalars
from lion_dist.kernels.update import LionTensors, count_aligned_elements
from lion_dist.optimizer import main_for, refresh_main_
from lion_dist.sharding import collectives
from lion_dist.sharding.boxes import BoxedTensor, boxes_over
from lion_dist.sharding.bucket import Bucket


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
        self.steps = None
        if precision.is_stochastic(dtype):
            self.steps = torch.zeros(len(bucket.slices), dtype=torch.int64, device=params.device)
        self.slice_params = torch.tensor([s.param for s in bucket.slices], dtype=torch.int64).to(params.device)
        self.param_numels = torch.tensor(bucket.layout.param_numels).to(params.device)
        self.tensors = None
        if bucket.slices:
            self.tensors = LionTensors(
                params=self.slices_of(params),
                exp_avgs=self.slices_of(self.exp_avg),
                mains=None if self.main_param is None else self.slices_of(self.main_param),
                index_starts=[canonical_starts[s.param] + s.param_start for s in bucket.slices],
                steps=self.steps,
                stochastic_momentum=(
                    precision.momentum_rounding == "stochastic" and self.exp_avg.dtype == torch.bfloat16
                ),
            )

    def make_codec(self, precision: PrecisionPolicy, canonical_starts: list[int], backend: str) -> ShardCodec:
        """For param_sync="coded"."""
        layout = self.bucket.layout
        slices = []
        for rank in range(layout.shard_world_size):
            first, _ = layout.shard_range(rank)
            slices.append(
                [
                    CodedSlice(row, s.bucket_start - first, s.bucket_stop - first, canonical_starts[s.param] + s.param_start)
                    for row, s in enumerate(layout.slices(rank))
                ]
            )
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
        moves: Tensor,  # [params] bool on the device: parameters that this step's update does not leave as they are
        cautious_lrs: Tensor | None,  # [slices] fp32
    ) -> None:
        """Before the update: what the codes of this step are relative to."""
        moves = moves.index_select(0, self.slice_params)
        lr, decay = (
            value.expand(len(moves)) if isinstance(value, Tensor) else torch.full_like(moves, value, dtype=torch.float32)
            for value in (scalars.lr, scalars.decay)
        )
        if cautious_lrs is not None:
            lr = cautious_lrs
        codec.begin(self.bucket.param_shard, torch.where(moves, lr, 0.0), torch.where(moves, decay, 1.0), self.steps)

    def slices_of(self, shard: Tensor) -> list[Tensor]:
        """The pieces of a [shard_numel] tensor that belong to parameters."""
        first, _ = self.bucket.layout.shard_range(self.bucket.groups.shard_rank)
        return [shard[s.bucket_start - first : s.bucket_stop - first] for s in self.bucket.slices]

    def count_aligned(self, scalars: StepScalars, grad_scale: Tensor) -> Tensor:
        """[params] int64: of each of the bucket's parameters, the elements here that the cautious step moves."""
        counts = torch.zeros_like(self.param_numels)
        if self.tensors is None:
            return counts
        grads = self.slices_of(self.bucket.finish_grad_sync())
        return counts.index_add_(
            0, self.slice_params, count_aligned_elements(self.tensors, grads, scalars, grad_scale=grad_scale)
        )

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

    def state(self) -> dict[str, dict[str, Tensor]]:
        """``{parameter name: {"exp_avg": boxes, "main_param": boxes, "step": []}}`` of what this rank owns."""
        state: dict[str, dict[str, Tensor]] = {}
        for kind, shard in (("exp_avg", self.exp_avg), ("main_param", self.main_param)):
            for piece, local in zip(self.bucket.slices, [] if shard is None else self.slices_of(shard), strict=False):
                shape = self.bucket.params[piece.param].shape
                boxes = boxes_over(shape, piece.param_start, local)
                boxed = BoxedTensor(shape, boxes, dtype=shard.dtype, device=shard.device)
                state.setdefault(self.bucket.names[piece.param], {})[kind] = boxed
        if self.steps is not None:
            for piece, step in zip(self.bucket.slices, self.steps.unbind(), strict=True):
                state[self.bucket.names[piece.param]]["step"] = step
        return state


def matching_tensors(mine: dict[str, dict], theirs: dict[str, dict]) -> list[tuple[Tensor, Tensor]]:
    """(target, source) pairs of local tensors that must be copied; ValueError lists what does not match."""
    if mine.keys() != theirs.keys():
        raise ValueError(f"saved and present parameters differ in {sorted(mine.keys() ^ theirs.keys())[:8]}")
    pairs = []
    for name, kinds in mine.items():
        if kinds.keys() != theirs[name].keys():
            raise ValueError(f"state of {name!r}: saved {sorted(theirs[name])}, present {sorted(kinds)}")
        for kind, tensor in kinds.items():
            other = theirs[name][kind]
            if not isinstance(tensor, BoxedTensor):
                pairs.append((tensor, other))
            elif not isinstance(other, BoxedTensor) or (tensor.shape, [*tensor.boxes]) != (other.shape, [*other.boxes]):
                raise ValueError(f"{kind} of {name!r}: saved {other}, present {tensor}")
            elif tensor.dtype != other.dtype:
                raise ValueError(f"{kind} of {name!r} was saved as {other.dtype} and is {tensor.dtype} here")
            else:
                pairs += [(local, other.boxes[box]) for box, local in tensor.boxes.items()]
    return [(target, source) for target, source in pairs if target.data_ptr() != source.data_ptr()]
