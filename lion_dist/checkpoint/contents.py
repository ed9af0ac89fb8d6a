"""What a checkpoint holds, from its manifest and metadata alone: no tensor is read, no process group needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lion_dist import values
from lion_dist.checkpoint import directory, manifest
from lion_dist.checkpoint.metadata import read_metadata


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint; ``pieces`` is in how many parts it was written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    pieces: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """``model``, ``exp_avg``, ``main_param``, ``weight_avg``, ``step``, ``counters`` or ``spike_guard``."""
        return self.name.rpartition(".")[2] if self.name.startswith("optimizer.") else self.name.partition(".")[0]


@dataclass(frozen=True)
class Contents:
    """See ``manifest.py`` for the entries."""

    format: int
    saved: datetime
    files: dict[str, dict]
    param_groups: list[dict]
    tied: dict[str, str]
    extra: dict
    tensors: list[StoredTensor]


def read_contents(path: str | Path) -> Contents:
    """Raises CheckpointError when there is no whole checkpoint at ``path``; contents of files are not checked."""
    found = directory.find(values.path("path", path))
    entries = manifest.read(found)
    manifest.check_sizes(found, entries["files"])
    tensors = [
        StoredTensor(
            name,
            tuple(stored.size),
            str(stored.properties.dtype).removeprefix("torch."),
            math.prod(stored.size) * stored.properties.dtype.itemsize,
            len(stored.chunks),
        )
        for name, stored in sorted(read_metadata(found, entries["files"]).state_dict_metadata.items())
    ]
    saved = datetime.fromtimestamp(entries["saved"] / 1e9, UTC)
    kept = {key: entries[key] for key in ("format", "files", "param_groups", "tied", "extra")}
    return Contents(**kept, saved=saved, tensors=tensors)
