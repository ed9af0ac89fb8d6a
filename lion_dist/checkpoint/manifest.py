"""``lion_dist.json``: what makes a directory a checkpoint, and by which damage is noticed.

It is written last, and holds everything that is not a tensor::

    format        2
    saved         nanoseconds, larger than of any earlier checkpoint beside it: the order of ``newest``
    param_groups  lr, betas, weight_decay and the names of their parameters
    extra         the program's own numbers
    tied          {second name: first name} of parameters that are one tensor; stored under the first
    files         {name: {"bytes": ..., "crc32": ...}}, of every other file
    crc32         of the above

CRC-32 finds damage, not malice: zlib's runs at 2.2 GB/s on one core of a Xeon, hashlib's blake2b at 1.1, sha256 at 1.5.
"""

from __future__ import annotations

import io
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lion_dist.checkpoint.errors import CheckpointError

FORMAT = 2
NAME = "lion_dist.json"
READ_BYTES = 4 << 20
MOST_BYTES = 1 << 30  # of a manifest: the names of ten million parameters

Progress = Callable[[int], None]  # told of bytes as they are done


def write(directory: Path, entries: dict) -> None:
    """Write the manifest of ``entries`` and make it durable."""
    entries = {"format": FORMAT, **entries}
    with open(directory / NAME, "w") as file:
        json.dump(entries | {"crc32": _checksum_of(entries)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> dict:
    """The manifest of a checkpoint; CheckpointError when it is missing, damaged or of another format."""
    path = directory / NAME
    try:
        entries = json.loads(read_regular(path, MOST_BYTES))
        if entries["format"] == FORMAT and entries.pop("crc32") != _checksum_of(entries):
            raise CheckpointError(f"{path} is damaged: it does not match its own checksum")
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {directory}: it has no {NAME}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r:.300}") from error
    if entries["format"] != FORMAT:
        raise CheckpointError(f"{directory} has format {entries['format']!r:.40}, this version reads {FORMAT}")
    wrong = _wrong_entry(entries)
    if wrong is not None:
        raise CheckpointError(f"{path} is damaged: {wrong}")
    for name in entries["files"]:
        check_name(name)
    return entries


def _wrong_entry(entries: dict) -> str | None:
    """What of ``entries`` is not as :func:`write` writes it."""
    kinds = {"saved": int, "param_groups": list, "extra": dict, "tied": dict, "files": dict}
    for key, kind in kinds.items():
        if type(entries.get(key)) is not kind:
            return f"{key!r} is {entries.get(key)!r:.40}"
    for name, entry in entries["files"].items():
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("crc32")) is not str:
            return f"the entry of file {name!r} is {entry!r:.40}"
    for i, group in enumerate(entries["param_groups"]):
        names = group.get("params") if isinstance(group, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return f"param group {i} does not name its parameters"
    if not all(isinstance(name, str) for name in entries["tied"].values()):
        return "a tied parameter has no name"
    return None


def check_name(name: object) -> None:
    """Raise CheckpointError unless ``name`` is that of a file in the checkpoint's own directory."""
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name in (".", "..") or "\0" in name:
        raise CheckpointError(f"it names a file elsewhere, {name!r:.200}")


def read_regular(path: Path, most: int) -> bytes:
    """What a file holds; CheckpointError when it is a device, a pipe or a directory, or has more than ``most`` bytes.

    Raises:
        FileNotFoundError
    """
    with open_regular(path) as file, _readable(path):
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CheckpointError(f"{path} has {size} bytes, more than any checkpoint's")
        return file.read(size)  # no more: some files of /proc say 0 and never end


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def open_regular(path: Path) -> io.FileIO:
    """A file for reading, unbuffered, which is a regular one: to open a pipe would wait for its other end."""
    try:
        file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path} is no regular file")
    return file


def _checksum_of(entries: dict) -> str:
    return f"{zlib.crc32(json.dumps(entries).encode()):08x}"


def check_sizes(directory: Path, files: dict[str, dict]) -> None:
    """Raise CheckpointError for a file that is missing or of another length. Reads no contents."""
    for name, entry in files.items():
        try:
            found = (directory / name).stat()
        except OSError as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise CheckpointError(f"{directory / name} {why}: the checkpoint is not whole") from None
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{directory / name} is no regular file: it is not what was written")
        if found.st_size != entry["bytes"]:
            raise CheckpointError(
                f"{directory / name} has {found.st_size} bytes, {entry['bytes']} were written: it is damaged"
            )


def check_contents(directory: Path, name: str, entry: dict, progress: Progress | None = None) -> None:
    """Raise CheckpointError unless the file's bytes are those that were written."""
    checksum, left, buffer = 0, entry["bytes"], memoryview(bytearray(READ_BYTES))
    with open_regular(directory / name) as file, _readable(directory / name):
        while count := file.readinto(buffer[: max(0, left)]):
            left -= count
            checksum = zlib.crc32(buffer[:count], checksum)
            if progress is not None:
                progress(count)
    if f"{checksum:08x}" != entry["crc32"]:
        raise CheckpointError(
            f"{directory / name} is damaged: its CRC-32 is {checksum:08x}, {entry['crc32']} was written. "
            "Load an older checkpoint."
        )


def share_of(files: dict[str, dict], rank: int, size: int) -> list[str]:
    """The files that ``rank`` of ``size`` checks: each file on one rank, the bytes spread evenly."""
    loads = [0] * size
    share = []
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name]["bytes"]
        if lightest == rank:
            share.append(name)
    return share
