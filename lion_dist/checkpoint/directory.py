"""Directories of checkpoints, such that at no moment a power cut or SIGKILL loses one.

A save of ``path`` goes through these states; each arrow is one system call::

    path (old)                                       what load(path) takes: the old one
    path (old)  path.partial (files, no manifest)                           the old one
    path (old)  path.partial (whole, durable)                               the old one
    path.old    path.partial (whole)                                        the old one, from path.old
    path (new)  path.old                                                    the new one
    path (new)  path.1f2e3d4c.removed (the old one, going away)             the new one
    path (new)                                                              the new one

So a name ending in ``.partial`` or ``.removed`` is never a checkpoint, and ``path.old`` is one only while there is no
``path``. A symlink is another name of a checkpoint: it can be loaded, but is never replaced, removed, or counted by
``keep_last``.

From the last but two on the save has succeeded, whatever becomes of the old one::

    path (new)  path.1f2e3d4c.removed (what a file system does not let go)  warned of; ``keep_last`` tries again
    path (new)  path.replaced-1 (the old one, in which the user keeps files of his own)            warned of; stays

Two jobs that save the same path at once share ``path.partial``: the one that began last owns it, by a token in it, and
the other one fails. It is no lock (shared file systems have none that survives a kill), but no mixture gets the name.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import secrets
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from lion_dist.checkpoint import manifest
from lion_dist.checkpoint.errors import CheckpointError

_OURS = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|lion_dist\.(json|owner)")
# What file systems and desktops leave behind in any directory: nobody's files.
_LITTER = re.compile(r"\.nfs\w+|\.fuse_hidden\w+|\.DS_Store|\._.*|Thumbs\.db|desktop\.ini")
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


def doomed_of(path: Path) -> Path:
    """A fresh name for what is to be removed: an earlier one may still be there, held by a reader."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.removed")


