"""One table printer, one progress bar, one style of plots."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import lion_dist
from lion_dist.reporting import ProgressBar, aligned, duration, figure_into

PACKAGE = Path(lion_dist.__file__).parent


def test_first_columns_begin_at_the_left_and_numbers_end_at_the_right():
    rows = [["", "MiB", "share"], ["exp_avg", 12.5, None], ["main", 3, "4%"]]
    assert aligned(rows) == "          MiB  share\nexp_avg  12.5\nmain        3     4%"
    assert aligned([["a", "b", 1]], [3, 3, 3], text_columns=2) == "a    b      1"


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (8.4, 99, 720, 11_100)] == ["8 s", "99 s", "12 min", "3 h 05 min"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_for_terminals(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    with ProgressBar("checked", 4 << 20, "MiB", 1 << 20) as bar:
        bar(1 << 20)
        bar(3 << 20, "of sum.pt")
    printed = capsys.readouterr().err
    assert bool(printed) == is_terminal
    if is_terminal:
        assert "checked" in printed and "1 of 4 MiB" in printed and "4 of 4 MiB  of sum.pt" in printed


def test_a_picture_is_written_into_a_folder_that_was_not_there(tmp_path):
    pytest.importorskip("matplotlib")
    with figure_into(tmp_path / "new" / "a.png", 1, 2, size=(2, 1)) as (_, axes):
        axes[0][1].plot([1, 2], [3, 4])
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_nobody_draws_in_another_style():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "launch").rglob("*.py")]
    drawing = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            drawing |= {path.name for name in names if name.split(".")[0] in ("matplotlib", "tqdm")}
    assert drawing == {"reporting.py"}
