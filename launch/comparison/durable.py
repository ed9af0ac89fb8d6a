"""Files and folders that are whole or not there, also after a power cut."""

import os
import secrets
import shutil
import warnings
from pathlib import Path


def sync(path: Path) -> None:
    """Make the names in a directory, or what a file holds, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """At once: a run that is killed here, by a power cut too, leaves the old file or the new one."""
    new = path.with_name(path.name + ".tmp")
    new.write_text(text)
    sync(new)
    new.replace(path)
    sync(path.parent)


def doomed_of(path: Path) -> Path:
    """A fresh name for what is to be removed: from then on it is no checkpoint."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.removed")


def remove(folder: Path, path: Path) -> None:
    """Remove ``folder``, which is or was to be ``path``.

    Raises:
        OSError: it cannot even be renamed, and is as it was.
    """
    doomed = doomed_of(path)
    folder.rename(doomed)
    sync(doomed.parent)
    clear(doomed)


def clear(doomed: Path) -> None:
    """Delete what ``doomed_of`` has named; what the file system does not let go is warned of."""
    try:
        shutil.rmtree(doomed)
    except OSError as error:
        warnings.warn(f"{doomed} is not gone: {error}. keep_last() will try again.", stacklevel=2)
