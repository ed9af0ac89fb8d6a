"""What is published: a wheel that works without the rest of the project, a source distribution that has its tests."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLISHED = ["lion_dist", "tests", "launch", "docs", "pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md"]
PUBLISHED += ["LICENSE", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"]

TRAIN = """
import torch, lion_dist
from lion_dist.cpu_backend import native
model = torch.nn.Linear(64, 64).bfloat16()
opt = lion_dist.ShardedLion(model.parameters(), module=model)
model(torch.ones(2, 64, dtype=torch.bfloat16)).sum().backward()
opt.step()
print(lion_dist.__file__, opt.taken_steps(), native.library() is not None)
"""


def versions() -> dict[str, tuple[str, str]]:
    """{package: (what pip takes, what the tests ran with)}, of the one page that says it."""
    page = (ROOT / "docs" / "guarantees.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (.+?) \|$", page[page.index("## Versions") :], re.MULTILINE)
    return {name: (takes, ran) for name, takes, ran in rows if name != "package"}


def test_the_stated_versions_are_those_that_pip_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    named.append("python" + project["requires-python"])
    for package, (takes, _) in versions().items():
        ranges = {name.removeprefix(package) or "any" for name in named if re.match(rf"{package}\b(?!-)", name)}
        assert ranges == {takes}, package


def test_the_pinned_versions_are_among_those_that_ran():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package, (_, ran) in versions().items():
        assert package == "python" or pins[package] in re.findall(r"\d+(?:\.\d+)+", ran), package


def test_the_doctor_knows_the_stated_versions():
    from lion_dist.cli import machine_checks

    def text(version: tuple[int, ...]) -> str:
        return ".".join(map(str, version))

    stated = {package: takes for package, (takes, _) in versions().items()}
    assert stated["python"] == f">={text(machine_checks.OLDEST_PYTHON)}"
    assert stated["torch"] == f">={text(machine_checks.OLDEST_TORCH)}"
    oldest, first_untested = machine_checks.OLDEST_TRITON, machine_checks.FIRST_UNTESTED_TRITON
    assert stated["triton"] == f">={text(oldest)},<{text(first_untested)}"
    newest = max(tuple(map(int, ran.split(".")[:2])) for ran in re.findall(r"\d[\d.]+\d", versions()["torch"][1]))
    assert newest < machine_checks.FIRST_UNTESTED_TORCH == (newest[0], newest[1] + 1)


def run(command: list[object], cwd: Path, **environment: str) -> str:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(once) -> Path:
    """A folder with the wheel and the source distribution, built from a copy of the project."""
    return once("built", build)


def build(folder: Path) -> Path:
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
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path], check=True)  # tarfile's filters are of Python 3.11.4
    (folder,) = tmp_path.iterdir()
    missing = [name for name in PUBLISHED if not (folder / name).exists()]
    assert missing == []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_optimizer.py", "-k", "step"]
    assert " passed" in run(command, folder, PYTHONPATH=str(folder))
