"""What cannot or must not be removed ends no run, blocks no name, and is not lost."""

import errno
import os
import shutil
import warnings
from pathlib import Path

import pytest

from lion_dist import checkpoint
from tests.checkpoint.engines import engine
from tests.checkpoint.killed import loaded_step, save

LITTER = [".nfs0000000002c0a81d00000004", ".DS_Store", "._lion_dist.json", "Thumbs.db"]


def names(folder):
    return sorted(os.listdir(folder))


@pytest.fixture
def held(monkeypatch):
    """Files that a reader holds open over NFS: removing one leaves another, ``.nfs...``, which cannot be removed.

    Returns the names of files that are held; taken out, they are free.
    """
    held = {"__0_0.distcp"}
    unlink = os.unlink

    def unlink_over_nfs(path, *args, **kwargs):
        if held and ".nfs" in os.fspath(path):
            raise OSError(errno.EBUSY, "Device or resource busy", os.fspath(path))
        if Path(path).name in held:
            shutil.copyfile(path, Path(path).with_name(".nfs00000001"))
        return unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink_over_nfs)
    return held


def test_keep_last_warns_of_a_checkpoint_that_it_cannot_clear_and_clears_it_the_next_time(tmp_path, held):
    for step in range(3):
        save(tmp_path / f"step-{step}", step)
    with pytest.warns(UserWarning, match=r"step-0\..*\.removed, .* is not gone: .*not empty.* will try again"):
        checkpoint.keep_last(tmp_path, 1)
    left = names(tmp_path)
    assert [name.split(".")[0] for name in left] == ["step-0", "step-1", "step-2"]
    assert [names(tmp_path / name) for name in left[:2]] == [[".nfs00000001"]] * 2
    assert checkpoint.newest(tmp_path) == tmp_path / "step-2"
    held.clear()
    checkpoint.keep_last(tmp_path, 1)
    assert names(tmp_path) == ["step-2"]


def test_a_save_whose_old_one_cannot_be_cleared_has_succeeded_and_the_name_is_free_for_the_next(tmp_path, held):
    save(tmp_path / "c", 1)
    for step in (2, 3):
        with pytest.warns(UserWarning, match="is not gone"):
            save(tmp_path / "c", step)
        assert loaded_step(tmp_path / "c") == step
    held.clear()
    save(tmp_path / "c", 4)
    assert names(tmp_path) == ["c"]


def test_a_checkpoint_that_cannot_even_be_renamed_stays_with_a_warning(tmp_path, monkeypatch):
    for step in range(2):
        save(tmp_path / f"step-{step}", step)
    rename = os.rename

    def refuse(source, target, **options):
        if Path(source).name == "step-0":
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(source))
        return rename(source, target, **options)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(UserWarning, match="step-0 cannot be removed and stays: .*Permission denied"):
        checkpoint.keep_last(tmp_path, 1)
    assert loaded_step(tmp_path / "step-0") == 0
    monkeypatch.undo()
    checkpoint.keep_last(tmp_path, 1)
    assert names(tmp_path) == ["step-1"]


def test_a_replaced_checkpoint_that_cannot_be_renamed_again_does_not_fail_the_save(tmp_path, monkeypatch):
    save(tmp_path / "c", 1)
    rename = os.rename

    def refuse(source, target, **options):
        if Path(source).name == "c.old":
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(source))
        return rename(source, target, **options)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(UserWarning, match=r"c is saved, but .*c\.old, which it replaces, cannot be moved"):
        save(tmp_path / "c", 2)
    assert loaded_step(tmp_path / "c") == 2
    monkeypatch.undo()
    save(tmp_path / "c", 3)
    assert names(tmp_path) == ["c"]


@pytest.mark.parametrize("litter", LITTER)
def test_what_file_systems_and_desktops_leave_blocks_no_name(tmp_path, litter):
    for name in ("c", "c.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / litter).touch()
    for step in (1, 2):
        save(tmp_path / "c", step)
        (tmp_path / "c" / litter).touch()
        assert loaded_step(tmp_path / "c") == step
    save(tmp_path / "d", 3)
    assert names(tmp_path) == ["c", "d"]
    checkpoint.keep_last(tmp_path, 1)
    assert names(tmp_path) == ["d"]


def test_litter_beside_checkpoints_is_no_checkpoint(tmp_path):
    save(tmp_path / "c", 1)
    for litter in LITTER:
        (tmp_path / litter).touch()
    checkpoint.keep_last(tmp_path, 1)
    assert checkpoint.newest(tmp_path) == tmp_path / "c"
    assert names(tmp_path) == sorted([*LITTER, "c"])


def test_keep_last_leaves_a_checkpoint_with_a_file_of_the_user_s(tmp_path):
    for step in range(3):
        save(tmp_path / f"step-{step}", step)
    (tmp_path / "step-0" / "notes.txt").write_text("dear")
    with pytest.warns(UserWarning, match="step-0 would be removed, but stays: it holds a file of yours, notes.txt"):
        checkpoint.keep_last(tmp_path, 1)
    assert names(tmp_path) == ["step-0", "step-2"]
    assert (tmp_path / "step-0" / "notes.txt").read_text() == "dear"


def test_a_save_keeps_beside_it_a_checkpoint_with_a_file_of_the_user_s(tmp_path):
    for step in (1, 2, 3):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            save(tmp_path / "c", step)
        assert [str(w.message) for w in warned if "it is kept as" in str(w.message)] == (
            [f"the checkpoint that {tmp_path}/c replaces holds a file of yours, notes.txt: it is kept as "
             f"{tmp_path}/c.replaced-{step - 1}"] if step > 1 else []
        )  # fmt: skip
        (tmp_path / "c" / "notes.txt").write_text(f"of {step}")
    assert names(tmp_path) == ["c", "c.replaced-1", "c.replaced-2"]
    for name, step in (("c.replaced-1", 1), ("c.replaced-2", 2), ("c", 3)):
        assert loaded_step(tmp_path / name) == step
        assert (tmp_path / name / "notes.txt").read_text() == f"of {step}"
    assert checkpoint.newest(tmp_path) == tmp_path / "c"


def test_a_save_killed_before_it_kept_the_old_one_beside_leaves_it_to_the_next(tmp_path):
    save(tmp_path / "c", 1)
    (tmp_path / "c" / "notes.txt").write_text("dear")
    (tmp_path / "c").rename(tmp_path / "c.old")
    save(tmp_path / "d", 2)
    (tmp_path / "d").rename(tmp_path / "c")
    with pytest.warns(UserWarning, match="it is kept as .*c.replaced-1"):
        save(tmp_path / "c", 3)
    assert names(tmp_path) == ["c", "c.replaced-1"]
    assert (tmp_path / "c.replaced-1" / "notes.txt").read_text() == "dear"


def keep_one_that_cannot_be_removed(folder):
    model, optimizer = engine("sharded", "split")
    rename = os.rename

    def refuse(source, target, **options):
        if Path(source).name == "0":
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(source))
        return rename(source, target, **options)

    for step in range(2):
        checkpoint.save(f"{folder}/{step}", model=model, optimizer=optimizer)
    os.rename = refuse
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            checkpoint.keep_last(folder, 1)
    finally:
        os.rename = rename
    checkpoint.save(f"{folder}/2", model=model, optimizer=optimizer)
    return [str(w.message) for w in warned]


def test_no_rank_fails_where_the_first_cannot_remove(gloo, tmp_path):
    first, second = gloo.run(2, keep_one_that_cannot_be_removed, str(tmp_path))
    assert len(first) == 1
    assert "0 cannot be removed and stays" in first[0]
    assert second == []
