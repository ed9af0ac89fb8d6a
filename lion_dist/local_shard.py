"""Which tensors are local to this rank, and which slices of the full parameters they are.

This is the one place that answers both, for

* plain tensors, which hold their full parameter. DeepSpeed's flat partitions are plain tensors too: only DeepSpeed
  knows what they are part of;
* DTensors (FSDP2, tensor parallel), of which this rank holds one box;
* FSDP1's flat parameters: the original parameters one after another, of which this rank holds one range.

``torch.distributed.tensor`` takes 0.5 s to import, so nothing here imports it before it meets a DTensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from lion_dist.boxed_tensor import BoxedTensor
from lion_dist.boxes import Box, boxes_over

PLAIN = frozenset((Tensor, Parameter))


# ---- the local tensors alone, for paths that every step takes


def local_tensor(tensor: Tensor) -> Tensor:
    """``LocalShard.of(tensor).tensor``: a DTensor's local shard, or the tensor itself."""
    return tensor if type(tensor) in PLAIN else getattr(tensor, "_local_tensor", tensor)


def local_tensors(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """:func:`local_tensor` of each; ``tensors`` itself where all are plain."""
    return tensors if set(map(type, tensors)) <= PLAIN else list(map(local_tensor, tensors))


def replace_local(param: Tensor, local: Tensor) -> None:
    """Let ``param`` (of a DTensor, its local shard) lie in the memory of ``local``, of the same shape."""
    if local_tensor(param) is param:
        param.data = local
    else:
        param._local_tensor = local


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


# ---- the whole answer


@dataclass(frozen=True)
class Place:
    """The box that a tensor is of a larger one, which other ranks hold other boxes of; or all of it.

    Attributes:
        shape: of the larger one.
        offsets: of the first element of the box.
    """

    shape: torch.Size
    offsets: tuple[int, ...]

    @property
    def first_index(self) -> int:
        """The row-major index, in the larger tensor, of the first element of the box."""
        return row_major_index(self.shape, self.offsets)

    def moved(self, box: Box) -> Box:
        """``box``, told within the tensor here, within the larger one."""
        return Box(tuple(a + b for a, b in zip(self.offsets, box.offsets, strict=True)), box.sizes)


def row_major_index(shape: Sequence[int], index: Sequence[int]) -> int:
    """Of the element at ``index``."""
    strides = (math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return sum(i * stride for i, stride in zip(index, strides, strict=True))


@dataclass(frozen=True, eq=False, repr=False)
class LocalShard:
    """What this rank holds of one parameter, of its gradient, or of its state.

    Attributes:
        tensor: the local memory, of whatever shape the engine gives it; it may be empty.
        full: the tensor as the engine shows it; of a range, its local memory.
        mesh: of a DTensor.
        placements: of a DTensor, one for each axis of ``mesh``.
        is_flat: FSDP1 has put it into a flat parameter. It is a 1-D range that need not begin or end where a tensor
            does; which ranges of which originals it holds, :func:`original_ranges` of the flat parameter says.
        shape: of the full tensor.
        first_index: the row-major index, in the full tensor, of the first element of ``tensor``.
    """

    tensor: Tensor
    full: Tensor
    mesh: DeviceMesh | None = None
    placements: tuple = ()
    is_flat: bool = False
    range_start: int | None = None  # ``tensor`` is 1-D and holds a range of ``range_shape``, in the order of ``dims``
    range_shape: torch.Size | None = None
    dims: Sequence[int] | None = None
    place: Place | None = None  # of the tensor of ``range_shape`` in a larger one, whose part it is

    @classmethod
    def of(cls, tensor: Tensor) -> LocalShard:
        """Describe a plain tensor, a DTensor, or a parameter that FSDP1 has flattened."""
        if type(tensor) in PLAIN and not hasattr(tensor, "_fsdp_flattened"):
            return cls(tensor, tensor)
        if hasattr(tensor, "_local_tensor"):
            return cls(tensor._local_tensor, tensor, tensor.device_mesh, tuple(tensor.placements))
        is_flat = getattr(tensor, "_fsdp_flattened", False) or type(tensor).__name__ == "FlatParameter"
        return cls(tensor, tensor, is_flat=is_flat)

    @classmethod
    def of_range(
        cls, shape: Sequence[int], start: int, local: Tensor, dims: Sequence | None = None, place: Place | None = None
    ) -> LocalShard:
        """Describe ``local`` [n], which holds ``[start, start + n)`` of a flattened tensor of ``shape``.

        ``dims``: the tensor's dimensions in the order of memory, which the range counts in; None: row-major.
        ``place``: where the tensor lies in a larger one (tensor parallel), which is the full one then.
        """
        return cls(local, local, range_start=start, range_shape=torch.Size(shape), dims=dims, place=place)

    @property
    def shape(self) -> torch.Size:
        if self.place is not None:
            return self.place.shape
        return self.full.shape if self.range_shape is None else self.range_shape

    @property
    def is_dtensor(self) -> bool:
        return self.mesh is not None

    @property
    def is_plain(self) -> bool:
        """An ordinary tensor, which holds all of its parameter as far as torch knows."""
        return not (self.is_dtensor or self.is_flat or self.range_start is not None)

    @property
    def is_whole(self) -> bool:
        """Whether every element of the full tensor is here."""
        if self.range_start is not None:
            return self.tensor.numel() == self.shape.numel()
        return not (self.is_flat or self.axes)

    @property
    def is_partial(self) -> bool:
        """Each rank holds an addend of the values."""
        return any(placement.is_partial() for placement in self.placements)

    @property
    def axes(self) -> tuple[tuple[DeviceMesh, int], ...]:
        """The mesh axes along which a DTensor is cut."""
        # FSDP over tensor parallel is a strided shard, which denies is_shard().
        cut = (axis for axis, place in enumerate(self.placements) if not place.is_replicate())
        return tuple((self.mesh, axis) for axis in cut)  # pyrefly: ignore[bad-return] # without a mesh no placements

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The ranks that hold the other shards, for each of ``axes``. (FSDP1 alone knows those of a flat parameter.)"""
        return tuple(mesh.get_group(axis) for mesh, axis in self.axes)

    @cached_property
    def _box(self) -> Box:
        """The one box that a plain tensor or a DTensor holds."""
        if self.mesh is None:
            return Box((0,) * len(self.shape), tuple(self.shape))
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(self.shape, self.mesh, self.placements)
        return Box(tuple(offsets), tuple(sizes))

    @cached_property
    def first_index(self) -> int:
        if self.range_start is not None:
            return self.range_start + (0 if self.place is None else self.place.first_index)
        return row_major_index(self.shape, self._box.offsets)

    @cached_property
    def boxes(self) -> dict[Box, Tensor]:
        """The boxes of the full tensor that are here, each with its view of ``tensor``.

        Raises:
            ValueError: a DTensor does not hold what its placements say, or holds addends.
        """
        if self.range_start is not None:
            views = boxes_over(self.range_shape, self.range_start, self.tensor, self.dims)
            return views if self.place is None else {self.place.moved(box): view for box, view in views.items()}
        if self.is_partial or self._box.sizes != tuple(self.tensor.shape):
            raise ValueError(
                f"a DTensor of {self.placements} holds {tuple(self.tensor.shape)} here, not {self._box.sizes}"
            )
        return {self._box: self.tensor}

    def boxed(self, boxed_tensor: Callable[..., BoxedTensor] = BoxedTensor) -> BoxedTensor:
        """Make one tensor of the full shape from the ``boxes``, for a checkpoint."""
        return boxed_tensor(self.shape, self.boxes, dtype=self.tensor.dtype, device=self.tensor.device)


def with_local(tensor: Tensor, local: Tensor) -> Tensor:
    """Put ``local`` in the place of the local part of ``tensor``: itself, or a DTensor placed as ``tensor`` is."""
    if local_tensor(tensor) is tensor:
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def share_axes(tensors: Iterable[Tensor]) -> bool:
    """Tell whether the DTensors among ``tensors`` are all cut along the same axes of one mesh."""
    shards = [shard for shard in map(LocalShard.of, tensors) if shard.is_dtensor]
    return len({(shard.mesh, shard.axes) for shard in shards}) <= 1


# ---- what of another tensor belongs to a local one


def part_of(value: Tensor, target: Tensor) -> Tensor | None:
    """Return what belongs of ``value`` to the local part of ``target``; None where that cannot be told.

    A whole ``value`` is cut without communication. One that is placed otherwise is redistributed: then all ranks of
    the mesh call it together.
    """
    saved, here = LocalShard.of(value), LocalShard.of(target)
    local = saved.tensor
    if saved.is_dtensor and not here.is_dtensor:
        if value.shape != here.tensor.shape or saved.axes:
            return None
    elif saved.is_dtensor:
        if value.shape != target.shape or saved.mesh != here.mesh:
            return None
        if saved.placements != here.placements:
            local = local_tensor(value.redistribute(placements=here.placements))
    elif here.is_dtensor and value.shape == target.shape != here.tensor.shape:
        local = _cut(value, here)
    return local if local.shape == here.tensor.shape else None


def _cut(whole: Tensor, here: LocalShard) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    replicated = [Replicate()] * here.mesh.ndim
    value = DTensor.from_local(whole.to(here.tensor.device), here.mesh, replicated, run_check=False)
    return local_tensor(value.redistribute(placements=here.placements))


# ---- FSDP1's flat parameters


@dataclass(frozen=True)
class OriginalRange:
    """What this rank has of one original parameter: ``[start, start + numel)`` of it.

    Attributes:
        shape: of the original.
        offset: where that lies in this rank's part of the flat parameter.
        optimized: what the optimizer holds, the original (``use_orig_params``) or the flat parameter.
    """

    shape: torch.Size
    start: int
    offset: int
    numel: int
    optimized: Parameter

    def shard_in(self, flat_shard: Tensor) -> LocalShard:
        """Cut the range out of this rank's part [n] of the flat parameter, or out of state with the same layout."""
        return self.shard_over(flat_shard[self.offset : self.offset + self.numel])

    def shard_over(self, own: Tensor) -> LocalShard:
        """Describe ``own``, which has the elements of this range and no others."""
        return LocalShard.of_range(self.shape, self.start, own.view(-1))


def local_part_of_flat(flat_param: Parameter) -> Tensor:
    """[n], this rank's part of FSDP1's flat parameter, padding included."""
    # It is made at the first forward; until then the flat parameter itself is the part.
    return getattr(flat_param, "_local_shard", flat_param).detach()


def original_ranges(flat_param: Parameter) -> list[OriginalRange]:
    """List the range of each original parameter in FSDP1's flat parameter, in order; nothing is gathered.

    torch keeps in ``FlatParameter._shard_param_infos`` which range of each original lies where in this rank's part.
    """
    optimized = flat_param._params or [flat_param] * len(flat_param._shapes)
    return [
        OriginalRange(
            torch.Size(shape),
            start=owned.intra_param_start_idx or 0,
            offset=owned.offset_in_shard or 0,
            numel=owned.numel_in_shard or 0,
            optimized=param,
        )
        for shape, owned, param in zip(flat_param._shapes, flat_param._shard_param_infos, optimized, strict=True)
    ]
