"""DeepSpeed's checkpoints by comparison/deepspeed_engine.py: which is the newest, and what precedes its name."""

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from comparison import deepspeed_engine, ranks
from comparison.deepspeed_engine import DeepSpeedEngine
from comparison.ranks import start_process_group, stop_process_group


@pytest.fixture
def engine(monkeypatch):
    """Of one rank; what it saves is one file."""
    monkeypatch.setenv("LOCAL_RANK", "0")

    def save_checkpoint(folder: str, tag: str, client_state: dict) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "of-rank-0.pt").write_text(str(client_state))

    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.engine = SimpleNamespace(save_checkpoint=save_checkpoint)
    start_process_group(timedelta(seconds=60))
    yield engine
    stop_process_group()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_are_ordered_by_number(engine, tmp_path):
    for name in ("step-999998", "step-999999", "step-1000000", "step-1000001.partial"):
        (tmp_path / name).mkdir()
    assert engine.newest(tmp_path) == tmp_path / "step-1000000"
    engine.keep_last(tmp_path, 2)
    assert names(tmp_path) == ["step-1000000", "step-1000001.partial", "step-999999"]


def test_nothing_of_a_killed_save_gets_into_the_next_of_that_step(engine, tmp_path):
    (tmp_path / "step-000005.partial" / "deepspeed").mkdir(parents=True)
    (tmp_path / "step-000005.partial" / "deepspeed" / "of-rank-7.pt").touch()
    engine.save(tmp_path / "step-000005", {"step": 5})
    assert names(tmp_path) == ["step-000005"]
    assert names(tmp_path / "step-000005" / "deepspeed") == ["of-rank-0.pt"]


def test_a_step_that_is_saved_again_replaces_the_first(engine, tmp_path):
    for time in ("first", "second"):
        engine.save(tmp_path / "step-000005", {"time": time})
    assert names(tmp_path) == ["step-000005"]
    assert "second" in (tmp_path / "step-000005" / "deepspeed" / "of-rank-0.pt").read_text()


def test_files_are_durable_before_the_checkpoint_has_its_name(engine, tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "step-000005", {}, os.fsync

    def note(descriptor: int) -> None:
        synced[Path(os.readlink(f"/proc/self/fd/{descriptor}"))] = path.exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    engine.save(path, {"step": 5})
    partial = tmp_path / "step-000005.partial"
    files = [partial, partial / "deepspeed", partial / "deepspeed" / "of-rank-0.pt"]
    assert synced == dict.fromkeys(files, False) | {tmp_path: True}


def test_a_rank_that_cannot_act_ends_all_with_its_reason(monkeypatch):
    monkeypatch.setattr(ranks, "gather_objects", lambda reason: [reason, "[Errno 30] Read-only file system"])
    with pytest.raises(OSError, match="rank 1: .*Read-only file system"):
        deepspeed_engine._all_or_none(lambda: None)


def refused(call, name):
    """``call``, which fails for what is named ``name``."""

    def refuse(path, *args, **kwargs):
        if Path(path).name.startswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return call(path, *args, **kwargs)

    return refuse


def test_what_cannot_be_replaced_is_said_with_its_cause(engine, tmp_path, monkeypatch):
    engine.save(tmp_path / "step-000005", {"step": 5})
    monkeypatch.setattr(os, "rename", refused(os.rename, "step-000005"))
    with pytest.raises(OSError, match="rank 0: .*Permission denied: .*step-000005"):
        engine.save(tmp_path / "step-000005", {"step": 5})


def test_a_save_whose_old_one_cannot_be_cleared_has_succeeded(engine, tmp_path, monkeypatch):
    engine.save(tmp_path / "step-000005", {"time": "first"})
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", refused(os.rmdir, "step-000005"))
        with pytest.warns(UserWarning, match="is not gone: .*Permission denied"):
            engine.save(tmp_path / "step-000005", {"time": "second"})
    assert "second" in (tmp_path / "step-000005" / "deepspeed" / "of-rank-0.pt").read_text()
    engine.keep_last(tmp_path, 1)
    assert names(tmp_path) == ["step-000005"]


def test_keep_last_warns_of_what_it_cannot_remove(engine, tmp_path, monkeypatch):
    for step in (5, 6):
        engine.save(tmp_path / f"step-{step:06d}", {"step": step})
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refused(os.rename, "step-000005"))
        with pytest.warns(UserWarning, match="step-000005 cannot be removed and stays"):
            engine.keep_last(tmp_path, 1)
    engine.keep_last(tmp_path, 1)
    assert names(tmp_path) == ["step-000006"]
