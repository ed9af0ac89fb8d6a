"""What of a tensor lies on this rank, asked without an import of torch.distributed.tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter

PLAIN = frozenset((Tensor, Parameter))


def local_tensor(tensor: Tensor) -> Tensor:
    """What of ``tensor`` lies on this rank: a DTensor's local shard, or the tensor itself."""
    # isinstance(tensor, DTensor) would import torch.distributed.tensor, 0.5 s that plain users do not need.
    return tensor if type(tensor) in PLAIN else getattr(tensor, "_local_tensor", tensor)


def local_tensors(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """:func:`local_tensor` of each; ``tensors`` itself where all are plain."""
    return tensors if set(map(type, tensors)) <= PLAIN else list(map(local_tensor, tensors))


def flat(tensor: Tensor) -> Tensor:
    """[local numel], contiguous: a view where the memory is contiguous and a copy where it is not."""
    return local_tensor(tensor).detach().contiguous().view(-1)


def check_memory(tensor: Tensor, what: str) -> None:
    """Raise TypeError if the local ``tensor`` is a wrapper around other tensors, without memory of its own."""
    if type(tensor) not in PLAIN and tensor.numel() and not tensor.data_ptr():
        raise TypeError(
            f"{what} of shape {tuple(tensor.shape)} is a {type(tensor).__name__}, whose memory Lion cannot reach. "
            "Leave it out of the optimizer, or train plain tensors or DTensors."
        )
