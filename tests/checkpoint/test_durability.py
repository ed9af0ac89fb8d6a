"""Nothing is ever lost: kills, full disks and damage."""

import importlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import directory, manifest, storage
from lion_dist.checkpoint.metadata import read_metadata
from tests import preloaded
from tests.checkpoint.engines import engine, train
from tests.checkpoint.killed import loaded_step, save

ROOT = Path(__file__).parents[2]
save_module = importlib.import_module("lion_dist.checkpoint.save")  # as an attribute, the name is the function's


def run_killed(*args, timeout=600):
    command = [preloaded.python(), "-m", "tests.checkpoint.killed", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kill_before_any_system_call_of_an_overwriting_save_leaves_a_checkpoint(tmp_path):
    seen = run_killed("points", tmp_path / "folder", "again")
    assert seen["old"] + seen["new"] == seen["points"] >= 20
    assert seen["new"] > 0
    assert seen["from .old"] > 0  # between the two renames


def test_a_kill_before_any_system_call_of_a_first_save_leaves_nothing_that_looks_whole(tmp_path):
    seen = run_killed("points", tmp_path / "folder", "first")
    assert seen["none"] + seen["new"] == seen["points"] > 10
    assert seen["new"] > 0


@pytest.mark.slow
def test_kills_at_random_moments_lose_no_finished_save(tmp_path):
    seen = run_killed("moments", tmp_path / "folder", 24)
    assert seen["kills"] == 24
    assert seen["partial"] > 0  # some did hit a save
    assert seen["newest"] > 1


@pytest.mark.parametrize("when", ["unconnected", "saved", "in-background"])
def test_a_rank_whose_peer_has_died_does_not_wait_for_it_in_the_next_save(tmp_path, when):
    error = run_killed("left", tmp_path / "folder", when, timeout=90)["error"]  # gloo's default is 30 minutes
    assert "the ranks lost each other while they saved or loaded" in error


# ---- a disk that does not take it


class FullDisk(io.FileIO):
    def write(self, data):
        if self.tell() > 4000:
            raise OSError(28, "No space left on device")
        return super().write(data)


def save_on_a_full_disk(folder, full_rank):
    model, optimizer = engine("sharded", "split")
    train(model, optimizer, range(2))
    checkpoint.save(f"{folder}/checkpoint", model=model, optimizer=optimizer, extra={"step": 2})
    train(model, optimizer, range(2, 3))
    errors = []
    if torch.distributed.get_rank() == full_rank:
        storage.open = FullDisk
    try:
        for name in ("checkpoint", "another"):
            try:
                checkpoint.save(f"{folder}/{name}", model=model, optimizer=optimizer)
            except checkpoint.CheckpointError as error:
                errors.append(str(error))
    finally:
        vars(storage).pop("open", None)
    train(model, optimizer, range(3, 4))  # training goes on
    left = sorted(os.listdir(folder))
    other, other_optimizer = engine("sharded", "split")
    extra = checkpoint.load(f"{folder}/checkpoint", model=other, optimizer=other_optimizer)
    checkpoint.save(f"{folder}/checkpoint", model=model, optimizer=optimizer)  # and there is room again
    return errors, left, extra


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_is_an_error_on_all(gloo, tmp_path, full_rank):
    for errors, left, extra in gloo.run(2, save_on_a_full_disk, str(tmp_path), full_rank):
        assert len(errors) == 2
        assert [f"rank {full_rank}: OSError: [Errno 28] No space left on device"] * 2 == errors
        assert left == ["checkpoint"]
        assert extra == {"step": 2}


def test_a_write_that_the_kernel_refuses_is_an_error_and_the_older_checkpoint_stays(tmp_path):
    save(tmp_path / "c", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(checkpoint.CheckpointError, match="File too large"):
            save(tmp_path / "c", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert loaded_step(tmp_path / "c") == 1
    assert os.listdir(tmp_path) == ["c"]


def save_where_only_the_first_rank_can(path):
    model, optimizer = engine("sharded", "split")
    try:
        checkpoint.save(path, model=model, optimizer=optimizer)
    except checkpoint.CheckpointError as error:
        return str(error)
    return None


def test_a_folder_that_cannot_be_made_is_an_error_on_all_ranks(gloo, tmp_path):
    (tmp_path / "file").write_text("")
    errors = gloo.run(2, save_where_only_the_first_rank_can, str(tmp_path / "file" / "c"))
    assert all("NotADirectoryError" in error for error in errors)


def test_a_directory_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1").write_text("dear")
    with pytest.raises(checkpoint.CheckpointError, match="thesis exists and is no checkpoint"):
        save(tmp_path / "thesis", 1)
    (tmp_path / "thesis").rename(tmp_path / "c.partial")
    with pytest.raises(checkpoint.CheckpointError, match="holds other files than a checkpoint's"):
        save(tmp_path / "c", 1)
    assert (tmp_path / "c.partial" / "chapter-1").read_text() == "dear"


# ---- two jobs, one path


def meanwhile(monkeypatch, module, name, function):
    """Call ``function`` once, right before ``module.name`` is called."""
    original = getattr(module, name)

    def first(*args, **kwargs):
        monkeypatch.setattr(module, name, original)
        function()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, first)


@pytest.mark.parametrize("moment", ["before it writes", "before it is committed"])
def test_a_save_that_another_job_overtakes_fails_and_damages_nothing(tmp_path, monkeypatch, moment):
    name = {"before it writes": "_write_tensors", "before it is committed": "_commit"}[moment]
    meanwhile(monkeypatch, save_module, name, lambda: save(tmp_path / "c", 2))
    with pytest.raises(checkpoint.CheckpointError, match="another job saves under the same name"):
        save(tmp_path / "c", 1)
    assert os.listdir(tmp_path) == ["c"]
    assert loaded_step(tmp_path / "c") == 2


def test_a_save_that_another_job_overtakes_leaves_that_ones_files_and_the_older_checkpoint_alone(tmp_path, monkeypatch):
    save(tmp_path / "c", 1)
    others = []
    meanwhile(monkeypatch, save_module, "_commit", lambda: others.append(directory.begin(tmp_path / "c")))
    with pytest.raises(checkpoint.CheckpointError, match="another job saves under the same name"):
        save(tmp_path / "c", 2)
    others[0].check()
    assert loaded_step(tmp_path / "c") == 1


# ---- damage


def damaged(path, file, how):
    file = path / file
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return
    if how == "truncated":
        del content[-1]
    if how == "flipped":
        content[len(content) // 2] ^= 4
    file.write_bytes(content)


def load_unchanged(path):
    model, optimizer = engine("sharded", "split")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        checkpoint.load(path, model=model, optimizer=optimizer)
    except checkpoint.CheckpointError as error:
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert all(not shard.exp_avg.any() for shard in optimizer.shards)
        return str(error)
    return None


def save_sharded(path):
    model, optimizer = engine("sharded", "split")
    train(model, optimizer, range(2))
    checkpoint.save(path, model=model, optimizer=optimizer)


@pytest.fixture(scope="module")
def saved_by_two(gloo, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "c"
    gloo.run(2, save_sharded, str(path))
    return path


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata", "lion_dist.json"])
def test_a_damaged_file_is_refused_by_name_on_every_rank(gloo, tmp_path, saved_by_two, file, how):
    shutil.copytree(saved_by_two, tmp_path / "c")
    damaged(tmp_path / "c", file, how)
    errors = gloo.run(2, load_unchanged, str(tmp_path / "c"))
    assert all(error is not None and file in error for error in errors)
    with pytest.raises(checkpoint.CheckpointError, match=file):
        checkpoint.verify(tmp_path / "c")


def test_verify_accepts_what_was_saved_and_counts_its_bytes(saved_by_two):
    counts = []
    checkpoint.verify(saved_by_two, counts.append)
    assert sum(counts) == sum(f.stat().st_size for f in saved_by_two.iterdir() if f.name != manifest.NAME)


# ---- nothing is unpickled


class Exploit:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def replace_file(path, name, content):
    """As one who can write files would: with the checksums put right."""
    (path / name).write_bytes(content)
    entries = manifest.read(path)
    entries["files"][name] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    entries.pop("format")
    manifest.write(path, entries)


def test_metadata_that_would_run_code_is_refused(tmp_path):
    save(tmp_path / "c", 1)
    replace_file(tmp_path / "c", ".metadata", pickle.dumps(Exploit(f"touch {tmp_path}/ran")))
    model = nn.Linear(50_000, 1, bias=False)
    with pytest.raises(checkpoint.CheckpointError, match=r"\.metadata is refused: it asks for posix\.system"):
        checkpoint.load(tmp_path / "c", model=model, optimizer=Lion(model.parameters()))
    with pytest.raises(checkpoint.CheckpointError, match="is refused"):
        checkpoint.verify(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_metadata_of_another_kind_is_refused(tmp_path):
    save(tmp_path / "c", 1)
    replace_file(tmp_path / "c", ".metadata", pickle.dumps([1, 2]))
    with pytest.raises(checkpoint.CheckpointError, match=r"\.metadata is refused: it holds a list where"):
        checkpoint.verify(tmp_path / "c")


def test_metadata_that_names_a_file_elsewhere_is_refused(tmp_path):
    save(tmp_path / "c", 1)
    metadata = read_metadata(tmp_path / "c")
    for place in metadata.storage_data.values():
        place.relative_path = "../elsewhere"
    replace_file(tmp_path / "c", ".metadata", pickle.dumps(metadata))
    model = nn.Linear(50_000, 1, bias=False)
    with pytest.raises(checkpoint.CheckpointError, match="it names a file elsewhere, '../elsewhere'"):
        checkpoint.load(tmp_path / "c", model=model, optimizer=Lion(model.parameters()))


def test_loading_tensors_runs_no_unpickler(tmp_path, monkeypatch):
    save(tmp_path / "c", 1)

    def refuse(*args, **kwargs):
        raise AssertionError("something is being unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    assert loaded_step(tmp_path / "c") == 1
