"""A save in the background: training goes on, and what it does later is not in the checkpoint."""

import functools
import os
import threading
import time
from datetime import timedelta

import pytest
import torch

from lion_dist import checkpoint
from lion_dist.checkpoint import directory, storage
from tests.checkpoint.engines import assert_same_tensors, engine, train


class Gate:
    """Files that cannot be written until the gate opens."""

    def __init__(self):
        self.opened, self.reached = threading.Event(), threading.Event()
        storage.open = self.open

    def open(self, path, mode):
        if "w" in mode:
            self.reached.set()
            assert self.opened.wait(60)
        return open(path, mode)

    def remove(self):
        del storage.open


def save_while_training(folder, name):
    model, optimizer = engine(name, "split")
    train(model, optimizer, range(2))
    checkpoint.save(f"{folder}/at once", model=model, optimizer=optimizer)
    gate = Gate()
    try:
        pending = checkpoint.save_async(f"{folder}/later", model=model, optimizer=optimizer, extra={"step": 2})
        assert gate.reached.wait(60)
        train(model, optimizer, range(2, 4))  # with collectives, while the save waits
        done_early, there_early = pending.done(), checkpoint.newest(folder).name
        gate.opened.set()
        pending.wait()
    finally:
        gate.remove()
    return done_early, there_early, pending.done()


@pytest.mark.parametrize("name", ["sharded", "fsdp2", "fsdp1 flat"])
def test_training_goes_on_and_the_checkpoint_is_of_the_moment_of_the_call(gloo, tmp_path, name):
    for answer in gloo.run(2, save_while_training, str(tmp_path), name):
        assert answer == (False, "at once", True)
    assert_same_tensors(tmp_path / "at once", tmp_path / "later")
    assert checkpoint.newest(tmp_path) == tmp_path / "later"


def two_in_a_row(folder):
    model, optimizer = engine("sharded", "split")
    for step in range(2):
        checkpoint.save_async(f"{folder}/same", model=model, optimizer=optimizer, extra={"step": step})
    return checkpoint.load(f"{folder}/same", model=model, optimizer=optimizer)  # waits as well


def test_a_second_save_and_a_load_wait_for_the_first(gloo, tmp_path):
    assert gloo.run(2, two_in_a_row, str(tmp_path)) == [{"step": 1}] * 2


class BrokenDisk:
    def __init__(self, path, mode):
        raise OSError(5, "Input/output error")


def errors_of_broken_saves(folder):
    model, optimizer = engine("sharded", "split")
    arguments = {"model": model, "optimizer": optimizer}
    is_broken = torch.distributed.get_rank() == 1
    errors = []

    def start():
        if is_broken:
            storage.open = BrokenDisk
        try:
            pending = checkpoint.save_async(f"{folder}/c", **arguments)
            pending._thread.join()
        finally:
            vars(storage).pop("open", None)
        return pending

    for collect in (lambda pending: pending.wait(), lambda pending: checkpoint.save(f"{folder}/d", **arguments)):
        pending = start()
        train(model, optimizer, range(1))
        try:
            collect(pending)
        except checkpoint.CheckpointError as error:
            errors.append(str(error))
        pending.wait()  # it comes out once
    checkpoint.save(f"{folder}/d", **arguments)
    return errors


def test_an_error_comes_out_at_wait_or_at_the_next_save_on_every_rank(gloo, tmp_path):
    for errors in gloo.run(2, errors_of_broken_saves, str(tmp_path)):
        assert errors == ["rank 1: OSError: [Errno 5] Input/output error"] * 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]


def keep_last_while_saving(folder, saved, under_way):
    model, optimizer = engine("plain", "split")
    for name in saved:
        checkpoint.save(folder / name, model=model, optimizer=optimizer)
    gate = Gate()
    try:
        pending = checkpoint.save_async(folder / under_way, model=model, optimizer=optimizer, extra={"step": 2})
        assert gate.reached.wait(60)
        checkpoint.keep_last(os.path.relpath(folder), 1)
        gate.opened.set()
        pending.wait()
    finally:
        gate.remove()
    return checkpoint.load(folder / under_way, model=model, optimizer=optimizer)


@pytest.mark.parametrize("saved, under_way", [("a", "b"), ("ab", "a")], ids=["a new one", "one that replaces an older"])
def test_keep_last_leaves_a_save_under_way_alone(tmp_path, saved, under_way):
    assert keep_last_while_saving(tmp_path, saved, under_way) == {"step": 2}
    assert checkpoint.newest(tmp_path) == tmp_path / under_way


# ---- a rank that comes too late


def saves_around_a_time_out(folder):
    model, optimizer = engine("ddp", "split")
    new_group, errors = torch.distributed.new_group, []
    torch.distributed.new_group = functools.partial(new_group, timeout=timedelta(seconds=2))
    try:
        for name in ("before", "late", "after"):
            if name == "late" and torch.distributed.get_rank() == 1:
                storage.open = slow_open
            try:
                checkpoint.save(f"{folder}/{name}", model=model, optimizer=optimizer)
            except checkpoint.CheckpointError as error:
                errors.append((name, str(error)))
            vars(storage).pop("open", None)
            train(model, optimizer, range(1))  # training's own group works
    finally:
        torch.distributed.new_group = new_group
    return errors


def slow_open(path, mode):
    time.sleep(5)
    return open(path, mode)


def test_a_time_out_is_explained_on_every_rank_and_costs_one_save(gloo, tmp_path):
    for errors in gloo.run(2, saves_around_a_time_out, str(tmp_path)):
        assert [name for name, _ in errors] == ["late"]
        assert "the ranks lost each other while they saved or loaded" in errors[0][1]
    assert checkpoint.newest(tmp_path) == tmp_path / "after"


@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_async])
def test_a_relative_path_is_that_of_the_call_whatever_the_working_directory_is_later(tmp_path, monkeypatch, save):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model, optimizer = engine("plain", "split")
    begin = directory.begin

    def begin_elsewhere(path):
        os.chdir(tmp_path / "there")
        return begin(path)

    monkeypatch.setattr(directory, "begin", begin_elsewhere)
    pending = save("c", model=model, optimizer=optimizer)
    if pending is not None:
        pending.wait()
        assert pending.path == tmp_path / "here" / "c"
    checkpoint.verify(tmp_path / "here" / "c")
    assert os.listdir(tmp_path / "there") == []
