"""A pool of gloo ranks that outlives the tests: worker processes that are sent functions.

Starting four processes costs seconds, sending them a function milliseconds. Every task gets a fresh process group of
the size that it asks for, so that nothing one test leaves behind (sub-groups, half a collective) reaches the next.
A rank that raises comes back with its number and traceback; a rank that hangs is a failure with the stacks of all
ranks, and the pool starts anew.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, arbitrary_address, wait
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.distributed_c10d import ProcessGroupGloo

from tests import triton_interpreter

MAX_RANKS = 4
TASK_TIMEOUT = 120.0  # seconds; the machine may be busy with other things
MAX_THREADS = 150  # of a worker: torch's caches of DTensors keep meshes, and each of their groups keeps two threads
# What most tasks need.
PRELOADED = (
    "lion_dist.checkpoint",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.debug",
)
COMPILER = "torch._inductor.pattern_matcher"  # a second of each rank that compiles, "aot_eager" included
GRACE = 10.0  # seconds that other ranks get after one has failed: they may be waiting for it in a collective


class RankError(AssertionError):
    """A function failed on a rank. ``errors``: {rank: traceback}."""

    def __init__(self, errors: dict[int, str]):
        self.errors = errors
        ranks_of: dict[str, list[int]] = {}
        for rank, text in sorted(errors.items()):
            ranks_of.setdefault(text, []).append(rank)
        super().__init__("\n".join(f"---- rank {', '.join(map(str, r))} ----\n{t}" for t, r in ranks_of.items()))


class GlooPool:
    """``pool.run(world_size, function, *args)`` calls ``function(*args)`` on that many ranks at once.

    ``function`` is at the top level of a module; it, its arguments and its result travel by pickle.
    """

    def __init__(self):
        self._workers: list[tuple[mp.Process, Connection]] = []
        self._store: dist.TCPStore | None = None
        self._tasks = 0
        self._folder = tempfile.TemporaryDirectory(prefix="lion-dist-stacks-")  # removed with the pool
        self._stacks = Path(self._folder.name)

    def run(self, world_size: int, function: Callable, *args, timeout: float = TASK_TIMEOUT) -> list:
        """Returns what each rank returned, in rank order.

        Raises:
            RankError: with the traceback of every rank that raised, died or did not return in time.
        """
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size must be in [1, {MAX_RANKS}], got {world_size}")
        self._start(world_size)
        self._tasks += 1
        task = pickle.dumps((function, args, world_size, self._tasks, timeout))
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            try:
                connection.send_bytes(task)
            except ConnectionError:
                raise RankError({rank: f"after the task before, {self._death_of(rank)}"}) from None
        results, errors = self._collect(world_size, timeout)
        if any(_threads_of(process.pid) > MAX_THREADS for process, _ in self._workers):
            self.stop()  # the next task starts others
        if errors:
            raise RankError(errors)
        return [results[rank] for rank in range(world_size)]

    def _start(self, count: int) -> None:
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["pytest", *PRELOADED])  # where fork_server() has not been called
        new = []
        for rank in range(len(self._workers), count):
            ours, theirs = context.Pipe()
            args = (rank, theirs, self._store.port, self._stacks)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            new.append((process, ours))
        self._workers += new
        for _, connection in new:
            connection.recv_bytes()  # imports are done: from here on time is the task's

    def _collect(self, world_size: int, timeout: float) -> tuple[dict[int, object], dict[int, str]]:
        results: dict[int, object] = {}
        errors: dict[int, str] = {}
        pending = {self._workers[rank][1]: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                stacks = self._stacks_of(pending.values())
                self.stop()
                late = "did not return after another rank had failed" if errors else f"did not return in {timeout} s"
                return results, errors | {rank: f"{late}; it was killed here:\n{text}" for rank, text in stacks.items()}
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    return results, errors | {rank: self._death_of(rank)}
                if succeeded:
                    results[rank] = value
                else:
                    errors[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        return results, errors

    def _death_of(self, rank: int) -> str:
        """Say how this rank's process ended and where it was. The pool starts anew with the next task."""
        process = self._workers[rank][0]
        process.join(GRACE)
        code = process.exitcode
        self.stop()
        return f"the process died with exit code {code}\n{(self._stacks / str(rank)).read_text()}"

    def _stacks_of(self, ranks) -> dict[int, str]:
        ranks = list(ranks)
        for rank in ranks:
            os.kill(self._workers[rank][0].pid, signal.SIGUSR1)  # faulthandler writes the stacks
        deadline = time.monotonic() + GRACE
        while any(not (self._stacks / str(rank)).stat().st_size for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # until the last line
        return {rank: (self._stacks / str(rank)).read_text() for rank in ranks}

    def stop(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()


def fork_server() -> None:
    """Make a copy of this process, as it is now, the server that ranks are forked from.

    ``multiprocessing`` would start a new interpreter, which imports torch, the frameworks and the tests once more: 8 s.
    To be called before any test has run, because torch's own threads, once started, are missing in a copy; and not
    where there is a GPU, because a process that has asked for it cannot be forked.
    """
    with warnings.catch_warnings(action="ignore"):
        for name in (*PRELOADED, *([COMPILER] if "tests.integrations.fsdp_ranks" in sys.modules else [])):
            importlib.import_module(name)
    put_imports_aside(0)
    server, address = forkserver._forkserver, arbitrary_address("AF_UNIX")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        alive, ours = os.pipe()  # it ends when this process has: then nobody has the other end
        server._forkserver_pid = os.fork()
        if server._forkserver_pid == 0:
            os.close(ours)
            logging.root.handlers.clear()  # pytest's
            try:
                forkserver.main(listener.fileno(), alive, [])
            finally:
                os._exit(1)
        os.close(alive)
    server._forkserver_address, server._forkserver_alive_fd = address, ours


def _threads_of(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:  # it has died
        return 0


def _meet(store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
    """A process group of all ranks. A rank that leaves early, before another has found its way in, breaks the other's
    connection: so all wait for each other. One that does not get in dies, and the pool starts anew."""
    try:
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout + 2 * GRACE)
        )
        dist.barrier()
    except Exception:
        traceback.print_exc()
        os._exit(1)


def share_one_device() -> None:
    """Let every process group that this process makes from now on use one gloo device.

    A device is a thread that wakes 100 times a second, and torch makes one for each group. Groups live long: torch's
    caches of DTensors keep meshes. The idle devices of 16 ranks took 44% of two cores.
    """
    device = ProcessGroupGloo.create_default_device()
    make = ProcessGroupGloo.__init__

    def make_with_it(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout = [device], timeout
        make(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = make_with_it


def _serve(rank: int, connection: Connection, port: int, stacks: Path) -> None:
    """The loop of a worker: take a function, run it in a new process group, send back what became of it."""
    torch.set_num_threads(1)
    collect_garbage_seldom()
    share_one_device()
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # it empties the caches, 27 ms a graph, for a log
    stacks_file = (stacks / str(rank)).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks_file)
    faulthandler.enable(stacks_file)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    connection.send_bytes(b"ready")
    modules = put_imports_aside(0)
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, args, world_size, number, timeout = pickle.loads(task)
            modules = put_imports_aside(modules)
            _meet(dist.PrefixStore(f"task{number}", store), rank, world_size, timeout)
            try:
                answer = pickle.dumps((True, function(*args)))
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)
        modules = put_imports_aside(modules)
        gc.collect()  # optimizers are cycles; they keep a process group and its threads


def collect_garbage_seldom() -> None:
    """In a process of tests, which collects after each: what Python does by itself took a sixth of their time."""
    gc.set_threshold(50_000, 50, 50)


def put_imports_aside(modules: int) -> int:
    """Where more than ``modules`` have been imported, nobody need look through them later: the search for garbage, and
    ``ShardedLion``'s for wrappers, which took nine tenths of a small test. Returns how many have been imported."""
    if len(sys.modules) > modules:
        triton_interpreter.hasten()
        gc.collect()
        gc.freeze()
    return len(sys.modules)
