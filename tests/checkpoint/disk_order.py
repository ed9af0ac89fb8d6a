"""The order in which a program makes things durable, as the kernel sees it: contents at each fsync, and renames."""

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from unittest import mock


@dataclass(frozen=True)
class Event:
    """``fsync`` of a file (``seen``: its bytes by then) or of a directory ({name: inode}), or a rename (``name``)."""

    call: str
    inode: int
    seen: object = None
    name: str = ""


@contextlib.contextmanager
def recorded():
    """Yields the list of events of this process within the block."""
    events: list[Event] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def fsync_seen(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        events.append(Event("fsync", os.fstat(number).st_ino, _seen_by_kernel(number)))
        return fsync(descriptor)

    def renaming(function):
        def call(source, target, **options):
            events.append(Event("rename", os.stat(source).st_ino, name=os.fspath(target)))
            return function(source, target, **options)

        return call

    with (
        mock.patch.object(os, "fsync", fsync_seen),
        mock.patch.object(os, "rename", renaming(rename)),
        mock.patch.object(os, "replace", renaming(replace)),
    ):
        yield events


def _seen_by_kernel(descriptor):
    """Not what is still in a buffer of Python's."""
    path = f"/proc/self/fd/{descriptor}"
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        return _names_in(os.readlink(path))
    with open(path, "rb") as file:
        return file.read()


def _names_in(directory):
    return {entry.name: entry.inode() for entry in os.scandir(directory)}


def faults(events: list[Event], path: Path) -> list[str]:
    """Why the file or directory ``path``, which is there now, might not survive a power cut; empty when it does."""
    found = []
    given = [i for i, event in enumerate(events) if event.call == "rename" and event.name == str(path)]
    named = max(given, default=len(events))  # what got its name before it was written has no other moment
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        last = _last_fsync(events, file)
        if last is None:
            found.append(f"{file.name} was never synced")
        elif events[last].seen != file.read_bytes():
            found.append(f"{file.name} was synced before its last bytes were written")
        elif last > named:
            found.append(f"{file.name} was synced after the checkpoint got its name")
    if path.is_dir():
        last = _last_fsync(events, path)
        if last is None or not _names_in(path).items() <= events[last].seen.items():
            found.append(f"{path.name} was not synced with its files")
        elif last > named:
            found.append(f"{path.name} was synced after it got its name")
    last = _last_fsync(events, path.parent)
    if last is None or events[last].seen.get(path.name) != path.stat().st_ino:
        found.append(f"{path.parent.name} was not synced with {path.name}")
    return found


def _last_fsync(events: list[Event], path: Path) -> int | None:
    inode = path.stat().st_ino
    return max((i for i, e in enumerate(events) if e.call == "fsync" and e.inode == inode), default=None)
