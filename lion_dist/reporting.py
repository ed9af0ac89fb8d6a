"""What the programs show: one table printer, one progress bar, one style of plots."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["ProgressBar", "aligned", "duration", "figure_into"]


def aligned(rows: Sequence[Sequence[object]], widths: Sequence[int] = (), text_columns: int = 1) -> str:
    """``rows`` as lines of columns; None is a blank.

    Args:
        widths: the least of each column, for rows that are printed as they come.
        text_columns: the first columns, which begin at the left; the others, numbers, end at the right.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    least = [*widths, *[0] * (max(map(len, cells)) - len(widths))]
    found = [max([least[i], *(len(row[i]) for row in cells if i < len(row))]) for i in range(len(least))]
    lines = []
    for row in cells:
        texts = [cell.ljust(width) for cell, width in zip(row[:text_columns], found, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(row[text_columns:], found[text_columns:], strict=False)]
        lines.append("  ".join([*texts, *numbers]).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """ "8 s", "12 min", "3 h 05 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressBar:
    """A line on stderr that counts up to ``total``; silent where stderr is no terminal.

    Args:
        unit: of what is shown, such as "MiB"; ``size``: of one such unit.
    """

    WIDTH = 30

    def __init__(self, what: str, total: int, unit: str, size: int = 1):
        self.what, self.total, self.unit, self.size, self.done = what, total, unit, size, 0
        self.is_shown = sys.stderr.isatty()

    def __enter__(self) -> ProgressBar:
        return self

    def __call__(self, count: int, note: str = "") -> None:
        """``count`` more are done; ``note`` stands behind the bar."""
        self.done += count
        if not self.is_shown:
            return
        filled = self.WIDTH * min(self.done, self.total) // max(1, self.total)
        bar = "#" * filled + "." * (self.WIDTH - filled)
        done, total = self.done / self.size, self.total / self.size
        print(f"\r\033[K{self.what} [{bar}] {done:.0f} of {total:.0f} {self.unit}  {note}", end="", file=sys.stderr)
        sys.stderr.flush()

    def __exit__(self, *_) -> None:
        if self.is_shown:
            print(file=sys.stderr)


@contextlib.contextmanager
def figure_into(path: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options) -> Iterator:
    """(figure, axes [rows, columns]) of matplotlib, which become the picture ``path``; ``size`` in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1, "legend.fontsize": 8, "axes.axisbelow": True}
    with plt.rc_context(style):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
        try:
            yield figure, axes
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
        finally:
            plt.close(figure)
