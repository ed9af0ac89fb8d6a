"""What a row of every benchmark carries besides its numbers, and how rows are written."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import platform
from pathlib import Path

import torch


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, str]:
    """Columns that every row of a run shares."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": version_of("triton") or "",
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


class Rows:
    """The rows of a run, each with the columns of :func:`environment`.

    The CSV file, if any, is whole after every row: a run that is cut off keeps what it has measured. Its columns are in
    the order of the first row.
    """

    def __init__(self, path: Path | None, device: torch.device):
        self.path, self.device = path, device
        self.rows: list[dict] = []

    def add(self, row: dict) -> dict:
        self.rows.append(row | environment(self.device))
        if self.path is not None:
            self._write()
        return row

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
