"""Which checkpoint a run goes on from, and what becomes of those that it does not."""

import warnings
from argparse import Namespace
from datetime import timedelta

import pytest

from comparison.ranks import start_process_group, stop_process_group
from comparison.resuming import TRAJECTORY, Checkpoints


class Engine:
    """Its checkpoints are folders; loading one gives back its step."""

    def newest(self, folder):
        return max(folder.glob("step-*"), default=None)

    newest_verified = newest

    def load(self, path):
        settings = dict.fromkeys(TRAJECTORY, 1) | {"text": "a", "ranks": 4}
        return {"step": int(path.name.removeprefix("step-")), "scheduler": {}, "settings": settings}


@pytest.fixture
def checkpoints(tmp_path):
    """Of a run on one rank, in a folder with those of steps 3 and 6."""
    for step in (3, 6):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-000009.partial").mkdir()
    (tmp_path / "notes.txt").touch()
    args = Namespace(out=tmp_path, keep_last=0, **dict.fromkeys(TRAJECTORY, 1))
    scheduler = Namespace(load_state_dict=lambda state: None)
    start_process_group(timedelta(seconds=10))
    yield Checkpoints(args, Engine(), scheduler, "a")
    stop_process_group()


@pytest.mark.parametrize("how", ["last", "auto"])
def test_resumed_run_goes_on_from_the_newest_and_says_what_has_changed(checkpoints, how, capsys):
    (checkpoints.folder / "step-000009.partial").rmdir()
    assert checkpoints.resume(how) == 6
    printed = capsys.readouterr().out
    assert "so its losses will not repeat: ranks 4 -> 1\n" in printed
    assert f"resumed from {checkpoints.folder}/step-000006, 6 steps done" in printed


def test_run_that_begins_where_an_earlier_one_was_sets_its_checkpoints_aside(checkpoints, capsys):
    folder = checkpoints.folder
    assert checkpoints.resume(None) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["earlier-1", "notes.txt"]
    aside = sorted(path.name for path in (folder / "earlier-1").iterdir())
    assert aside == ["step-000003", "step-000006", "step-000009.partial"]
    assert f"checkpoints and metrics of an earlier run are in {folder}/earlier-1 now" in capsys.readouterr().out
    (folder / "step-000001").mkdir()
    assert checkpoints.resume(None) == 0
    assert [path.name for path in (folder / "earlier-2").iterdir()] == ["step-000001"]


def test_metrics_and_summary_of_an_earlier_run_are_set_aside_with_its_checkpoints(checkpoints):
    for name in ("metrics.jsonl", "metrics.csv", "summary.json", "loss-curve.png"):
        (checkpoints.folder / name).write_text("of the first run")
    (checkpoints.folder / "tensorboard").mkdir()
    checkpoints.resume(None)
    assert [path.name for path in checkpoints.folder.iterdir() if path.name != "earlier-1"] == ["notes.txt"]
    assert (checkpoints.folder / "earlier-1" / "metrics.jsonl").read_text() == "of the first run"


def test_setting_aside_goes_on_where_an_older_folder_was_deleted(checkpoints):
    (checkpoints.folder / "earlier-2").mkdir()
    for step, number in ((1, 1), (2, 3)):
        (checkpoints.folder / f"step-{step:06d}").mkdir()
        assert checkpoints.resume(None) == 0
        assert (checkpoints.folder / f"earlier-{number}" / f"step-{step:06d}").exists()


def test_resume_auto_begins_where_there_is_nothing(checkpoints):
    checkpoints.folder = checkpoints.folder / "new"
    assert checkpoints.resume("auto") == 0
    assert list(checkpoints.folder.iterdir()) == []


@pytest.mark.parametrize("how, step", [("auto", 3), ("last", 6)])
def test_only_auto_leaves_a_damaged_checkpoint_out_and_says_so(checkpoints, monkeypatch, capsys, how, step):
    def newest_verified(folder):
        warnings.warn(f"{folder}/step-000006 is left out: a byte differs", stacklevel=1)
        return folder / "step-000003"

    (checkpoints.folder / "step-000009.partial").rmdir()
    monkeypatch.setattr(checkpoints.engine, "newest_verified", newest_verified)
    assert checkpoints.resume(how) == step
    assert ("step-000006 is left out: a byte differs" in capsys.readouterr().out) == (how == "auto")


def test_a_run_that_finds_only_damaged_checkpoints_begins_and_sets_them_aside(checkpoints, monkeypatch):
    monkeypatch.setattr(checkpoints.engine, "newest_verified", lambda folder: None)
    assert checkpoints.resume("auto") == 0
    assert (checkpoints.folder / "earlier-1" / "step-000006").is_dir()
