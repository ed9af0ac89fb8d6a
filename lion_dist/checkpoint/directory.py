"""Directories of checkpoints, such that at no moment a power cut or SIGKILL loses one.

A save of ``path`` goes through these states; each arrow is one system call::

    path (old)                                       what load(path) takes: the old one
    path (old)  path.partial (files, no manifest)                           the old one
    path (old)  path.partial (whole, durable)                               the old one
    path.old    path.partial (whole)                                        the old one, from path.old
    path (new)  path.old                                                    the new one
    path (new)  path.partial (the old one, going away)                      the new one
    path (new)                                                              the new one

So a name ending in ``.partial`` is never a checkpoint, and ``path.old`` is one only while there is no ``path``. A
symlink is another name of a checkpoint: it can be loaded, but is never replaced, removed, or counted by ``keep_last``.

Two jobs that save the same path at once share ``path.partial``: the one that began last owns it, by a token in it, and
the other one fails. It is no lock (shared file systems have none that survives a kill), but no mixture gets the name.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lion_dist import values
from lion_dist.checkpoint import manifest
from lion_dist.checkpoint.errors import CheckpointError

_OURS = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|lion_dist\.(json|owner)")
_OWNER = "lion_dist.owner"
_DEAD_AFTER = 3600  # seconds without a write; a save that hangs in a slow file system is not dead yet


@dataclass(frozen=True)
class Partial:
    """``path.partial`` as one save began it; ``token`` is in it for as long as no other save has taken it over."""

    path: Path
    token: str

    def is_own(self) -> bool:
        try:
            return (self.path / _OWNER).read_text() == self.token
        except OSError:
            return False

    def check(self) -> None:
        """Raise CheckpointError unless it is still this save's."""
        if not self.is_own():
            raise CheckpointError(
                f"{self.path} is not the directory that this save began: another job saves under the same name, or "
                "this rank does not see the first one's files. Give each job a folder of its own, on a file system "
                "that its ranks share."
            )

    def abandon(self) -> None:
        """Give a full disk its room back; what cannot be removed the next save clears."""
        if self.is_own():
            shutil.rmtree(self.path, ignore_errors=True)


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def old_of(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def find(path: Path) -> Path:
    """The directory to load ``path`` from: itself, or ``path.old`` when a save was killed between two renames."""
    if not path.exists() and (old_of(path) / manifest.NAME).is_file():
        return old_of(path)
    if not (path / manifest.NAME).is_file():
        hint = "Give the directory that save() was given."
        if partial_of(path).exists():
            hint = f"{partial_of(path).name} beside it is a save that did not finish."
        raise CheckpointError(f"no checkpoint at {path}: it has no {manifest.NAME}. {hint}")
    return path


def begin(path: Path) -> Partial:
    """An empty ``path.partial`` to write into, after putting right what a killed save left behind."""
    _refuse_name(path)
    if path.exists() and not (path / manifest.NAME).is_file():
        if not path.is_dir() or any(path.iterdir()):
            raise CheckpointError(f"{path} exists and is no checkpoint: it would be replaced. Give another name.")
        path.rmdir()
    if not path.exists() and (old_of(path) / manifest.NAME).is_file():
        old_of(path).rename(path)
    partial, old = partial_of(path), old_of(path)
    for leftover in (partial, old):
        if leftover.exists():
            _refuse_foreign(leftover)
    if old.exists():
        remove(old, partial)
    elif partial.exists():
        shutil.rmtree(partial)
    missing = [p for p in path.parents if not p.exists()]
    partial.mkdir(parents=True)
    begun = Partial(partial, secrets.token_hex(8))
    (partial / _OWNER).write_text(begun.token)
    for parent in (path.parent, *(p.parent for p in missing)):
        sync(parent)
    return begun


def commit(path: Path, begun: Partial) -> None:
    """Give the whole ``path.partial`` its name, durably, and remove the one that had it."""
    partial, old = begun.path, old_of(path)
    begun.check()
    sync(partial)
    (partial / _OWNER).unlink()
    if path.exists():
        path.rename(old)
    partial.rename(path)
    sync(path.parent)
    if old.exists():
        remove(old, partial)


def remove(directory: Path, partial: Path) -> None:
    """Remove a checkpoint; from the first moment on it is named ``partial`` and is none any more."""
    if partial.exists():
        shutil.rmtree(partial)
    directory.rename(partial)
    sync(partial.parent)
    shutil.rmtree(partial)


def newest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint directly under ``folder``, by the order of their saves; None when there is none.

    Whole: it has a manifest, and every file in it at its full length (checksums are for ``load`` and ``verify``).
    Partial ones are never taken. The path is for ``load``; after a save was killed it may be there as ``path.old``.
    """
    found = _whole_ones(values.path("folder", folder))
    return found[-1] if found else None


def next_order(path: Path) -> int:
    """``saved`` of a checkpoint about to be committed: the clock, or one more than any beside it."""
    beside = [manifest.read(find(other))["saved"] for other in _whole_ones(path.parent)]
    return max([time.time_ns(), *(saved + 1 for saved in beside)])


def remove_older(folder: Path, count: int, in_use: Path | None) -> None:
    """Keep the ``count`` newest; remove the others and what dead saves left.

    ``in_use`` is the partial directory of a save under way: neither it nor what it is about to replace is touched. The
    same for those that have been written to lately: they may be another job's.
    """

    def is_free(partial: Path) -> bool:
        return partial != in_use and (not partial.exists() or _is_ours(partial) and _is_dead(partial))

    own = [path for path in _whole_ones(folder) if not path.is_symlink()]
    for path in own[:-count]:
        if is_free(partial_of(path)):
            remove(find(path), partial_of(path))
    for leftover in folder.glob("*.partial"):
        if is_free(leftover):
            shutil.rmtree(leftover)
    for leftover in folder.glob("*.old"):
        path = leftover.with_name(leftover.name.removesuffix(".old"))
        if path.exists() and is_free(partial_of(path)) and _is_ours(leftover):
            remove(leftover, partial_of(path))


def sync(path: Path) -> None:
    """Make the names in a directory, or what a file holds, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whole_ones(folder: Path) -> list[Path]:
    """Names to load from, oldest first; of symlinks only those to elsewhere, for others are second names."""
    names = set()
    for entry in folder.iterdir() if folder.is_dir() else ():
        # Not Path.is_file, which raises for a directory that we may not look into.
        is_one = not entry.name.endswith(".partial") and os.path.isfile(entry / manifest.NAME)
        if is_one and not (entry.is_symlink() and entry.resolve().parent == folder.resolve()):
            names.add(entry.with_name(entry.name.removesuffix(".old")))
    saved = {}
    for path in names:
        try:
            entries = manifest.read(find(path))
            manifest.check_sizes(find(path), entries["files"])
        except (CheckpointError, OSError):
            continue  # not whole, or not readable for us: not one to load
        saved[path] = entries["saved"]
    return sorted(saved, key=lambda path: (saved[path], path.name))


def _is_ours(directory: Path) -> bool:
    if not directory.is_dir() or directory.is_symlink():
        return False
    try:
        return all(_OURS.fullmatch(entry.name) for entry in directory.iterdir())
    except PermissionError:
        return False


def _is_dead(partial: Path) -> bool:
    try:
        written = max(entry.stat().st_mtime for entry in (partial, *partial.iterdir()))
    except FileNotFoundError:  # a file of it has just got another name, or it has itself
        return False
    return time.time() - written > _DEAD_AFTER


def _refuse_name(path: Path) -> None:
    if path.name.endswith((".partial", ".old")):
        raise CheckpointError(
            f"{path.name} is no name for a checkpoint: .partial and .old are what unfinished and replaced ones end in, "
            "and they are removed. Give another name."
        )
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a symlink (to {os.readlink(path)}), which the new checkpoint would replace. Save under a name "
            "of its own and point the link there."
        )


def _refuse_foreign(directory: Path) -> None:
    if not _is_ours(directory):
        raise CheckpointError(f"{directory} holds other files than a checkpoint's: it would be removed. Move it away.")
