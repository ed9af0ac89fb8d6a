"""Saves in forked processes that are killed; run as a program, so that torch is imported once and forking is safe.

``python -m tests.checkpoint.killed points FOLDER first|again`` kills one save before each of its system calls in turn;
``python -m tests.checkpoint.killed moments FOLDER COUNT`` kills two ranks, which save all the time, COUNT times at
random moments. After each kill the parent looks at what is left.
``python -m tests.checkpoint.killed left FOLDER unconnected|saved|in-background`` kills one rank of two before its first
save, after one, or in the background of one; the other rank saves without it. The last line printed says what was seen,
as JSON.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, ShardedLion, checkpoint
from lion_dist.checkpoint.storage import ChecksummedFile

NUMEL = 50_000


def model_of(step):
    model = nn.Linear(NUMEL, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(step)
    return model


def save(path, step):
    model = model_of(step)
    checkpoint.save(path, model=model, optimizer=Lion(model.parameters()), extra={"step": step})


def loaded_step(path):
    """The step of the checkpoint, all of whose numbers must be of that step; None when there is no checkpoint."""
    model = model_of(-1)
    try:
        checkpoint.verify(path)
        step = checkpoint.load(path, model=model, optimizer=Lion(model.parameters()))["step"]
    except checkpoint.CheckpointError as error:
        assert "no checkpoint at" in str(error), error
        return None
    assert model.weight.eq(step).all()
    return step


def forked(function):
    """Run ``function`` in a child process; returns its exit status as ``os.waitpid`` gives it."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


# ---- before each system call


def die_before(number):
    """Count the calls that change the disk, and die instead of making the ``number``-th; a write dies half-way."""
    calls = 0

    def dies() -> bool:
        nonlocal calls
        calls += 1
        return calls == number

    def counted(function):
        def call(*args, **kwargs):
            if dies():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("rename", "mkdir", "rmdir", "unlink", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    write = ChecksummedFile.write

    def write_or_die(stream, data):
        if len(data) > 1000 and dies():  # a tensor's bytes; an archive has a dozen small writes around them
            stream.file.write(bytes(data)[: len(data) // 2])
            stream.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(stream, data)

    ChecksummedFile.write = write_or_die


def kill_at_each_point(folder, overwriting):
    path = folder / "checkpoint"
    seen = {"points": 0, "old": 0, "new": 0, "none": 0, "from .old": 0}
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if overwriting:
            save(path, 1)

        def save_and_die(number=seen["points"] + 1):
            die_before(number)
            save(path, 2)

        status = forked(save_and_die)
        if status == 0:
            assert loaded_step(path) == 2
            return seen
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        seen["points"] += 1
        seen["from .old"] += not path.exists() and (folder / "checkpoint.old").exists()
        step = loaded_step(path)
        seen[{1: "old", 2: "new", None: "none"}[step]] += 1
        assert checkpoint.newest(folder) == (None if step is None else path)
        assert step is not None or not overwriting, "the older checkpoint is lost"
        save(path, 3)  # what was left is in nobody's way
        assert loaded_step(path) == 3
        assert [entry.name for entry in folder.iterdir()] == ["checkpoint"]


# ---- at random moments, two ranks


def save_forever(rank, folder, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model = model_of(0)
    optimizer = ShardedLion(model.parameters(), module=model, lr=1e-3)
    step = 0
    if (newest := checkpoint.newest(folder)) is not None:
        step = checkpoint.load(newest, model=model, optimizer=optimizer)["step"]
        assert model.weight.eq(step).all()
    while True:
        step += 1
        with torch.no_grad():
            model.weight.fill_(step)
        path = folder / ("same" if step % 2 else f"step-{step}")
        save = checkpoint.save if step % 3 else checkpoint.save_async
        pending = save(path, model=model, optimizer=optimizer, extra={"step": step})
        if pending is not None:
            pending.wait()
        if rank == 0:
            (folder.parent / "done").write_text(str(step))
        checkpoint.keep_last(folder, 2)


def kill_at_random_moments(folder, count):
    random.seed(0)
    folder.mkdir()
    done, seen = folder.parent / "done", {"kills": 0, "first saves": 0, "partial": 0, "newest": 0}
    for attempt in range(count):
        if attempt % 4 == 0:  # also kill the first save of a folder
            shutil.rmtree(folder)
            folder.mkdir()
            done.write_text("0")
        meeting = folder.parent / f"meeting-{attempt}"
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                try:
                    save_forever(rank, folder, meeting)
                finally:
                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        started = time.monotonic()
        while not any(folder.iterdir()):  # they are at it
            assert time.monotonic() - started < 60, "nothing is being saved"
            time.sleep(0.001)
        time.sleep(random.choice([0.0, 0.05, 0.5]) * random.random())
        os.kill(children[attempt % 2], signal.SIGKILL)
        if attempt % 3 == 0:
            time.sleep(0.1)  # the other rank finds itself alone
        os.kill(children[1 - attempt % 2], signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        seen["kills"] += 1
        seen["partial"] += any(entry.name.endswith(".partial") for entry in folder.iterdir())
        finished = int(done.read_text() or 0)
        newest = checkpoint.newest(folder)
        step = 0 if newest is None else loaded_step(newest)
        seen["first saves"] += newest is None
        assert step >= finished, f"step {finished} had been saved, {step} is the newest"
        seen["newest"] = max(seen["newest"], step)
    return seen


# ---- one rank of two, and the other saves on


def save_when_left(folder, how):
    """The error of this process's save after the only other rank has died."""
    rank = 0 if os.fork() else 1
    meeting = f"file://{folder.parent / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=20))
    model = model_of(1)
    arguments = {"model": model, "optimizer": ShardedLion(model.parameters(), module=model, lr=1e-3)}
    if how == "saved":
        checkpoint.save(folder / "first", **arguments)
    elif how == "in-background":
        if rank == 1:
            die_before(1)
        with contextlib.suppress(checkpoint.CheckpointError):
            checkpoint.save_async(folder / "first", **arguments).wait()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        checkpoint.save(folder / "second", **arguments)
    except checkpoint.CheckpointError as error:
        return {"error": str(error)}
    return {"error": None}


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, how = sys.argv[1:]
    if what == "points":
        os.fsync = lambda descriptor: None  # 50 ms each on a busy disk, and a kill does not show what they are for
        result = kill_at_each_point(Path(folder), overwriting=how == "again")
    elif what == "left":
        result = save_when_left(Path(folder), how)
    else:
        result = kill_at_random_moments(Path(folder), int(how))
    print(json.dumps(result), flush=True)
    os._exit(0)  # gloo, which has lost a rank, may abort at the interpreter's own end
