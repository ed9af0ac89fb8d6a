"""``.metadata`` of torch.distributed.checkpoint, read without trusting it.

It is a pickle. The unpickler gives each class that belongs there a stand-in of its own, made for this one file: an
object that remembers what it was built from and does nothing. So nothing of the process can be reached or changed, not
even by the instruction that sets attributes of a class. What was built is then checked, piece by piece, and put into
torch's own classes: every dtype is one that a checkpoint has, the pieces of a tensor cover it once, and every piece
lies inside a file of the checkpoint. All of that is known before anything is allocated.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lion_dist.checkpoint.errors import CheckpointError
from lion_dist.checkpoint.manifest import check_name, read_regular

NAME = ".metadata"
MOST_BYTES = 1 << 30
MOST_COMPARISONS = 50_000_000  # of pieces of one tensor with each other

DTYPES = {  # by name; without those of quantized tensors, whose bytes are not all that they are
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not name.startswith(("q", "bits"))
}
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),  # where Python 3.13 keeps them
}


class _StandIn:
    """What an object of the pickle was made from: the arguments of its class, and its state."""

    def __init__(self, *args):
        self.args, self.state = args, None

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file)
        self._classes: dict[str, object] = {}

    def find_class(self, module: str, name: str):
        if module == "torch" and name in DTYPES:
            return name  # a string, which has no attributes to set
        if (module, name) == ("builtins", "getattr"):
            return _member_by_name
        if name not in _CLASSES.get(module, ()):
            raise CheckpointError(f"it asks for {module}.{name}, which is no part of a checkpoint's metadata")
        return self._classes.setdefault(name, type(name, (_StandIn,), {}))

    def persistent_load(self, pid):
        raise CheckpointError("it refers to an object outside, which metadata does not")


def _member_by_name(kind: object, name: object) -> _StandIn:
    """Stands in for ``getattr``, by which Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickle members of an enum."""
    if not isinstance(kind, type) or kind.__name__ != "_MEM_FORMAT_ENCODING" or not isinstance(name, str):
        raise CheckpointError(f"it asks for an attribute of {kind!r}, and metadata does so of memory formats alone")
    return kind(name)


def read_metadata(directory: Path, files: Mapping[str, dict] | None = None) -> Metadata:
    """The tensors of a checkpoint and where their pieces are.

    Args:
        files: of the manifest, in which every piece has to lie; None: any file of the directory.

    Raises:
        CheckpointError: it is damaged, or describes what is no checkpoint.
    """
    path = directory / NAME
    content = read_regular(path, MOST_BYTES)
    try:
        built = _Unpickler(io.BytesIO(content)).load()
        return _metadata(built, {name: entry["bytes"] for name, entry in (files or {}).items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except (MemoryError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is refused: it is built to take more than it holds ({error!r})") from None
    except Exception as error:  # a pickle that is damaged can end in anything
        raise CheckpointError(f"{path} is damaged: {error!r:.300}") from error


# ---- from stand-ins to torch's classes


def _metadata(built: object, sizes: dict[str, int]) -> Metadata:
    state = _state(built, "Metadata", ("state_dict_metadata", "storage_data"))
    tensors = {}
    for name, entry in _items(state["state_dict_metadata"], "state_dict_metadata"):
        if not isinstance(name, str):
            raise CheckpointError(f"a tensor is named by a {type(name).__name__}")
        tensors[name] = _tensor(name, entry)
    places = {}
    for index, place in _items(state["storage_data"], "storage_data"):
        index = _index(index)
        places[index] = _place(index, place, sizes)
    total = 0
    for name, tensor in tensors.items():
        for i, chunk in enumerate(tensor.chunks):
            place = places.get(MetadataIndex(name, chunk.offsets, i))
            if place is None:
                raise CheckpointError(f"the piece of {name!r} at {tuple(chunk.offsets)} is in no file")
            nbytes = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            if nbytes > place.length:
                raise CheckpointError(f"a piece of {name!r} has {nbytes} bytes, and {place.length} in its file")
            total += nbytes
    if sizes and total > sum(sizes.values()):  # several pieces in one place
        raise CheckpointError(f"its tensors have {total} bytes, and its files {sum(sizes.values())}")
    return Metadata(tensors, storage_data=places)


def _tensor(name: str, entry: object) -> TensorStorageMetadata:
    if _kind(entry) != "TensorStorageMetadata":
        raise CheckpointError(f"{name!r} is a {_kind(entry)} and no tensor: it is not unpickled")
    state = _state(entry, "TensorStorageMetadata", ("properties", "size", "chunks"))
    properties = getattr(state["properties"], "state", None)
    if _kind(state["properties"]) != "TensorProperties" or not isinstance(properties, tuple) or not properties:
        raise CheckpointError(f"{name!r} has no properties")
    dtype = DTYPES.get(properties[0]) if isinstance(properties[0], str) else None
    if dtype is None:
        raise CheckpointError(f"{name!r} has a dtype that no checkpoint holds")
    size = _size(state["size"], f"the size of {name!r}")
    chunks = []
    for chunk in _list(state["chunks"], f"the pieces of {name!r}"):
        place = _state(chunk, "ChunkStorageMetadata", ("offsets", "sizes"))
        offsets, sizes = (_size(place[key], f"a piece of {name!r}") for key in ("offsets", "sizes"))
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    check_coverage(name, size, [(tuple(c.offsets), tuple(c.sizes)) for c in chunks])
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), chunks)


def _index(built: object) -> MetadataIndex:
    state = _state(built, "MetadataIndex", ("fqn", "offset", "index"))
    if not isinstance(state["fqn"], str) or not isinstance(state["index"], int | None):
        raise CheckpointError("a piece is named by something else than a string and a number")
    offset = _size(state["offset"], f"a piece of {state['fqn']!r}")
    return MetadataIndex(state["fqn"], torch.Size(offset), state["index"])


def _place(index: MetadataIndex, built: object, sizes: dict[str, int]) -> _StorageInfo:
    state = _state(built, "_StorageInfo", ("relative_path", "offset", "length"))
    name, offset, length = state["relative_path"], state["offset"], state["length"]
    check_name(name)
    if not all(isinstance(number, int) and number >= 0 for number in (offset, length)):
        raise CheckpointError(f"a piece of {index.fqn!r} lies at {offset!r}, of {length!r} bytes")
    if name not in sizes:
        if sizes:
            raise CheckpointError(f"a piece of {index.fqn!r} is in {name!r}, which the manifest does not list")
        return _StorageInfo(name, offset, length)
    if offset + length > sizes[name]:
        raise CheckpointError(f"a piece of {index.fqn!r} ends at {offset + length} of {name!r}, of {sizes[name]} bytes")
    return _StorageInfo(name, offset, length)


def _kind(built: object) -> str:
    return type(built).__name__


def _state(built: object, kind: str, keys: Sequence[str]) -> dict:
    if not isinstance(built, _StandIn) or _kind(built) != kind or not isinstance(built.state, dict):
        raise CheckpointError(f"it holds a {_kind(built)} where a {kind} belongs")
    missing = [key for key in keys if key not in built.state]
    if missing:
        raise CheckpointError(f"a {kind} lacks {', '.join(missing)}")
    return built.state


def _items(built: object, what: str) -> Iterator[tuple[object, object]]:
    if not isinstance(built, dict):
        raise CheckpointError(f"{what} is a {_kind(built)}")
    return iter(built.items())


def _list(built: object, what: str) -> list:
    if not isinstance(built, list):
        raise CheckpointError(f"{what} are a {_kind(built)}")
    return built


def _size(built: object, what: str) -> tuple[int, ...]:
    """What ``torch.Size`` was given."""
    if not isinstance(built, _StandIn) or _kind(built) != "Size" or len(built.args) != 1:
        raise CheckpointError(f"{what} is a {_kind(built)} and no size")
    size = built.args[0]
    if not isinstance(size, tuple) or len(size) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in size):
        raise CheckpointError(f"{what} is no size")
    if math.prod(size) >= 2**63:
        raise CheckpointError(f"{what} has {math.prod(size)} elements")
    return size


# ---- coverage

Piece = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def check_coverage(name: str, size: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    """Raise CheckpointError unless ``pieces`` cover each element of a tensor of ``size`` once."""
    total = 0
    for offsets, sizes in pieces:
        inside = len(offsets) == len(sizes) == len(size) and all(
            o + n <= whole for o, n, whole in zip(offsets, sizes, size, strict=True)
        )
        if not inside:
            raise CheckpointError(f"a piece of {name!r} at {offsets}, of {sizes}, is not inside of {size}")
        total += math.prod(sizes)
    if total != math.prod(size):
        raise CheckpointError(f"the pieces of {name!r} have {total} elements, the tensor {math.prod(size)}")
    pair = _overlap(size, [piece for piece in pieces if math.prod(piece[1])])
    if pair is not None:
        raise CheckpointError(f"two pieces of {name!r} overlap, at {pair[0][0]} and {pair[1][0]}")


def _overlap(size: tuple[int, ...], pieces: list[Piece]) -> tuple[Piece, Piece] | None:
    """Two pieces that share an element; a sweep along the dimension that is cut most often."""
    if len(pieces) < 2:
        return None
    if not size:
        return pieces[0], pieces[1]
    dim = max(range(len(size)), key=lambda d: len({offsets[d] for offsets, _ in pieces}))
    open_pieces: list[Piece] = []
    comparisons = 0
    for piece in sorted(pieces, key=lambda p: p[0][dim]):
        start = piece[0][dim]
        open_pieces = [other for other in open_pieces if other[0][dim] + other[1][dim] > start]
        comparisons += len(open_pieces)
        if comparisons > MOST_COMPARISONS:
            raise CheckpointError("a tensor is in so many pieces beside each other that they cannot be checked")
        for other in open_pieces:
            if all(a < b + m and b < a + n for a, n, b, m in zip(*piece, *other, strict=True)):
                return other, piece
        open_pieces.append(piece)
    return None
