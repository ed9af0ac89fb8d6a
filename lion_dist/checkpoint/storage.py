"""torch.distributed.checkpoint's files: written with checksums, read without unpickling.

The files are those of its ``FileSystemWriter``, and any of its readers reads them (``.metadata``: ``metadata.py``). A
tensor in a ``.distcp`` file is a ``torch.save`` archive (an uncompressed zip): its bytes are found by the zip's
directory, its dtype and shape by the metadata, so the pickle in it is never looked at.
"""

from __future__ import annotations

import io
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lion_dist.boxed_tensor import BoxedTensor
from lion_dist.checkpoint import manifest
from lion_dist.checkpoint.directory import Partial
from lion_dist.checkpoint.errors import CheckpointError
from lion_dist.checkpoint.manifest import Progress
from lion_dist.checkpoint.metadata import read_metadata

# ---- writing


class ChecksummedFile:
    """A file that sums up what is written to it."""

    def __init__(self, file, progress: Progress | None):
        self.file, self.progress = file, progress
        self.nbytes = self.checksum = 0
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            count = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.checksum = zlib.crc32(data, self.checksum)
        self.nbytes += count
        if self.progress is not None:
            self.progress(count)
        return count

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        """For torch's own ``os.fsync``, which knows nothing of what is still in the buffer."""
        self.file.flush()
        return self.file.fileno()

    def make_durable(self) -> None:
        os.fsync(self.fileno())

    def close(self) -> None:
        self.file.close()


class _ChecksummingFileSystem(FileSystem):
    def __init__(self, partial: Partial, progress: Progress | None):
        self.written: dict[str, dict] = {}
        self.partial, self.progress = partial, progress

    @contextmanager
    def create_stream(self, path, mode: str) -> Iterator[ChecksummedFile]:
        self.partial.check()
        with open(path, mode) as file:
            stream = ChecksummedFile(file, self.progress)
            try:
                yield stream
                stream.make_durable()
            except Exception as error:
                if stream.error is not None:  # torch.save says only that writing failed
                    raise stream.error from error
                raise
        self.written[Path(path).name] = {"bytes": stream.nbytes, "crc32": f"{stream.checksum:08x}"}

    def mkdir(self, path) -> None:
        """``directory.begin`` made it; where it is not, ranks see different file systems."""
        self.partial.check()

    def rename(self, path, new_path) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class Writer(FileSystemWriter):
    """Writes this rank's pieces to one file, one after another, and makes it durable.

    The base class keeps a copy of the last piece of every tensor until the file is whole: a copy of the state.
    """

    def __init__(self, partial: Partial, progress: Progress | None = None):
        super().__init__(partial.path, sync_files=True)
        self.fs = _ChecksummingFileSystem(partial, progress)
        self._copy = torch.empty(0, dtype=torch.uint8)

    @property
    def written(self) -> dict[str, dict]:
        """``{name: {"bytes": ..., "crc32": ...}}`` of the files that this rank wrote."""
        return self.fs.written

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name, results = f"{plan.storage_data.prefix}0.distcp", []
        if plan.items:
            with self.fs.create_stream(self.path / name, "wb") as file:
                for item in plan.items:
                    start = file.tell()
                    torch.save(self._copy_of(planner.resolve_data(item).detach()), file)
                    length = file.tell() - start
                    results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _copy_of(self, piece: Tensor) -> Tensor:
        """``piece`` in memory of its own, for torch.save would write all of the memory that a view is part of.

        Pieces of one size share it, one after another: freed and allocated anew, each may come to lie elsewhere, and
        five times as much was seen to stay in memory.
        """
        if self._copy.nbytes != piece.nbytes:
            self._copy = torch.empty(piece.nbytes, dtype=torch.uint8)
        return self._copy.view(piece.dtype).view(piece.shape).copy_(piece)


# ---- reading


