import fcntl
import json
import logging
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported, here and in spawned workers
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of spawned workers
torch.set_num_threads(1)  # several ranks share the cores
if hasattr(os, "SCHED_BATCH"):  # of Linux
    # Inherited by all that tests start. gloo's thread polls without pause while the thread that holds its connection's
    # lock waits for a core: one that wakes must not take the core from it. (A fifth of the time of tests on 4 ranks.)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
hypothesis.settings.load_profile("ci")  # the same examples everywhere, and no deadline: the machine may be busy


MODULES = pytest.StashKey[int]()


def pytest_configure():
    from tests.gloo_workers import collect_garbage_seldom

    collect_garbage_seldom()


def pytest_collection_finish(session):
    # Once for all tests what pytest's ``log_level``, and its handlers in loggers that pass nothing on (torch has 60),
    # would be three times in each: 2 ms. (At DEBUG, torch.distributed.checkpoint logs every call.)
    logging.root.setLevel(logging.INFO)
    for logger in logging.root.manager.loggerDict.values():
        logger.propagate = True
    needs_ranks = any("gloo" in item.fixturenames for item in session.items)
    if needs_ranks and not session.config.option.collectonly and not torch.cuda.is_available():
        from tests.gloo_workers import fork_server

        fork_server()


def pytest_runtest_setup(item):
    """What has been imported, by the collection or by a test, need not be looked through in every later test."""
    from tests.gloo_workers import put_imports_aside

    item.config.stash[MODULES] = put_imports_aside(item.config.stash.get(MODULES, 0))


@pytest.fixture(scope="session")
def gloo():
    """``gloo.run(world_size, function, *args)``: see ``gloo_workers.py``. Processes start when first needed."""
    from tests.gloo_workers import GlooPool

    pool = GlooPool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable:
    """``once(name, make)``: what ``make(folder)`` returns, for all processes of pytest that run side by side.

    The first that asks makes it, in a folder that stays; it travels by pickle. Where it fails, the next one tries.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def ask(name: str, make: Callable[[Path], object]) -> object:
        made, answer = folder / f"once-{name}", folder / f"once-{name}.pickle"
        with (folder / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not answer.exists():
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
                answer.write_bytes(pickle.dumps(make(made)))
        return pickle.loads(answer.read_bytes())

    return ask


# What is imported of Triton before a program is forked interprets, as this process does; its binary part is shared.
COMPILE_AHEAD = """
import os, runpy, sys
os.environ.pop("TRITON_INTERPRET", None)
for name in list(sys.modules):
    if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
        del sys.modules[name]
runpy.run_module(sys.argv[1], run_name="__main__")
"""


@pytest.fixture(scope="session")
def compiled_by(once) -> Callable[[str], dict[str, dict[str, int]]]:
    """``compiled_by("tests.kernels.compile_ahead")`` is what ``python -m tests.kernels.compile_ahead`` prints: for each
    kernel its instructions, and how many of each. No GPU is needed."""
    from tests import preloaded

    def run(module: str, cache: Path) -> dict[str, dict[str, int]]:
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
        command = [preloaded.python(), "-c", COMPILE_AHEAD, module]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return lambda module: once(module, lambda folder: run(module, folder))
