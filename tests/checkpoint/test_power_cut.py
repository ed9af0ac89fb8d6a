"""A machine that loses its power after a save: a copy of a mounted disk, as it is at that moment, is mounted again."""

import contextlib
import os
import shutil
import subprocess
import time

import pytest

from lion_dist import checkpoint
from tests.checkpoint.killed import loaded_step, save

pytestmark = pytest.mark.slow
MIB = 1 << 20


@contextlib.contextmanager
def mounted(image, at):
    at.mkdir(exist_ok=True)
    # A commit interval longer than the test: nothing reaches the disk but what was synced.
    done = subprocess.run(["mount", "-o", "loop,commit=900", image, at], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount an ext4 image: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.fixture
def disk(tmp_path):
    """A mounted ext4 image, and what finds on it after a power cut."""
    missing = [tool for tool in ("mkfs.ext4", "mount", "umount") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    image, folder = tmp_path / "disk", tmp_path / "folder"
    with open(image, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", image], check=True)

    @contextlib.contextmanager
    def after_power_cut():
        """The folder as it is on the disk at this moment; the journal is replayed when it is mounted."""
        shutil.copyfile(image, tmp_path / "copy")
        with mounted(tmp_path / "copy", tmp_path / "again"):
            yield tmp_path / "again"

    with mounted(image, folder):
        yield folder, after_power_cut


def test_a_finished_save_survives(disk):
    folder, after_power_cut = disk
    save(folder / "runs" / "c", 1)
    with after_power_cut() as left:
        assert loaded_step(left / "runs" / "c") == 1


@pytest.mark.parametrize("seconds", [0, 3])
def test_an_overwriting_save_survives_with_its_old_one_removed(disk, seconds):
    folder, after_power_cut = disk
    save(folder / "c", 1)
    save(folder / "c", 2)
    time.sleep(seconds)
    with after_power_cut() as left:
        assert loaded_step(left / "c") == 2
        assert checkpoint.newest(left) == left / "c"


def test_at_every_moment_of_an_overwriting_save_a_checkpoint_survives(disk, monkeypatch):
    """Cut before each rename, removal and fsync of it."""
    folder, after_power_cut = disk
    save(folder / "c", 1)
    found = []

    def cutting(function):
        def call(*args, **kwargs):
            with monkeypatch.context() as inner:
                for name, original in originals.items():
                    inner.setattr(os, name, original)
                with after_power_cut() as left:
                    found.append(loaded_step(left / "c"))
            return function(*args, **kwargs)

        return call

    originals = {name: getattr(os, name) for name in ("rename", "unlink", "rmdir", "fsync")}
    with monkeypatch.context() as patched:
        for name, original in originals.items():
            patched.setattr(os, name, cutting(original))
        save(folder / "c", 2)
    assert set(found) == {1, 2}
    assert found == sorted(found)  # once the new one is there, it stays


def test_keep_last_leaves_the_newest(disk):
    folder, after_power_cut = disk
    for step in range(3):
        save(folder / f"step-{step}", step)
        checkpoint.keep_last(folder, 1)
        with after_power_cut() as left:
            assert loaded_step(checkpoint.newest(left)) == step
