"""Each room beside the core can be deleted: what is left is imported, and trains to the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import lion_dist
from tests import preloaded
from tests.test_budgets import ROOMS

PACKAGE = Path(lion_dist.__file__).parent

# One process for all rooms, which imports once what each would import of torch, and forks.
EACH_IN_A_FORK = """
import os, sys, traceback, importlib.machinery
import torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor
finders = (importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, importlib.machinery.PathFinder)
sys.meta_path[:] = finders  # an editable installation would find what is missing in the copy
for copy in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.path.insert(0, copy)
        try:
            train_both()
            print("trained without", os.path.basename(copy), flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)
"""
STEPS = """
def train_both():
    import torch
    from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig

    def train(make):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).bfloat16()
        opt = make(model)
        for step in range(3):
            torch.manual_seed(step)
            model(torch.randn(4, 5).bfloat16()).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return [p.detach() for p in model.parameters()]

    settings = dict(lr=1e-2, weight_decay=0.1, precision=PrecisionPolicy())
    plain = train(lambda model: Lion(model.parameters(), **settings))
    sharded = train(lambda model: ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(), **settings))
    assert all(map(torch.equal, plain, sharded))
"""


def without(name: str, folder: Path) -> Path:
    """A folder to import lion_dist from, which lacks the room."""
    copy = folder / name / "lion_dist"
    shutil.copytree(PACKAGE, copy)
    if (copy / name).is_dir():
        shutil.rmtree(copy / name)
    elif name != "nothing":
        (copy / name).unlink()
    return copy.parent


@pytest.fixture(scope="module")
def said(once) -> str:
    return once("rooms", train_without_each)


def train_without_each(folder: Path) -> str:
    copies = [str(without(name, folder)) for name in ("nothing", *ROOMS)]
    command = [preloaded.python(), "-c", STEPS + EACH_IN_A_FORK, *copies]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.stdout


@pytest.mark.parametrize("name", ["nothing", *ROOMS])
def test_the_core_trains_without(name, said):
    assert f"trained without {name}" in said.splitlines(), said
