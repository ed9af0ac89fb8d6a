"""What is published: a wheel that works without the rest of the project, a source distribution that has its tests."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLISHED = ["lion_dist", "tests", "launch", "docs", "pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md"]
PUBLISHED += ["LICENSE", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"]

TRAIN = """
import torch, lion_dist
from lion_dist.kernels import cpu_native
model = torch.nn.Linear(64, 64).bfloat16()
opt = lion_dist.ShardedLion(model.parameters(), module=model)
model(torch.ones(2, 64, dtype=torch.bfloat16)).sum().backward()
opt.step()
print(lion_dist.__file__, opt.taken_steps(), cpu_native.library() is not None)
"""


def run(command: list[object], cwd: Path, **environment: str) -> str:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution, built from a copy of the project."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in PUBLISHED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    program = "from setuptools.build_meta import build_sdist, build_wheel; build_sdist('..'); build_wheel('..')"
    run([sys.executable, "-c", program], source)
    return folder


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_of_the_project_is(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    run(pip, tmp_path)
    assert (site / "lion_dist" / "py.typed").exists()
    printed = run([sys.executable, "-c", TRAIN], tmp_path, PYTHONPATH=str(site), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert printed.split() == [str(site / "lion_dist" / "__init__.py"), "1", "True"]
    assert "doctor" in run([site / "bin" / "lion-dist", "--help"], tmp_path, PYTHONPATH=str(site))


@pytest.mark.slow
def test_the_source_distribution_runs_its_tests(built, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    missing = [name for name in PUBLISHED if not (folder / name).exists()]
    assert missing == []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_optimizer.py", "-k", "step"]
    assert " passed" in run(command, folder, PYTHONPATH=str(folder))
