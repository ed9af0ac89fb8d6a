"""Whether parameters can move into memory of their own: what else sees their present memory would be left behind."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lion_dist.local_shard import local_tensor
from lion_dist.sharding.bucket import Bucket
from lion_dist.sharding.memory_format import MemoryFormat, is_dense, overlaps_itself


def check_memory(params: Mapping[str, Tensor], others: Mapping[str, Tensor], *, row_major: bool) -> None:
    """Raise ValueError for one of ``params`` that cannot move, and warn of what it loses.

    Args:
        params: by name, those that are to move.
        others: by name, further parameters and buffers of the model; some may be among ``params``.
        row_major: they are laid out row-major, whatever their strides.
    """
    for name, param in params.items():
        if overlaps_itself(param):
            raise ValueError(
                f"elements of parameter {name!r} share memory (shape {tuple(param.shape)}, strides "
                f"{param.stride()}): as after expand(), they would be trained apart. Make it a parameter of the "
                "elements that there are, and expand that in forward."
            )
    _refuse_common_memory(params, others)
    warn_of_shared_memory([name for name, param in params.items() if is_shared_with_processes(param)])
    _warn(
        [name for name, param in params.items() if not is_dense(param)],
        "are parts of larger tensors, with gaps. ShardedLion gives them memory of their own: the larger tensors no "
        "longer follow them.",
    )
    _warn(
        [name for name, param in params.items() if row_major and MemoryFormat.of(param).dims is not None],
        "become row-major, whatever memory format they have: with stochastic rounding an element's random bits go by "
        "its row-major place. Other precision policies keep the format.",
    )


def is_shared_with_processes(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_shared()


def warn_of_shared_memory(names: Sequence[str]) -> None:
    _warn(
        names,
        "lie in memory that is shared with other processes (share_memory_(), or they were sent to one). ShardedLion "
        "trains them in memory of its own, and the other processes keep the present values. Send them new ones, such "
        "as model.state_dict(), after steps.",
    )


def warn_of_another_format(names: Sequence[str]) -> None:
    _warn(
        names,
        "were given another memory format after ShardedLion was made, which keeps the one of then. Convert the model "
        "first (model.to(memory_format=...)), and construct the optimizer after.",
    )


def refuse_tied_memory(bucket: Bucket, moved: Sequence[int], buckets: Sequence[Bucket]) -> None:
    """Raise RuntimeError where one of the parameters ``moved`` of ``bucket`` was given the memory of another."""
    for i in moved:
        param, own = bucket.params[i], bucket.place_of(i)
        address = local_tensor(param).data_ptr()
        if own.data_ptr() == address:
            continue  # its own memory, seen with other strides
        names = [name for other in buckets if (name := other.name_at(address)) is not None]
        if names:
            raise RuntimeError(
                f"parameter {bucket.names[i]!r} was given the memory of {names[0]!r} after ShardedLion was made, "
                "which keeps each parameter in a place of its own: they would be trained apart. Tie the "
                "parameters themselves (head.weight = embedding.weight) before constructing the optimizer."
            )


def warn_of_loss(bucket: Bucket, moved: Sequence[int]) -> None:
    """Values are kept when parameters are taken back; sharing with other processes, or a memory format, is not."""
    pairs = [(bucket.names[i], local_tensor(bucket.params[i]), bucket.place_of(i)) for i in moved]
    warn_of_shared_memory([name for name, param, _ in pairs if is_shared_with_processes(param)])
    alike = [(name, param, place) for name, param, place in pairs if param.shape == place.shape]
    orders = [(name, MemoryFormat.of(param).dims, MemoryFormat.of(place).dims) for name, param, place in alike]
    warn_of_another_format([name for name, now, then in orders if now != then])


def _warn(names: Sequence[str], what: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(f"parameters {', '.join(map(repr, names[:3]))}{more} {what}", stacklevel=2)


def _refuse_common_memory(params: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    known = {id(param): (name, param, True) for name, param in params.items()}
    for name, other in others.items():
        known.setdefault(id(other), (name, other, False))
    extents = sorted((*_extent(tensor), name, moves) for name, tensor, moves in known.values() if _has_memory(tensor))
    last_stop, last_name, last_moves = 0, "", False
    for start, stop, name, moves in extents:
        if start < last_stop and (moves or last_moves):
            raise ValueError(
                f"{last_name!r} and {name!r} are two tensors over the same memory. ShardedLion moves parameters into "
                "memory of their own, so they would be trained apart. Let them be one parameter (head.weight = "
                "embedding.weight), or give them memory of their own (clone())."
            )
        if stop > last_stop:
            last_stop, last_name, last_moves = stop, name, moves


def _has_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided
    return plain and tensor.numel() > 0 and tensor.data_ptr() != 0


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses that are the tensor's alone; of one with gaps, which others may fill, the first element's."""
    start = tensor.data_ptr()
    return start, start + (tensor.nbytes if is_dense(tensor) else tensor.itemsize)
