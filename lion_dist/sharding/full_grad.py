"""One parameter's whole gradient, of which each rank holds what lies in its shard: read on all ranks, and replaced.

The unit is that of ``grad_norm()``: the reduced sum times what turns it into the gradient (averaging, unscaling). It is
given in fp64, where that product has bits to spare: what is read and written back is the same sum, bit for bit, on any
number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lion_dist.sharding.bucket import Bucket


@torch.no_grad()
def read(bucket: Bucket, position: int, unscaling: Tensor) -> Tensor:
    """The gradient of ``bucket.params[position]``, fp64, on every rank of the shard group; all of them together.

    Args:
        unscaling: [] fp64, times which the sum is the gradient.
    """
    shard = bucket.finish_grad_sync()
    flat = shard.new_empty(bucket.layout.numel)
    start, stop = bucket.layout.shard_range(bucket.groups.shard_rank)
    flat[start:stop] = shard
    bucket.groups.all_gather(flat, flat[start:stop])()
    first = bucket.layout.offsets[position]
    whole = bucket.formats[position].place_in(flat[first : first + bucket.layout.param_numels[position]])
    return whole.double() * unscaling


@torch.no_grad()
def write(bucket: Bucket, position: int, grad: Tensor, unscaling: Tensor) -> None:
    """Replace it by ``grad``, of which this rank keeps what lies in its shard. It counts as used then."""
    shard = bucket.finish_grad_sync()
    start, _ = bucket.layout.shard_range(bucket.groups.shard_rank)
    flat = grad.new_empty(grad.numel())
    bucket.formats[position].place_in(flat).copy_(grad)
    for piece in bucket.slices:
        if piece.param == position:
            part = flat[piece.param_start : piece.param_stop].double() / unscaling
            shard[piece.bucket_start - start : piece.bucket_stop - start] = part
    bucket.note_written_grad(position)
