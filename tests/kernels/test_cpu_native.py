"""The C step where it can be compiled, where it cannot, and on several threads."""

import subprocess

import pytest
import torch

from lion_dist.cpu_backend import native
from lion_dist.kernels.backends import choose_backend
from lion_dist.kernels.update import lion_update_
from tests.kernels.cases import BF16, FP32, INT16, Case, Storage, assert_same

CPU = torch.device("cpu")


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """As in a new process of a user with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def test_it_is_compiled_once_and_kept(fresh_library, monkeypatch):
    assert choose_backend(CPU, None) == "cpu_native"
    (kept,) = (fresh_library / "lion_dist").iterdir()
    commands = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: commands.append(command) or start(command, **more))
    native.library.cache_clear()
    assert choose_backend(CPU, None) == "cpu_native"
    assert [command[1:] for command in commands] == [["--version"]]
    assert list((fresh_library / "lion_dist").iterdir()) == [kept]


def test_another_source_is_another_binary(fresh_library, monkeypatch, tmp_path):
    assert native.library() is not None
    changed = tmp_path / "native.c"
    changed.write_text(native.SOURCE.read_text() + "\n")
    monkeypatch.setattr(native, "SOURCE", changed)
    native.library.cache_clear()
    assert native.library() is not None
    assert len(list((fresh_library / "lion_dist").iterdir())) == 2


def test_without_a_compiler_pytorch_takes_over_and_says_so(fresh_library, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.warns(UserWarning, match="no C compiler was found, so CPU tensors are updated by PyTorch operations"):
        assert choose_backend(CPU, None) == "cpu"


def test_a_compiler_that_fails_is_named(fresh_library, monkeypatch):
    broken = fresh_library / "broken-cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho cannot do that >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(UserWarning, match="broken-cc did not compile it .cannot do that"):
        assert choose_backend(CPU, None) == "cpu"
    assert not list((fresh_library / "lion_dist").iterdir())


@pytest.mark.parametrize("storage", [Storage(FP32, None, FP32), Storage(BF16, INT16, BF16, True)], ids=str)
def test_threads_share_the_elements(monkeypatch, storage):
    """Pieces begin within blocks and within tensors; random bits go by the element, not by the piece."""
    monkeypatch.setattr(native, "THREAD_NUMEL", 1000)
    before = torch.get_num_threads()
    case = Case.make(storage, storage.param, [7001, 0, 13, 2999], index_start=2**32 - 3000, step=3, seed=7)
    tensors = case.tensors()
    try:
        torch.set_num_threads(3)
        lion_update_(tensors, backend="cpu_native", **case.arguments())
    finally:
        torch.set_num_threads(before)
    assert_same(tensors, case.expected())