def find(path: Path) -> Path:
    """The directory to load ``path`` from: itself, or ``path.old`` when a save was killed between two renames."""
    try:
        return _found(path if path.name not in ("", "..") else absolute(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked into: {error}") from error


def absolute(path: str | Path) -> Path:
    """``path`` wherever the program goes later, with its name: that of a symlink stays."""
    path = Path(path).absolute()
    return path.resolve() if path.name == ".." else path


def _found(path: Path) -> Path:
    if not path.name:
        raise CheckpointError(f"no checkpoint at {path}: it has no {manifest.NAME}. Give the directory of a save().")
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
    for doomed in path.parent.glob(f"{glob.escape(path.name)}.*.removed"):
        if _is_ours(doomed):
            clear(doomed)
    if path.exists() and not (path / manifest.NAME).is_file():
        if not path.is_dir() or not all(_LITTER.fullmatch(entry.name) for entry in path.iterdir()):
            raise CheckpointError(f"{path} exists and is no checkpoint: it would be replaced. Give another name.")
        remove(path, path)
    partial, old = partial_of(path), old_of(path)
    if not path.exists() and (old / manifest.NAME).is_file():
        old.rename(path)
    for leftover in (partial, old):
        if leftover.exists() and not (leftover == old and (old / manifest.NAME).is_file()):
            _refuse_foreign(leftover)
    if old.exists():
        _put_away(old, path)
    if partial.exists():
        remove(partial, path)
    missing = [p for p in path.parents if not p.exists()]
    partial.mkdir(parents=True)
    begun = Partial(partial, secrets.token_hex(8))
    (partial / _OWNER).write_text(begun.token)
    for parent in (path.parent, *(p.parent for p in missing)):
        sync(parent)
    return begun


def commit(path: Path, begun: Partial) -> None:
    """Give the whole ``path.partial`` its name, durably; then remove the one that had it, as far as that goes."""
    partial, old = begun.path, old_of(path)
    begun.check()
    sync(partial)
    (partial / _OWNER).unlink()
    if path.exists():
        path.rename(old)
    partial.rename(path)
    sync(path.parent)
    if old.exists():
        try:
            _put_away(old, path)
        except OSError as error:
            _warn(f"{path} is saved, but {old}, which it replaces, cannot be moved out of the way: {error}")


def remove(directory: Path, path: Path) -> None:
    """Remove what is or was at ``path``; from the first moment on it is no checkpoint any more.

    Raises:
        OSError: it cannot even be renamed, and is as it was.
    """
    doomed = doomed_of(path)
    directory.rename(doomed)
    sync(doomed.parent)
    clear(doomed)


def clear(doomed: Path) -> None:
    """Delete what has been named ``.removed``; what the file system does not let go is warned of."""
    failures = []
    try:
        for entry in list(doomed.iterdir()):
            try:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            except OSError as error:
                failures.append(error)
        doomed.rmdir()
    except FileNotFoundError:  # another job has done it
        return
    except OSError as error:
        failures.append(error)
    if failures:
        _warn(
            f"{doomed}, of a checkpoint that was removed, is not gone: {failures[0]}. keep_last() will try again; if "
            "the file is open somewhere (NFS), that program must end first."
        )


def _put_away(old: Path, path: Path) -> None:
    """Remove what ``path`` has replaced; one with files of the user's is kept under a name of its own."""
    foreign = _foreign(old)
    if not foreign:
        remove(old, path)
        return
    kept = next(name for n in itertools.count(1) if not os.path.lexists(name := f"{path}.replaced-{n}"))
    old.rename(kept)
    sync(path.parent)
    _warn(f"the checkpoint that {path} replaces holds a file of yours, {foreign[0]}: it is kept as {kept}")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def next_order(path: Path) -> int:
    """``saved`` of a checkpoint about to be committed: the clock, or one more than any beside it."""
    return max([time.time_ns(), *(saved + 1 for saved in whole_ones(path.parent)[0].values())])


def remove_older(folder: Path, count: int, in_use: Path | None) -> None:
    """Keep the ``count`` newest; remove the others and what dead saves left.

    ``in_use`` is the partial directory of a save under way: neither it nor what it is about to replace is touched. The
    same for those that have been written to lately: they may be another job's.
    """

    def is_free(partial: Path) -> bool:
        return partial != in_use and (not partial.exists() or _is_ours(partial) and _is_dead(partial))

    for doomed in folder.glob("*.removed"):
        if _is_ours(doomed):
            clear(doomed)
    own = [path for path in whole_ones(folder)[0] if not path.is_symlink()]
    for path in own[:-count]:
        found = find(path)
        foreign = _foreign(found)
        if foreign:
            _warn(f"{found} would be removed, but stays: it holds a file of yours, {foreign[0]}. Move that away.")
        elif is_free(partial_of(path)):
            _remove_or_warn(found, path)
    for leftover in folder.glob("*.partial"):
        if is_free(leftover):
            _remove_or_warn(leftover, leftover.with_name(leftover.name.removesuffix(".partial")))
    for leftover in folder.glob("*.old"):
        path = leftover.with_name(leftover.name.removesuffix(".old"))
        if path.exists() and is_free(partial_of(path)) and _is_ours(leftover):
            _remove_or_warn(leftover, path)


def _remove_or_warn(directory: Path, path: Path) -> None:
    try:
        remove(directory, path)
    except OSError as error:
        _warn(f"{directory} cannot be removed and stays: {error}. keep_last() will try again.")


def sync(path: Path) -> None:
    """Make the names in a directory, or what a file holds, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_ones(folder: Path) -> tuple[dict[Path, int], dict[Path, str]]:
    """Checkpoints directly under ``folder``: names to load from, in the order of their saves, with ``saved``; and those
    that have a manifest but are not whole, or not readable for us, with what is wrong.

    Whole: every file has its full length. Of symlinks only those to elsewhere count, for others are second names.
    """
    names = set()
    for entry in folder.iterdir() if folder.is_dir() else ():
        # Not Path.is_file, which raises for a directory that we may not look into.
        is_one = not entry.name.endswith((".partial", ".removed")) and os.path.isfile(entry / manifest.NAME)
        if is_one and not (entry.is_symlink() and entry.resolve().parent == folder.resolve()):
            names.add(entry.with_name(entry.name.removesuffix(".old")))
    saved, unfit = {}, {}
    for path in sorted(names):
        try:
            entries = manifest.read(find(path))
            manifest.check_sizes(find(path), entries["files"])
            saved[path] = entries["saved"]
        except (CheckpointError, OSError) as error:
            unfit[path] = str(error)
    return {path: saved[path] for path in sorted(saved, key=lambda path: (saved[path], path.name))}, unfit


def _foreign(directory: Path) -> list[str]:
    """Names of what somebody put into a checkpoint's directory."""
    names = sorted(entry.name for entry in directory.iterdir())
    return [name for name in names if not _OURS.fullmatch(name) and not _LITTER.fullmatch(name)]


def _is_ours(directory: Path) -> bool:
    if not directory.is_dir() or directory.is_symlink():
        return False
    try:
        return not _foreign(directory)
    except PermissionError:
        return False


def _is_dead(partial: Path) -> bool:
    try:
        written = max(entry.stat().st_mtime for entry in (partial, *partial.iterdir()))
    except FileNotFoundError:  # a file of it has just got another name, or it has itself
        return False
    return time.time() - written > _DEAD_AFTER


def _refuse_name(path: Path) -> None:
    if not path.name or "\0" in path.name:
        raise CheckpointError(f"{str(path)!r} is no name for a checkpoint. Give that of a directory to be made.")
    if path.name.endswith((".partial", ".old", ".removed")):
        raise CheckpointError(
            f"{path.name} is no name for a checkpoint: .partial, .old and .removed are what unfinished and replaced "
            "ones end in, and they are removed. Give another name."
        )
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a symlink (to {os.readlink(path)}), which the new checkpoint would replace. Save under a name "
            "of its own and point the link there."
        )


def _refuse_foreign(directory: Path) -> None:
    if not _is_ours(directory):
        raise CheckpointError(f"{directory} holds other files than a checkpoint's: it would be removed. Move it away.")
