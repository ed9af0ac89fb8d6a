"""The update codes on the CPU in C: ``codes_native.c``, compiled and called as ``cpu_backend/native.c`` is."""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from lion_dist.cpu_backend import compiled_library, native
from lion_dist.kernels.reference import random_keys_int

SOURCE = Path(__file__).with_suffix(".c")


class _Piece(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("lr", "decay", "other_decay")),
        *((name, ctypes.c_int) for name in ("type", "radix", "power", "draws_bits")),
        *((name, ctypes.c_uint32) for name in ("key_1", "key_2")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled codes, or None, said once, where they cannot be made. Asked for where the compiled step is used."""
    try:
        symbols = ["lion_encode", "lion_replay"]
        loaded = compiled_library.load(SOURCE, native.SOURCE, symbols=symbols)
    except compiled_library.NoLibraryError as problem:
        warnings.warn(
            f"lion_dist: {problem}, so update codes are made by PyTorch operations, with the same bits and more "
            "slowly. Install gcc or clang (or set CC) to change that.",
            stacklevel=2,
        )
        return None
    pointer, place, count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    loaded.lion_encode.argtypes = [pointer, pointer, pointer, pointer, ctypes.c_uint64, count]
    loaded.lion_encode.argtypes += [place, pointer, pointer, place, pointer]
    loaded.lion_replay.argtypes = [pointer, pointer, pointer, ctypes.c_uint64, count]
    loaded.lion_encode.restype = loaded.lion_replay.restype = None
    return loaded


class _PieceMaker:
    """The C structs of one message."""

    def __init__(self, codec, message: Tensor):
        self.codec = codec
        self.rates = codec.rates_of(message).tolist()
        self.keys = [(0, 0)] * codec.rows
        if codec.draws_bits:
            self.keys = [random_keys_int(codec.seed, step) for step in codec.steps_of(message).tolist()]

    def make(self, piece) -> _Piece:
        codec = self.codec
        kind = (native.TYPES[codec.dtype], codec.layout.radix, piece.power, codec.draws_bits)
        lr, decay = self.rates[piece.row]
        return _Piece(lr, decay, 1.0 if codec.cautious_wd else decay, *kind, *self.keys[piece.row])


def encode(codec, params: Tensor, count: Tensor) -> None:
    """See ``shard_codec.ShardCodec.encode``. One thread: digits of several pieces share their bytes."""
    maker, size = _PieceMaker(codec, codec.fixed), codec.dtype.itemsize
    old, new, packed = codec.old.data_ptr(), params.data_ptr(), codec.packed_of(codec.fixed).data_ptr()
    escapes = (codec.escape_index.data_ptr(), codec.escape_bits.data_ptr(), codec.capacity, count.data_ptr())
    for piece in codec.pieces[codec.shard]:
        struct, at = maker.make(piece), piece.start * size
        where = (piece.index_start, piece.stop - piece.start, piece.start)
        library().lion_encode(old + at, new + at, packed + piece.byte, ctypes.byref(struct), *where, *escapes)


def replay(codec, params: Tensor, messages: Tensor) -> None:
    """See ``shard_codec.ShardCodec.replay``; escapes are the caller's."""
    size, calls = codec.dtype.itemsize, []
    for shard, (mine, message) in enumerate(zip(params, messages, strict=True)):
        if shard == codec.shard:
            continue
        maker, packed, first = _PieceMaker(codec, message), codec.packed_of(message).data_ptr(), mine.data_ptr()
        for piece in codec.pieces[shard]:
            struct = maker.make(piece)
            where = (first + piece.start * size, packed + piece.byte)
            calls.append((*where, ctypes.byref(struct), piece.index_start, piece.stop - piece.start))
    replay_piece = library().lion_replay
    if params.numel() <= native.THREAD_NUMEL or torch.get_num_threads() == 1:
        for call in calls:
            replay_piece(*call)
    else:
        list(native.threads(torch.get_num_threads()).map(lambda call: replay_piece(*call), calls))
