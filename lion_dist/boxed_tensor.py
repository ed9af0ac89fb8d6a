"""State as a tensor that knows its boxes: what ``state_dict()`` holds, and what torch's checkpoints save and load."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from lion_dist.boxes import Box

# torch.distributed.checkpoint takes 0.6 s to import, so it is imported by those who call it.

IS_NO_OPERAND = """on a BoxedTensor: it is a place for checkpoints, not an operand. For whole tensors call \
optimizer.consolidate_state_dict() on all ranks."""
PIECE_BYTES = 8 << 20  # what a save or load holds beside the state; torch.save is slower above (caches) and below


@dataclass(frozen=True)
class Part:
    """Whose part of a full tensor some boxes are.

    Attributes:
        rank, num_ranks: of the ranks that share the tensor.
        has_own_group: these are not all ranks of the optimizer, and others may hold another tensor of this name.
        is_named: the program has asked for this rank's part by name (:func:`this_ranks_part`).
        mesh: the ranks that share the tensor, where they can gather it.
        cut_group: where those hold a part of it only (tensor parallel), the ranks that hold the others.
    """

    rank: int
    num_ranks: int
    has_own_group: bool = False
    is_named: bool = False
    mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)
    cut_group: ProcessGroup | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"rank {self.rank}'s part of {self.num_ranks}"

    def __deepcopy__(self, _memo: dict) -> Part:
        return self  # it cannot change, and process groups cannot be copied


class BoxedTensor(torch.Tensor):
    """Some boxes of a full tensor, as views of local memory; torch.distributed.checkpoint saves and loads it in place.

    Pickling one that does not hold the full tensor is refused, since a file of it would look like the whole state.

    Args:
        shape: of the full tensor.
        boxes: disjoint, each with its view; none on a rank that holds no part.
        dtype, device: of the views.
        part: whose boxes these are; None where nobody asks.

    Attributes:
        pieces: the boxes cut into pieces of at most PIECE_BYTES, with their views: what is written and read at a time.
    """

    boxes: dict[Box, Tensor]
    part: Part | None

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        boxes: Mapping[Box, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        part: Part | None = None,
    ):
        self = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        self.boxes = {box: local for box, local in boxes.items() if box.numel}
        self.part = part
        return self

    @cached_property
    def pieces(self) -> dict[Box, Tensor]:
        limit = PIECE_BYTES // self.dtype.itemsize
        return {piece: box.view_of(piece, local) for box, local in self.boxes.items() for piece in box.pieces(limit)}

    @property
    def held_numel(self) -> int:
        """Elements in the boxes."""
        return sum(box.numel for box in self.boxes)

    def __repr__(self, *, tensor_contents=None) -> str:
        part = "" if self.part is None else f", {self.part}"
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, boxes={list(self.boxes)}{part})"

    def with_boxes(self, boxes: Mapping[Box, Tensor], part: Part | None = None) -> BoxedTensor:
        """The same tensor over other memory; ``part``: None for the same."""
        like = next(iter(boxes.values()), self)
        return type(self)(self.shape, boxes, dtype=like.dtype, device=like.device, part=part or self.part)

    def of_each_box(self, function: Callable[..., Tensor], *args, **kwargs) -> BoxedTensor:
        """The same tensor over ``function(local, *args, **kwargs)`` of each box's memory."""
        like = function(torch.empty(0, dtype=self.dtype, device=self.device), *args, **kwargs)
        boxes = {box: function(local, *args, **kwargs) for box, local in self.boxes.items()}
        return type(self)(self.shape, boxes, dtype=like.dtype, device=like.device, part=self.part)

    def new_empty(self, size: Sequence[int], *, device=None, **_options) -> BoxedTensor:
        """A place for a copy, as torch's ``async_save`` makes one; it copies the attributes after."""
        return type(self)(size, {}, dtype=self.dtype, device=self.device if device is None else torch.device(device))

    def __deepcopy__(self, memo: dict) -> BoxedTensor:
        if id(self) not in memo:
            memo[id(self)] = self.with_boxes({box: local.clone() for box, local in self.boxes.items()})
        return memo[id(self)]

    def __reduce_ex__(self, _protocol):
        is_named = self.part is not None and self.part.is_named
        if self.held_numel < math.prod(self.shape) and not is_named:
            raise TypeError(
                f"this rank holds {self.held_numel} of the {math.prod(self.shape)} elements of a tensor of optimizer "
                f"state ({self.part or 'a part'}), and a file of them would pass for the whole. For one file: all "
                "ranks call optimizer.consolidate_state_dict(to=0), then rank 0 saves optimizer.full_state_dict(). For "
                "a file of each rank: save lion_dist.this_ranks_part(optimizer.state_dict()). Or save with "
                "lion_dist.checkpoint or torch.distributed.checkpoint, on all ranks."
            )
        boxes = [(box.offsets, box.sizes, local.clone()) for box, local in self.boxes.items()]
        owner = None if self.part is None else (self.part.rank, self.part.num_ranks)
        return _rebuild, (tuple(self.shape), boxes, self.dtype, self.device, owner)

    @classmethod
    def __torch_dispatch__(cls, func, types, args: tuple = (), kwargs: dict | None = None):
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.clone.default, aten._to_copy.default) or func.overloadpacket is aten.to:
            return args[0].of_each_box(func, *args[1:], **kwargs or {})
        raise NotImplementedError(f"{func} {IS_NO_OPERAND}")

    # What torch.distributed.checkpoint asks of a tensor that is spread over ranks.

    def __create_write_items__(self, fqn: str, _object: object) -> list:
        if self.part is not None and self.part.has_own_group and not self.part.is_named:
            raise ValueError(
                f"{fqn!r} belongs to {self.part.num_ranks} ranks (a process_group of its own), so other ranks may hold "
                "another parameter of this name, and a checkpoint that all ranks write cannot tell them apart. Save "
                "lion_dist.this_ranks_part(optimizer.state_dict()) to a checkpoint of each group, or to a file of each "
                "rank."
            )
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        items = []
        properties = TensorProperties(dtype=self.dtype)
        for chunk in self.__create_chunk_list__():
            data = TensorWriteData(chunk, properties, self.shape)
            items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in self.pieces]

    @cached_property
    def _views_by_offsets(self) -> dict[tuple[int, ...], Tensor]:
        return {piece.offsets: view for piece, view in self.pieces.items()}

    def __get_tensor_shard__(self, index) -> Tensor:
        view = self._views_by_offsets.get(tuple(index.offset))
        if view is None:
            raise ValueError(f"no piece of {index.fqn!r} starts at {tuple(index.offset)}: there are {[*self.pieces]}")
        return view


