"""Does a test notice each fault of ``faults.py``? Run by ``make mutants``.

    python -m tests.mutants.run                 # all of them, about 10 minutes on 2 cores
    python -m tests.mutants.run peers clip      # those whose names contain one of the words

Faults go into copies of the repository, never into the checkout. First the tests run on an unchanged copy, where they
must pass. Exits with 1 when a fault goes unnoticed, does not apply, or cannot be tested.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
LEFT_BEHIND = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__")  # not needed by tests
LIMIT = 300  # seconds of one fault's tests; of all tests at first, 5 times as many
TESTS_FAILED = 1  # pytest's exit code


class Copy:
    """A copy of the repository in ``folder``."""

    def __init__(self, folder: Path):
        self.root = folder / "repository"
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        self._environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "XDG_CACHE_HOME": str(folder / "cache"),  # of compiled C sources: the user's keeps his own
            "TORCH_EXTENSIONS_DIR": str(folder / "cache"),
        }
        # Python would take bytecode of the same second and size for that of the changed file.
        self._python("-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "lion_dist", "tests")
        found = self._python("-c", "import lion_dist; print(lion_dist.__file__)").stdout.strip()
        if not Path(found).is_relative_to(self.root):
            raise SystemExit(f"tests would import {found}, not the copy in {self.root}. Unset PYTHONSAFEPATH.")

    def _python(self, *arguments: str, limit: float | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )

    def pytest(self, tests: Sequence[str], limit: float) -> subprocess.CompletedProcess:
        return self._python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no", *tests, limit=limit)

    def verdict(self, fault: Fault) -> tuple[bool, str]:
        """Whether a test notices ``fault``, and a few words."""
        path = self.root / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            return False, f"does not apply: {fault.file} has its text {text.count(fault.old)} times"
        path.write_text(text.replace(fault.old, fault.new))
        try:
            done = self.pytest(fault.tests, LIMIT)
        except subprocess.TimeoutExpired:
            return False, f"cannot be tested: {' '.join(fault.tests)} did not end in {LIMIT} s"
        finally:
            path.write_text(text)
        if done.returncode == 0:
            return False, f"UNNOTICED by {' '.join(fault.tests)}"
        failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, re.MULTILINE)
        if done.returncode != TESTS_FAILED or failed is None:
            return False, f"cannot be tested: pytest exits with {done.returncode}\n{done.stdout[-2000:]}"
        return True, f"noticed by {failed[1]}"


def chosen(words: Sequence[str]) -> list[Fault]:
    return [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]


def check_tests(copy: Copy, faults: Sequence[Fault]) -> None:
    """End the program unless all tests pass without a fault."""
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    print(f"{len(faults)} faults; their tests on the code as it is ...", flush=True)
    start = time.monotonic()
    done = copy.pytest(tests, 5 * LIMIT)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout[-4000:]}\nTests fail without any fault. Repair them first.")
    print(f"pass ({time.monotonic() - start:.0f} s)", flush=True)


def run(faults: Sequence[Fault], workers: int) -> int:
    """Print a line for each fault; return how many have not been noticed."""
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="lion-dist-mutants-") as folder:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        made = [Copy(Path(folder) / str(i)) for i in range(workers)]
        check_tests(made[0], faults)
        for copy in made:
            copies.put(copy)

        def judge(fault: Fault) -> tuple[bool, str, float]:
            copy, start = copies.get(), time.monotonic()
            try:
                return *copy.verdict(fault), time.monotonic() - start
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(workers) as pool:
            under_way = {pool.submit(judge, fault): fault for fault in faults}
            for count, future in enumerate(as_completed(under_way), 1):
                is_noticed, words, seconds = future.result()
                unnoticed += not is_noticed
                print(f"[{count:2}/{len(faults)}] {under_way[future].name}: {words} ({seconds:.0f} s)", flush=True)
    return unnoticed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of the names of faults; none: all")
    parser.add_argument("--workers", type=int, default=2, help="copies that are tested side by side")
    args = parser.parse_args()
    faults = chosen(args.words)
    if not faults:
        parser.error(f"no fault has one of the words {args.words} in its name")
    unnoticed = run(faults, args.workers)
    print(f"{len(faults) - unnoticed} of {len(faults)} faults noticed")
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
