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

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

from lion_dist.checkpoint.errors import CheckpointError

FORMAT = 2
NAME = "lion_dist.json"
READ_BYTES = 4 << 20

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
    try:
        entries = json.loads((directory / NAME).read_text())
        if entries["format"] == FORMAT and entries.pop("crc32") != _checksum_of(entries):
            raise CheckpointError(f"{directory / NAME} is damaged: it does not match its own checksum")
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {directory}: it has no {NAME}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / NAME} is damaged: {error!r}") from error
    if entries["format"] != FORMAT:
        raise CheckpointError(f"{directory} has format {entries['format']}, this version reads {FORMAT}")
    return entries


def _checksum_of(entries: dict) -> str:
    return f"{zlib.crc32(json.dumps(entries).encode()):08x}"


def check_sizes(directory: Path, files: dict[str, dict]) -> None:
    """Raise CheckpointError for a file that is missing or of another length. Reads no contents."""
    for name, entry in files.items():
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{directory / name} is missing: the checkpoint is not whole") from None
        if size != entry["bytes"]:
            raise CheckpointError(f"{directory / name} has {size} bytes, {entry['bytes']} were written: it is damaged")


def check_contents(directory: Path, name: str, entry: dict, progress: Progress | None = None) -> None:
    """Raise CheckpointError unless the file's bytes are those that were written."""
    checksum, buffer = 0, memoryview(bytearray(READ_BYTES))
    with open(directory / name, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
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
