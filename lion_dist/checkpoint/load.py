"""``load``: from any engine, ranks, buckets and precision into those that are here."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lion_dist import values
from lion_dist.checkpoint import directory, manifest, metadata
from lion_dist.checkpoint.conversion import LoadPlan, begin_averages, convert, plan_load, resync_main_params
from lion_dist.checkpoint.errors import CheckpointError
from lion_dist.checkpoint.fit import check_fit
from lion_dist.checkpoint.parts import join_parts
from lion_dist.checkpoint.ranks import Ranks, describe
from lion_dist.checkpoint.save import wait_for_pending
from lion_dist.checkpoint.sharded_state import ShardedState, collect
from lion_dist.checkpoint.storage import Reader
from lion_dist.lion import Lion
from lion_dist.sharded_lion import ShardedLion


def load(path: str | Path, *, model: nn.Module, optimizer: Lion | ShardedLion) -> dict:
    """Load a checkpoint of :func:`save` into ``model`` and ``optimizer``, in place. All ranks call it together.

    Ranks, buckets, ZeRO stage and engine may differ from those that saved. The momentum keeps the configured dtype
    and main params the configured kind: what must be rounded for that is rounded once, with a warning.

    Returns:
        ``extra`` as it was saved.

    Raises:
        CheckpointError: on every rank. No checkpoint there, a damaged one, or one of another model, with what differs.
            Nothing has been changed, unless the message says that reading failed half-way.
    """
    path = values.path("path", path)
    wait_for_pending()
    ranks = Ranks.here()
    found = ranks.on_first(lambda: directory.find(path))
    state = ranks.agree(lambda: collect(model, optimizer))
    join_parts(state, ranks, with_contents=False)
    loading = ranks.agree(lambda: _prepare(found, state, ranks))
    for fact, names in loading.plan.notes.items():
        warnings.warn(f"{found.name}: {fact} ({len(names)}: {', '.join(names[:3])}, ...)", stacklevel=2)
    ranks.agree(loading.read)
    loading.state.finish_load()
    _take_settings(optimizer, loading.entries["param_groups"])
    return loading.entries["extra"]


def verify(path: str | Path, progress: manifest.Progress | None = None) -> None:
    """Read every file of a checkpoint and compare checksums; in one process, without a model.

    Args:
        progress: told of bytes as they are done.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    found = directory.find(values.path("path", path))
    checked_reader(found, manifest.read(found)["files"], Ranks(None), progress)


def newest(folder: str | Path, *, verified: bool = False) -> Path | None:
    """The newest whole checkpoint directly under ``folder``, by the order of their saves; None when there is none.

    Whole: it has a manifest, and every file in it at its full length. Partial ones are never taken. The path is for
    ``load``; after a save was killed it may be there as ``path.old``.

    Args:
        verified: also compare the checksums of all files, and go back to an older one where they differ; the first rank
            warns of each that was left out. All ranks call it together (each reads a share), and get the same.
    """
    folder = values.path("folder", folder)
    if not values.flag("verified", verified):
        return next(reversed(directory.whole_ones(folder)[0]), None)
    wait_for_pending()
    ranks = Ranks.here()
    whole, left_out = ranks.on_first(lambda: directory.whole_ones(folder))
    found = None
    for path in reversed(whole):
        failures = [failure for failure in ranks.gather(_damage(path, ranks)) if failure is not None]
        if not failures:
            found = path
            break
        left_out[path] = failures[0]
    for path, reason in left_out.items() if ranks.is_first else ():
        warnings.warn(f"{path} is left out: {reason}", stacklevel=2)
    return found


def _damage(path: Path, ranks: Ranks) -> str | None:
    try:
        found = directory.find(path)
        checked_reader(found, manifest.read(found)["files"], ranks)
    except (CheckpointError, OSError) as error:
        return describe(error)
    return None


@dataclass
class _Loading:
    """A checkpoint that was found whole and fit for this model; nothing has been changed yet."""

    found: Path
    entries: dict
    reader: Reader
    state: ShardedState
    plan: LoadPlan

    @torch.no_grad()
    def read(self) -> None:
        try:
            self.reader.read_into(self.plan.read)
            convert(self.plan.convert, self.reader.metadata.state_dict_metadata, self.reader.read_into)
        except Exception as error:
            raise CheckpointError(
                f"reading {self.found} failed half-way, so model and optimizer hold parts of it: load another "
                f"checkpoint or stop. {describe(error)}"
            ) from error
        resync_main_params(self.plan.resync_main)
        begin_averages(self.plan.begin_average)
        for tensor in self.plan.zero_fill:
            tensor.zero_()


def _prepare(found: Path, state: ShardedState, ranks: Ranks) -> _Loading:
    entries = manifest.read(found)
    reader = checked_reader(found, entries["files"], ranks)
    stored = reader.metadata.state_dict_metadata
    check_fit(found, stored, entries["param_groups"], state)
    return _Loading(found, entries, reader, state, plan_load(stored, state))


def checked_reader(
    found: Path, files: dict[str, dict], ranks: Ranks, progress: manifest.Progress | None = None
) -> Reader:
    """Every rank looks at all names and sizes; the contents of the files are shared out among the ranks."""
    manifest.check_sizes(found, files)
    if metadata.NAME not in files:
        raise CheckpointError(f"{found / manifest.NAME} is damaged: it does not list {metadata.NAME}")
    share = manifest.share_of(files, ranks.rank, ranks.size)
    for name in {*share, metadata.NAME}:
        manifest.check_contents(found, name, files[name], progress)
    reader = Reader(found, files)
    reader.check_pieces(share)
    return reader


def _settings_of(saved: dict) -> dict:
    return {k: tuple(v) if k == "betas" and isinstance(v, list) else v for k, v in saved.items() if k != "params"}


def _take_settings(optimizer: Lion | ShardedLion, groups: list[dict]) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in _settings_of(saved).items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
