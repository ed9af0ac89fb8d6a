"""``import lion_dist`` on a laptop: no triton, no deepspeed, nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BLOCK = """
import sys
for name in ("triton", "deepspeed", "transformers", "lion_pytorch"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""

TRAIN_AND_ASK_FOR_TRITON = """
import torch, lion_dist
model = torch.nn.Linear(4, 4)
for opt in (lion_dist.Lion(model.parameters()), lion_dist.ShardedLion(model.parameters(), module=model)):
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    opt.zero_grad()
print("trained")
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
try:
    lion_dist.Lion([param], use_triton=True).step()
except RuntimeError as error:
    print(error)
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def said(once) -> list[str]:
    return once("without_triton", lambda folder: python(BLOCK + TRAIN_AND_ASK_FOR_TRITON)).splitlines()


def test_trains_without_triton_and_deepspeed(said):
    assert said[0] == "trained"


def test_use_triton_without_triton_says_what_to_install(said):
    assert "triton is not installed: pip install 'lion-dist[triton]'" in said[1]


@pytest.fixture
def loaded(once) -> list[str]:
    code = "import sys, torch; before = set(sys.modules); import lion_dist; print(*(set(sys.modules) - before))"
    return once("imported_with_the_package", lambda folder: python(code)).split()


@pytest.mark.parametrize("module", ["triton", "deepspeed", "torch._dynamo", "torch._inductor"])
def test_import_loads_nothing_heavy(module, loaded):
    assert "lion_dist.lion" in loaded and module not in loaded


def test_public_names_are_those_of_all():
    import lion_dist

    assert set(lion_dist.__all__) <= set(dir(lion_dist))
    assert lion_dist.__version__
