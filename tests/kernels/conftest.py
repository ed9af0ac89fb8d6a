"""What the kernels are compiled to, where there is no GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def compiled_by(tmp_path_factory) -> Callable[[str], dict[str, dict[str, int]]]:
    """``compiled_by("compile_ahead")`` is what ``python -m tests.kernels.compile_ahead`` prints: for each kernel its
    instructions, and how many of each."""

    def run(module: str) -> dict[str, dict[str, int]]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        command = [sys.executable, "-m", f"tests.kernels.{module}"]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
