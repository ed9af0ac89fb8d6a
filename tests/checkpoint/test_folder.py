"""Which checkpoint of a folder is the newest, and which go."""

import json
import os
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lion_dist import checkpoint
from lion_dist.checkpoint import manifest
from tests.checkpoint.engines import engine
from tests.checkpoint.killed import forked, loaded_step, save


def names(folder):
    return sorted(os.listdir(folder))


def test_the_newest_is_the_last_one_saved_whatever_its_name(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None
    assert checkpoint.newest(tmp_path) is None
    for step, name in enumerate(("z", "a", "m")):
        save(tmp_path / name, step)
        assert checkpoint.newest(tmp_path) == tmp_path / name
    save(tmp_path / "z", 3)
    assert checkpoint.newest(tmp_path) == tmp_path / "z"


def test_a_clock_that_went_back_does_not_change_the_order(tmp_path, monkeypatch):
    save(tmp_path / "first", 1)
    monkeypatch.setattr("time.time_ns", lambda: 1)
    save(tmp_path / "second", 2)
    assert checkpoint.newest(tmp_path) == tmp_path / "second"


@pytest.mark.parametrize("how", ["no manifest", "partial", "a file is missing", "a file is short", "manifest damaged"])
def test_what_is_not_whole_is_never_the_newest(tmp_path, how):
    save(tmp_path / "older", 1)
    save(tmp_path / "newer", 2)
    newer = tmp_path / "newer"
    if how == "no manifest":
        (newer / manifest.NAME).unlink()
    elif how == "partial":
        newer.rename(tmp_path / "newer.partial")
    elif how == "a file is missing":
        (newer / "__0_0.distcp").unlink()
    elif how == "a file is short":
        os.truncate(newer / "__0_0.distcp", 1000)
    else:
        os.truncate(newer / manifest.NAME, 100)
    assert checkpoint.newest(tmp_path) == tmp_path / "older"


def test_a_manifest_that_was_changed_is_noticed(tmp_path):
    save(tmp_path / "c", 1)
    entries = json.loads((tmp_path / "c" / manifest.NAME).read_text())
    entries["param_groups"][0]["lr"] = 0.5
    (tmp_path / "c" / manifest.NAME).write_text(json.dumps(entries))
    with pytest.raises(checkpoint.CheckpointError, match="does not match its own checksum"):
        checkpoint.verify(tmp_path / "c")


@given(st.lists(st.integers(0, 100), max_size=12), st.integers(1, 9))
def test_each_file_is_checked_by_one_rank_and_the_bytes_are_spread(sizes, ranks):
    files = {f"file {i}": {"bytes": size} for i, size in enumerate(sizes)}
    shares = [manifest.share_of(files, rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name]["bytes"] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_a_save_killed_between_its_two_renames_is_found_under_its_name(tmp_path):
    save(tmp_path / "c", 1)
    (tmp_path / "c").rename(tmp_path / "c.old")
    assert checkpoint.newest(tmp_path) == tmp_path / "c"
    assert loaded_step(tmp_path / "c") == 1
    checkpoint.keep_last(tmp_path, 1)
    assert loaded_step(tmp_path / "c") == 1


def half_a_save(partial, hours_ago):
    partial.mkdir()
    (partial / "__0_0.distcp").write_text("half")
    for entry in (partial / "__0_0.distcp", partial):
        os.utime(entry, (time.time() - 3600 * hours_ago,) * 2)


def test_keep_last_keeps_the_newest_and_clears_what_dead_saves_left(tmp_path):
    for step in range(4):
        save(tmp_path / f"step-{step}", step)
    half_a_save(tmp_path / "step-4.partial", hours_ago=2)
    (tmp_path / "notes.partial").mkdir()
    (tmp_path / "notes.partial" / "notes.txt").write_text("dear")
    (tmp_path / "metrics.jsonl").write_text("{}")
    checkpoint.keep_last(tmp_path, 2)
    assert names(tmp_path) == ["metrics.jsonl", "notes.partial", "step-2", "step-3"]
    checkpoint.keep_last(tmp_path, 2)
    assert loaded_step(checkpoint.newest(tmp_path)) == 3


def test_keep_last_leaves_what_may_be_another_jobs_save_alone(tmp_path):
    for step in range(3):
        save(tmp_path / f"step-{step}", step)
    half_a_save(tmp_path / "step-3.partial", hours_ago=0.5)
    half_a_save(tmp_path / "step-0.partial", hours_ago=0.5)  # about to replace an old one
    (tmp_path / "step-0").rename(tmp_path / "step-0.old")
    checkpoint.keep_last(tmp_path, 1)
    assert names(tmp_path) == ["step-0.old", "step-0.partial", "step-2", "step-3.partial"]


@pytest.mark.parametrize("count", [0, -1])
def test_keep_last_refuses_to_keep_nothing(tmp_path, count):
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint.keep_last(tmp_path, count)


def save_thrice_keeping_one(folder):
    model, optimizer = engine("sharded", "split")
    for step in range(3):
        checkpoint.save(f"{folder}/{step}", model=model, optimizer=optimizer)
        checkpoint.keep_last(folder, 1)


def test_keep_last_is_called_by_all_ranks_and_done_by_the_first(gloo, tmp_path):
    gloo.run(2, save_thrice_keeping_one, str(tmp_path))
    assert names(tmp_path) == ["2"]


# ---- what else is in the folder


def as_nobody(function):
    """In a child process without root's rights, to whom permissions do not apply."""

    def run():
        if os.geteuid() == 0:
            os.seteuid(65534)
        function()

    return forked(run)


def test_a_directory_that_cannot_be_read_is_in_nobodys_way():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        folder = Path(folder)
        folder.chmod(0o777)
        save(folder / "step-0", 0)
        for name in ("lost+found", "closed.partial", "closed.old"):
            (folder / name).mkdir()
            (folder / name).chmod(0)

        def use():
            save(folder / "step-1", 1)
            assert checkpoint.newest(folder) == folder / "step-1"
            checkpoint.keep_last(folder, 2)

        assert as_nobody(use) == 0
        assert names(folder) == ["closed.old", "closed.partial", "lost+found", "step-0", "step-1"]


# ---- names that are not a checkpoint's own


@pytest.mark.parametrize("link", ["a-link", "the-latest"])  # before and after step-2 in the order of names
def test_keep_last_neither_counts_nor_removes_a_symlink(tmp_path, link):
    for step in range(3):
        save(tmp_path / f"step-{step}", step)
    (tmp_path / link).symlink_to("step-2")
    checkpoint.keep_last(tmp_path, 1)
    assert names(tmp_path) == sorted([link, "step-2"])
    assert checkpoint.newest(tmp_path) == tmp_path / "step-2"
    assert loaded_step(tmp_path / link) == 2


def test_a_symlink_to_a_checkpoint_elsewhere_can_be_the_newest_and_stays(tmp_path):
    for step, name in enumerate(("there/a", "here/b", "here/c", "there/d")):
        save(tmp_path / name, step)
    (tmp_path / "here/a").symlink_to(tmp_path / "there/a")
    (tmp_path / "here/d").symlink_to(tmp_path / "there/d")
    assert checkpoint.newest(tmp_path / "here") == tmp_path / "here/d"
    checkpoint.keep_last(tmp_path / "here", 1)
    assert names(tmp_path / "here") == ["a", "c", "d"]


def test_keep_last_leaves_a_symlink_in_partial_alone(tmp_path):
    save(tmp_path / "c", 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "x.partial").symlink_to("elsewhere")
    checkpoint.keep_last(tmp_path, 1)
    assert names(tmp_path) == ["c", "elsewhere", "x.partial"]


def test_a_save_over_a_symlink_is_refused(tmp_path):
    save(tmp_path / "step-1", 1)
    (tmp_path / "latest").symlink_to("step-1")
    with pytest.raises(checkpoint.CheckpointError, match=r"latest is a symlink \(to step-1\)"):
        save(tmp_path / "latest", 2)
    assert names(tmp_path) == ["latest", "step-1"]
    assert loaded_step(tmp_path / "latest") == 1


@pytest.mark.parametrize("name", ["best.old", "best.partial"])
def test_a_name_that_a_later_save_would_remove_is_refused(tmp_path, name):
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} is no name for a checkpoint"):
        save(tmp_path / name, 1)
    assert names(tmp_path) == []


# ---- the newest of which every byte is as it was written


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def newest_verified(folder):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = checkpoint.newest(folder, verified=True)
    return found, [str(w.message) for w in warned if "left out" in str(w.message)]


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", manifest.NAME])
def test_verified_goes_back_to_the_newest_without_damage_and_warns(tmp_path, file):
    for step in range(3):
        save(tmp_path / f"step-{step}", step)
    assert newest_verified(tmp_path) == (tmp_path / "step-2", [])
    flip(tmp_path / "step-2" / file)
    found, warned = newest_verified(tmp_path)
    assert found == tmp_path / "step-1"
    assert len(warned) == 1
    assert f"step-2 is left out: {tmp_path}/step-2/{file} is damaged" in warned[0]
    assert loaded_step(found) == 1


def test_verified_is_none_where_all_are_damaged(tmp_path):
    save(tmp_path / "c", 1)
    flip(tmp_path / "c" / "__0_0.distcp")
    found, warned = newest_verified(tmp_path)
    assert found is None
    assert len(warned) == 1


def save_twice(folder):
    model, optimizer = engine("sharded", "split")
    for step in range(2):
        checkpoint.save(f"{folder}/{step}", model=model, optimizer=optimizer)


def newest_and_files_read(folder):
    read, check = [], manifest.check_contents

    def counting(directory, name, *args):
        read.append(f"{directory.name}/{name}")
        return check(directory, name, *args)

    manifest.check_contents = counting
    try:
        return *newest_verified(folder), read
    finally:
        manifest.check_contents = check


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp"])
def test_ranks_share_the_reading_and_agree(gloo, tmp_path, file):
    gloo.run(2, save_twice, str(tmp_path))
    flip(tmp_path / "1" / file)
    (found, warned, read), (found_too, _, read_too) = gloo.run(2, newest_and_files_read, str(tmp_path))
    assert found == found_too == tmp_path / "0"
    assert len(warned) == 1
    distcp = [name for name in (*read, *read_too) if name.startswith("0/__")]
    assert sorted(distcp) == ["0/__0_0.distcp", "0/__1_0.distcp"]


# ---- odd neighbours


def odd_manifest(content):
    def make(path):
        path.mkdir()
        (path / manifest.NAME).write_text(content)

    return make


def odd_fifo(path):
    path.mkdir()
    os.mkfifo(path / manifest.NAME)


def odd_link_to_a_device(path):
    path.mkdir()
    (path / manifest.NAME).symlink_to("/dev/zero")


def odd_loop(path):
    path.symlink_to(path.name)


ODD = {
    "empty object": odd_manifest("{}"),
    "only a format": odd_manifest('{"format": 2}'),
    "null": odd_manifest("null"),
    "deep list": odd_manifest("[" * 100_000),
    "deep object": odd_manifest('{"a":' * 100_000),
    "not a number": odd_manifest('{"format": 2, "crc32": NaN, "saved": NaN}'),
    "a huge number": odd_manifest('{"format": 2, "crc32": "", "saved": ' + "9" * 5000 + "}"),
    "not UTF-8": lambda path: (path.mkdir(), (path / manifest.NAME).write_bytes(b"\xff\xfe{")),
    "a FIFO": odd_fifo,
    "a device": odd_link_to_a_device,
    "a loop": odd_loop,
    "a directory for a manifest": lambda path: (path / manifest.NAME).mkdir(parents=True),
    "a file": lambda path: path.write_text("{}"),
    "a FIFO for a checkpoint": os.mkfifo,
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_an_odd_neighbour_is_in_nobody_s_way(tmp_path, make):
    make(tmp_path / "odd")
    save(tmp_path / "c", 1)
    assert checkpoint.newest(tmp_path) == tmp_path / "c"
    assert newest_verified(tmp_path)[0] == tmp_path / "c"
    save(tmp_path / "d", 2)
    checkpoint.keep_last(tmp_path, 1)
    assert names(tmp_path) == ["d", "odd"]
