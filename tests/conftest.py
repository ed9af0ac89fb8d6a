import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported, here and in spawned workers
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of spawned workers
torch.set_num_threads(1)  # several ranks share the cores
hypothesis.settings.load_profile("ci")  # the same examples everywhere, and no deadline: the machine may be busy


MODULES = pytest.StashKey[int]()


def pytest_configure():
    from tests.gloo_workers import collect_garbage_seldom

    collect_garbage_seldom()


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


@pytest.fixture(scope="session")
def compiled_by(once) -> Callable[[str], dict[str, dict[str, int]]]:
    """``compiled_by("tests.kernels.compile_ahead")`` is what ``python -m tests.kernels.compile_ahead`` prints: for each
    kernel its instructions, and how many of each. No GPU is needed."""

    def run(module: str, cache: Path) -> dict[str, dict[str, int]]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(cache)
        command = [sys.executable, "-m", module]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return lambda module: once(module, lambda folder: run(module, folder))
