"""``lion-dist doctor``: a sound machine is said to be sound, and each thing that can be broken has its line."""

from __future__ import annotations

import functools
import importlib.machinery
import itertools
import multiprocessing.spawn
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from lion_dist import cli
from lion_dist.cli import collective_check, machine_checks
from lion_dist.cli.findings import BROKEN, NOTE, OK, Finding, report
from lion_dist.cpu_backend import native
from lion_dist.kernels.update import lion_update_
from tests import preloaded
from tests.launch import jobs

SOUND = Finding("collectives", OK, "as they should be")


@pytest.fixture
def no_ranks(monkeypatch):
    """The rest of the report, without starting processes."""
    monkeypatch.setattr(collective_check, "on_own_ranks", lambda: [SOUND])


@pytest.fixture
def forked_ranks():
    """Ranks are spawned by what has imported torch."""
    executable = multiprocessing.spawn.get_executable()
    multiprocessing.spawn.set_executable(preloaded.python())
    yield
    multiprocessing.spawn.set_executable(executable)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def fake_deepspeed(monkeypatch, version: str) -> None:
    module = types.ModuleType("deepspeed")
    module.__version__, module.__spec__ = version, importlib.machinery.ModuleSpec("deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    installed = machine_checks._installed
    monkeypatch.setattr(machine_checks, "_installed", lambda p: version if p == "deepspeed" else installed(p))


def doctor_says(capsys) -> tuple[int, str]:
    code = cli.main(["doctor"])
    return code, capsys.readouterr().out


def test_on_a_sound_machine_nothing_is_broken(forked_ranks, capsys, monkeypatch):
    fake_deepspeed(monkeypatch, "0.19.8")
    code, printed = doctor_says(capsys)
    assert code == 0, printed
    assert "nothing is broken" in printed and "bit-identical to the reference implementation" in printed
    assert f"torch          {torch.__version__}" in printed
    ranks = torch.cuda.device_count() or 2
    assert f"{ranks} ranks: sums are right" in printed


def test_no_compiler_is_a_note_with_its_remedy(no_ranks, no_compiler, monkeypatch, capsys):
    fake_deepspeed(monkeypatch, "0.19.8")
    code, printed = doctor_says(capsys)
    assert code == 0, printed
    assert "note    CPU step" in printed and "/nowhere/cc did not compile it" in printed
    assert "install gcc or clang, or set CC" in printed
    if not torch.cuda.is_available():
        assert "cpu, bit-identical to the reference implementation" in printed  # the step that is used instead


def test_a_deepspeed_out_of_range_is_broken(no_ranks, monkeypatch, capsys):
    fake_deepspeed(monkeypatch, "0.15.0")
    code, printed = doctor_says(capsys)
    assert code == 1
    assert "broken  deepspeed" in printed and "DeepSpeed 0.15.0 is installed" in printed
    assert "pip install 'deepspeed>=0.19.8,<0.20'" in printed and "1 broken" in printed


def test_an_old_torch_is_broken(monkeypatch):
    monkeypatch.setattr(machine_checks.torch, "__version__", "2.4.1+cu121")
    assert machine_checks.python_and_torch()[1] == Finding(
        "torch", BROKEN, "2.4.1+cu121", "torch 2.11 or newer is needed"
    )


@pytest.mark.parametrize(("version", "state"), [("2.11.0+cu130", OK), ("2.15.0", OK), ("2.16.0", NOTE)])
def test_a_torch_that_was_not_tested_is_noted(version, state, monkeypatch):
    monkeypatch.setattr(machine_checks.torch, "__version__", version)
    assert machine_checks.python_and_torch()[1].state == state


@pytest.mark.parametrize(("version", "state"), [("3.6.0", OK), ("3.9.0", OK), ("3.10.0", NOTE), ("2.3.1", NOTE)])
def test_triton_versions_that_torch_does_not_pin_are_noted(version, state, monkeypatch):
    monkeypatch.setattr(machine_checks, "_installed", lambda package: version)
    assert machine_checks.triton()[0].state == state


def test_a_driver_under_a_cpu_build_of_torch_is_broken(monkeypatch):
    monkeypatch.setattr(machine_checks, "_driver_version", lambda: "580.65")
    monkeypatch.setattr(machine_checks.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine_checks.torch.version, "cuda", None)
    found = machine_checks.gpus()[0]
    assert found.state == BROKEN and "is a CPU build" in found.fact and "CUDA build of torch" in found.remedy


def test_a_kernel_that_differs_by_one_bit_is_broken(no_ranks, monkeypatch, capsys):
    def wrong(tensors, grads, scalars, *, backend):
        lion_update_(tensors, grads, scalars, backend=backend)
        if tensors.mains is not None:
            tensors.mains[-1][-1] ^= 1

    monkeypatch.setattr(machine_checks, "CHECKS", (functools.partial(machine_checks.kernels, wrong),))
    code, printed = doctor_says(capsys)
    assert code == 1
    assert "differs from the reference implementation in bf16 split" in printed
    assert "do not train on this machine" in printed


@pytest.mark.parametrize("storage", ["fp32 with an average", "bf16 split with an average", "bf16 none with an average"])
def test_a_kernel_of_the_average_that_differs_by_one_bit_is_broken(storage):
    dtype, main, _ = machine_checks.KERNEL_STORAGES[storage]
    place = itertools.count()  # another one in each step, or the second flip might undo the first

    def wrong(tensors, grads, scalars, *, backend):
        lion_update_(tensors, grads, scalars, backend=backend)
        is_meant = tensors.averages is not None and tensors.params[0].dtype == dtype
        if is_meant and (tensors.mains is None) == (main is None):
            tensors.averages[-1].view(torch.int16)[2 * next(place)] ^= 1  # of fp32 the lower half

    found = machine_checks.kernels(wrong)[0]
    assert found.state == BROKEN
    assert found.fact.endswith(f"differs from the reference implementation in {storage}")


def test_a_kernel_that_fails_is_broken():
    def fail(*_args, **_settings):
        raise RuntimeError("Failed to find C compiler")

    found = machine_checks.kernels(fail)[0]
    assert found.state == BROKEN and "RuntimeError: Failed to find C compiler" in found.fact and found.remedy


def test_a_check_that_fails_itself_is_a_line_of_the_report(no_ranks, monkeypatch, capsys):
    def explode():
        raise OSError("nvidia-smi hangs")

    monkeypatch.setattr(machine_checks, "CHECKS", (explode,))
    code, printed = doctor_says(capsys)
    assert code == 1 and "OSError: nvidia-smi hangs" in printed


def dying_rank(rank: int, _ranks: int, _backend: str, _folder: str) -> None:
    if rank == 1:
        os._exit(3)
    raise TimeoutError("rank 0 waits for rank 1 in vain")


def test_a_rank_that_dies_in_a_collective_is_broken(forked_ranks, monkeypatch):
    monkeypatch.setattr(collective_check, "_own_rank", dying_rank)
    found = collective_check.on_own_ranks()[0]
    assert found.state == BROKEN and "failed on rank" in found.fact and "network interface" in found.remedy


def wrong_gather() -> str:
    original = collective_check.collectives.all_gather
    collective_check.collectives.all_gather = lambda flat, shard, group: lambda: None
    try:
        return collective_check.measure(torch.device("cpu"))
    except RuntimeError as error:
        return str(error)
    finally:
        collective_check.collectives.all_gather = original


def test_collectives_that_give_wrong_results_are_noticed(gloo):
    assert gloo.run(2, wrong_gather)[0] == "an all-gather of torch.float32 mixed up the ranks' parts on rank 0"


def test_remedies_stand_below_their_facts():
    printed = report([Finding("one", OK, "fine"), Finding("three", NOTE, "slow", "do this")])
    assert printed == ("ok      one    fine\nnote    three  slow\n               do this\n\nnothing is broken, 1 note")


def under_torchrun(folder: Path, on_rank_1: str) -> subprocess.CompletedProcess:
    """``lion-dist doctor`` on two ranks, of which the second first executes ``on_rank_1``."""
    program = folder / "program.py"
    program.write_text(
        "import os, sys\nfrom lion_dist.cli import collective_check, machine_checks, main\n"
        "from lion_dist.cli.findings import BROKEN, Finding\n"
        f"if os.environ['RANK'] == '1':\n    {on_rank_1}\n"
        "sys.exit(main(['doctor']))\n"
    )
    return subprocess.run(
        jobs.torchrun(2, program), capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )


@pytest.mark.slow
def test_under_torchrun_the_first_rank_reports_for_all(tmp_path):
    done = under_torchrun(tmp_path, "machine_checks.CHECKS = (lambda: [Finding('disk', BROKEN, 'full', 'delete')],)")
    assert done.returncode == 1
    assert done.stdout.count("sums are right") == 1
    assert "broken  disk, rank 1 on " in done.stdout and done.stdout.count("delete") == 1


@pytest.mark.slow
def test_under_torchrun_each_rank_reports_where_they_cannot_talk(tmp_path):
    done = under_torchrun(tmp_path, "collective_check.measure = lambda device: 1 / 0")
    assert done.returncode == 1
    assert "rank 1 on " in done.stdout and "ZeroDivisionError" in done.stdout
    assert "broken  collectives, rank 0 on " in done.stdout


@pytest.mark.parametrize(
    ("apart", "state", "said"),
    [
        ([], OK, "all GPUs read each other's"),
        ([(0, 2)], NOTE, "GPU 0 cannot read the memory of GPU 2"),
        ([(1, 0), (1, 2)], NOTE, "GPU 1 cannot read the memory of GPU 0, nor 1 other pairs"),
    ],
)
def test_gpus_that_cannot_read_each_other_are_noted(apart, state, said, monkeypatch):
    monkeypatch.setattr(machine_checks.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(machine_checks.torch.cuda, "can_device_access_peer", lambda i, j: (i, j) not in apart)
    (found,) = machine_checks.peer_memory()
    assert (found.state, found.fact) == (state, said)


def test_one_gpu_has_no_peers(monkeypatch):
    monkeypatch.setattr(machine_checks.torch.cuda, "device_count", lambda: 1)
    assert machine_checks.peer_memory() == []