def _rebuild(shape, boxes, dtype, device, owner=None) -> BoxedTensor:
    boxes = {Box(offsets, sizes): local for offsets, sizes, local in boxes}
    part = None if owner is None else Part(*owner, is_named=True)
    return BoxedTensor(shape, boxes, dtype=dtype, device=device, part=part)


torch.serialization.add_safe_globals([_rebuild])  # torch.load's default, weights_only=True, takes a state_dict back


def this_ranks_part(state_dict):
    """``state_dict``, or whatever dicts, lists and tuples hold one, as what this rank keeps in a file of its own.

    ``torch.save(this_ranks_part(optimizer.state_dict()), f"optimizer-{rank}.pt")`` on every rank: without the name
    ``torch.save`` refuses, since one rank's part of the state is easily taken for the whole. It loads on the same rank
    of as many ranks, with the same buckets.
    """
    if isinstance(state_dict, BoxedTensor):
        part = state_dict.part or Part(0, 1)
        return state_dict.with_boxes(state_dict.boxes, dataclasses.replace(part, is_named=True))
    if isinstance(state_dict, Mapping):
        return {key: this_ranks_part(value) for key, value in state_dict.items()}
    if type(state_dict) in (list, tuple):
        return type(state_dict)(map(this_ranks_part, state_dict))
    return state_dict


# ---- boxes out of a full tensor, or out of other boxes


def can_read(source: Tensor, box: Box) -> bool:
    """Whether ``source`` holds every element of ``box``: any full tensor does, other boxes may."""
    if not isinstance(source, BoxedTensor) or box in source.boxes:
        return True
    common = [box.intersection(other) for other in source.boxes]
    return sum(inner.numel for inner in common if inner is not None) == box.numel


def read_box(source: Tensor, box: Box) -> Tensor:
    """The elements of ``box``: a view where ``source`` has them in one piece. Only where :func:`can_read`."""
    if not isinstance(source, BoxedTensor):
        return source[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
    if box in source.boxes:
        return source.boxes[box]
    result = torch.empty(box.sizes, dtype=source.dtype, device=source.device)
    for other, local in source.boxes.items():
        inner = box.intersection(other)
        if inner is not None:
            box.view_of(inner, result).copy_(other.view_of(inner, local))
    return result