class Reader(FileSystemReader):
    """Reads pieces one at a time; needs no process group."""

    def __init__(self, path: Path, files: dict[str, dict]):
        """``files``: of the manifest."""
        super().__init__(path)
        self.metadata = read_metadata(path, files)

    def read_metadata(self, *args, **kwargs) -> Metadata:
        self.metadata.storage_meta = self.metadata.storage_meta or StorageMeta()
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata

    def read_into(self, tensors: dict[str, BoxedTensor]) -> None:
        """Fill ``tensors``, named as in the checkpoint, in place."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(tensors, storage_reader=self, planner=planner, no_dist=True)
        except CheckpointException as error:  # a BaseException
            raise next(iter(error.failures.values()))[0] from error

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_place: dict[tuple[str, int], list[ReadItem]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise CheckpointError(f"{item.storage_index.fqn!r} in {self.path} is no tensor: it is not unpickled")
            stored = self.metadata.storage_data[item.storage_index]
            by_place.setdefault((stored.relative_path, stored.offset), []).append(item)
        for _, items in sorted(by_place.items(), key=lambda pair: pair[0]):
            piece = self._piece(items[0].storage_index)
            for item in items:
                target = planner.resolve_tensor(item).detach()
                target.copy_(_narrow(piece, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def check_pieces(self, names: Sequence[str]) -> None:
        """Raise CheckpointError unless each piece in the files ``names`` is there in its form; reads no contents."""
        for name, stored in self.metadata.state_dict_metadata.items():
            for i, chunk in enumerate(stored.chunks):
                index = MetadataIndex(name, chunk.offsets, i)
                place = self.metadata.storage_data[index]
                if place.relative_path in names:
                    with self._opened(place) as file, self._explained(index):
                        _find_data(io.BufferedReader(_Window(file, place.offset, place.length)), *self._form(index))

    def _piece(self, index: MetadataIndex) -> Tensor:
        """One stored piece, in a fresh CPU tensor."""
        place = self.metadata.storage_data[index]
        sizes, dtype = self._form(index)
        with self._opened(place) as file:
            file.seek(place.offset)
            archive = io.BytesIO(file.read(place.length))  # no longer than the file
        with self._explained(index):
            start = _find_data(archive, sizes, dtype)
            return torch.frombuffer(archive.getbuffer(), dtype=dtype, count=math.prod(sizes), offset=start).view(sizes)

    def _form(self, index: MetadataIndex) -> tuple[torch.Size, torch.dtype]:
        stored = self.metadata.state_dict_metadata[index.fqn]
        return stored.chunks[index.index].sizes, stored.properties.dtype

    def _opened(self, place: _StorageInfo) -> io.FileIO:
        return manifest.open_regular(self.path / place.relative_path)

    @contextmanager
    def _explained(self, index: MetadataIndex) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # zipfile raises a dozen kinds for archives that are none
            place = self.metadata.storage_data[index]
            where = f"{self.path / place.relative_path} at {place.offset}"
            raise CheckpointError(f"{where} holds no piece of {index.fqn!r}: {error!r:.200}") from error


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int):
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self.position = base + offset
        return self.position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        self.file.seek(self.start + self.position)
        count = self.file.readinto(memoryview(buffer)[:count]) if count else 0
        self.position += count
        return count


def _find_data(archive: BinaryIO, sizes: Sequence[int], dtype: torch.dtype) -> int:
    """Where in a ``torch.save`` archive the bytes of its contiguous tensor start; ValueError when it is another one."""
    with zipfile.ZipFile(archive) as zipped:
        (data,) = (entry for entry in zipped.infolist() if entry.filename.endswith("/data/0"))
        (order,) = (entry for entry in zipped.infolist() if entry.filename.endswith("/byteorder"))
        if order.compress_type != zipfile.ZIP_STORED or order.file_size > 16:
            raise ValueError(f"its byte order takes {order.file_size} bytes")
        if zipped.read(order).decode() != sys.byteorder:
            raise ValueError(f"it was written on a {zipped.read(order).decode()}-endian machine")
    nbytes = math.prod(sizes) * dtype.itemsize
    if data.compress_type != zipfile.ZIP_STORED or data.file_size != nbytes:
        raise ValueError(f"{data.file_size} bytes of data, {nbytes} expected")
    archive.seek(data.header_offset)
    start = start_of_data(data.header_offset, archive.read(30))
    if start + nbytes > archive.seek(0, os.SEEK_END):
        raise ValueError(f"{nbytes} bytes from {start} on are more than it has")
    return start


def start_of_data(header_offset: int, header: bytes | memoryview) -> int:
    """Where a zip entry's bytes start: after its local header [30] and the name and extra field that this announces."""
    return header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))


def _narrow(piece: Tensor, offsets, lengths) -> Tensor:
    return piece[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
