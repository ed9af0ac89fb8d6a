"""``save`` and ``save_async``: each rank writes its own slices, in their dtype, a piece at a time."""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from lion_dist import values
from lion_dist.boxed_tensor import BoxedTensor
from lion_dist.checkpoint import directory, manifest
from lion_dist.checkpoint.directory import Partial
from lion_dist.checkpoint.errors import CheckpointError
from lion_dist.checkpoint.parts import join_parts
from lion_dist.checkpoint.ranks import FAILURES, Ranks, describe
from lion_dist.checkpoint.sharded_state import ShardedState, collect
from lion_dist.checkpoint.storage import Writer
from lion_dist.lion import Lion
from lion_dist.sharded_lion import ShardedLion

# Without torch.distributed, its checkpoint module warns that it assumes one process: so do we. A filter for good,
# because catch_warnings() in the thread of a save_async would undo filters that the main thread sets meanwhile.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized", category=UserWarning
)


def save(path: str | Path, *, model: nn.Module, optimizer: Lion | ShardedLion, extra: dict | None = None) -> None:
    """Write a checkpoint to the directory ``path``, replacing an older one. All ranks call it together.

    It is written to ``path.partial``, made durable and renamed: whenever the process dies, the older checkpoint or the
    new one can be loaded from ``path``. Beside the state itself it holds no more than one piece (8 MiB) at a time.

    Args:
        model: bare, or wrapped by DDP, FSDP1 or FSDP2.
        optimizer: over the parameters of ``model``.
        extra: what else the program needs to go on (step, seed, ...): JSON values, the first rank's are kept.

    Raises:
        CheckpointError: on every rank, when one could not write (a full disk); what was written is removed, older
            checkpoints are as they were, and training can go on. When ranks hold different parameters under one name
            (of those that every rank holds whole, a sample of the elements is compared). Also the error of an earlier
            :func:`save_async` that nobody waited for.
    """
    path = directory.absolute(values.path("path", path))
    finish_pending()
    ranks = Ranks.here()
    state = _agreed_state(model, optimizer, ranks)
    write(path, ranks.agree(lambda: Snapshot.of(state, extra)), ranks)


def save_async(
    path: str | Path, *, model: nn.Module, optimizer: Lion | ShardedLion, extra: dict | None = None
) -> PendingSave:
    """:func:`save` that returns once this rank's state has been copied; the copy is written in the background.

    The cost: one copy of what this rank owns, in host memory, until the save is done; training stands still while it
    is made. One save at a time: the next one waits for it first.

    Returns:
        what to ``wait()`` for, at the latest before the program ends.
    """
    path = directory.absolute(values.path("path", path))  # the thread may see another working directory
    finish_pending()
    ranks = Ranks.here()
    state = _agreed_state(model, optimizer, ranks)
    snapshot = ranks.agree(lambda: Snapshot.of(state, extra).copy())
    return PendingSave(path, snapshot, ranks)


class PendingSave:
    """A save in the background. Its error comes out, once, at ``wait()`` or at the next save."""

    def __init__(self, path: Path, snapshot: Snapshot, ranks: Ranks):
        global _pending
        self.path = path
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(snapshot, ranks), name=f"save {path}")
        _pending = self
        self._thread.start()

    def _run(self, snapshot: Snapshot, ranks: Ranks) -> None:
        try:
            write(self.path, snapshot, ranks)
        except FAILURES as error:
            self._error = error
            logging.getLogger(__name__).error("the checkpoint %s was not saved: %s", self.path, error)

    def done(self) -> bool:
        """Whether ``wait()`` would return at once."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the checkpoint is durable; CheckpointError when it could not be written."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


_pending: PendingSave | None = None


def finish_pending() -> None:
    """Wait for the save in the background; its error comes out here."""
    if _pending is not None:
        _pending.wait()


def wait_for_pending() -> None:
    """Wait for the save in the background; its error stays for the next save."""
    if _pending is not None:
        _pending._thread.join()


def keep_last(folder: str | Path, count: int) -> None:
    """Keep the ``count`` newest whole checkpoints directly under ``folder``; remove the others and leftovers.

    The first rank does it; others return at once. A save under way is left alone, another job's too: what dead saves
    left goes an hour after they last wrote. What cannot be removed is warned of and tried again by the next call; so
    is a checkpoint into whose directory somebody put a file, which stays.
    """
    folder = values.path("folder", folder)
    remedy = "Pass how many checkpoints are to stay."
    count = values.whole_number("count", count, "at least 1", least=1, remedy=remedy)
    under_way = None if _pending is None or _pending.done() else directory.partial_of(_pending.path.resolve())
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        try:
            directory.remove_older(folder.resolve(), count, under_way)
        except OSError as error:  # a run that has its checkpoints does not end because there are too many
            warnings.warn(f"keep_last() could not look through {folder}: {error}", stacklevel=2)


# ---- one save


def _agreed_state(model: nn.Module, optimizer: Lion | ShardedLion, ranks: Ranks) -> ShardedState:
    """This rank's state, after all ranks have found that what they hold under one name is one tensor."""

    state = ranks.agree(lambda: collect(model, optimizer))
    join_parts(state, ranks, with_contents=True)
    return state


@dataclass
class Snapshot:
    """What goes into a checkpoint: this rank's tensors by name, and what is not a tensor."""

    tensors: dict[str, BoxedTensor]
    entries: dict

    @classmethod
    def of(cls, state: ShardedState, extra: dict | None) -> Snapshot:
        if extra is not None:
            values.instance("extra", extra, Mapping, 'Pass a dict such as {"step": 100}.')
            values.refuse_in_json("extra", extra)
        entries = {"param_groups": state.param_groups, "extra": extra or {}, "tied": state.tied}
        return cls(state.only_to_save().tensors(), json.loads(json.dumps(entries)))

    def copy(self) -> Snapshot:
        """Copy to host memory."""
        tensors = {}
        for name, boxed in self.tensors.items():
            boxes = {box: local.to("cpu", copy=True) for box, local in boxed.boxes.items()}
            tensors[name] = BoxedTensor(boxed.shape, boxes, dtype=boxed.dtype, device=torch.device("cpu"))
        return Snapshot(tensors, self.entries)


def write(path: Path, snapshot: Snapshot, ranks: Ranks, progress: manifest.Progress | None = None) -> None:
    """One save: begin, tensors, manifest, commit."""
    partial = ranks.on_first(lambda: directory.begin(path))
    try:
        writer = Writer(partial, progress)
        _write_tensors(snapshot.tensors, writer, ranks)
        written = {name: entry for files in ranks.gather(writer.written) for name, entry in files.items()}
        ranks.on_first(lambda: _commit(path, partial, snapshot.entries, written))
    except CheckpointError:
        if ranks.is_first:
            partial.abandon()
        raise


def _write_tensors(tensors: dict[str, BoxedTensor], writer: Writer, ranks: Ranks) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with ranks.exchanging():
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=ranks.group)
    except FAILURES as error:  # of any rank: torch's collectives bring it to all
        raise CheckpointError(describe(error)) from error


def _commit(path: Path, partial: Partial, entries: dict, written: dict[str, dict]) -> None:
    saved = {"saved": directory.next_order(path)}
    partial.check()
    manifest.check_sizes(partial.path, written)  # on a file system that ranks do not share, theirs are missing here
    manifest.write(partial.path, saved | entries | {"files": written})
    directory.commit(path, partial)
