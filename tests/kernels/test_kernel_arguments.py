"""What launching asks of a kernel beyond compiling it."""

import inspect
import operator

import pytest
import torch

pytest.importorskip("triton")

from lion_dist.coded_sync import codes_triton
from lion_dist.coded_sync import update_triton as coded_update_triton
from lion_dist.kernels.reference import StepScalars
from lion_dist.metrics import statistics_triton
from lion_dist.spike_guard import watch_triton
from lion_dist.triton_backend import cautious, kernels, launch
from tests.kernels.cases import BF16, INT16, Case, Storage

KERNELS = {
    name: function.fn
    for module in (
        kernels,
        cautious,
        statistics_triton,
        codes_triton,
        coded_update_triton,
        watch_triton,
    )
    for name, function in vars(module).items()
    if name.endswith("_kernel") and hasattr(function, "fn")
}


@pytest.mark.parametrize("name", KERNELS)
def test_no_argument_has_a_name_that_tritons_launcher_uses_itself(name):
    """It writes ``params = {...}`` before it looks at the arguments, so one of that name arrives as this dict."""
    assert not {"params", "specialization", "options"} & set(inspect.signature(KERNELS[name]).parameters)


class Compiled:
    """Launches nothing, and remembers what it is given."""

    def __init__(self, names: list[str], grid: tuple, arguments: dict):
        self.names, self.launches = names, [(grid, arguments)]

    def __getitem__(self, grid):
        return lambda *values: self.launches.append((grid, dict(zip(self.names, values, strict=True))))


class Kernel:
    """As ``Compiled``; the first launch, by name, compiles it."""

    def __init__(self, names: list[str]):
        self.arg_names, self.compiled = names, []

    def __getitem__(self, grid):
        def launch(num_warps, enable_fp_fusion, **arguments):
            assert not enable_fp_fusion
            self.compiled.append(Compiled(self.arg_names, (*grid, 1, 1), arguments))
            return self.compiled[-1]

        return launch


@pytest.mark.parametrize("average", [None, BF16])
@pytest.mark.parametrize("name, numels", [("_flat_kernel", [5000]), ("_list_kernel", [5000, 0, 70])])
def test_a_compiled_kernel_is_launched_with_the_arguments_that_it_was_compiled_for(monkeypatch, name, numels, average):
    kernel = Kernel(getattr(kernels, name).arg_names)
    monkeypatch.setattr(launch, name, kernel)
    case = Case.make(Storage(BF16, INT16, BF16, average=average), BF16, numels)
    tensors, one, active = case.tensors(), torch.ones(()), torch.ones(len(numels))
    kinds = [{}, {"grad_scale": one}, {"skip": one}, {"active": active}, {"grad_scale": one, "skip": one}]
    kinds += [{"grads": [grad.float() for grad in case.grads]}]
    kinds += [{"scalars": StepScalars.from_group(one, (0.9, 0.99), 0.1)}]
    kinds += [{"cautious_lrs": torch.ones(len(numels), 2)}, {"cautious_wd": True}]
    for kind in kinds * 2:
        launch.update(tensors, **(case.arguments() | kind))
    assert len(kernel.compiled) == len(kinds)
    for first, second in (compiled.launches for compiled in kernel.compiled):
        assert first[0] == second[0] and first[1].keys() == second[1].keys()
        for key, value in first[1].items():
            same = torch.equal if key == "grads" else operator.is_ if isinstance(value, torch.Tensor) else operator.eq
            assert same(second[1][key], value), key


def test_all_tensors_are_counted_in_one_launch_by_the_arguments_that_it_was_compiled_for(monkeypatch):
    kernel = Kernel(cautious._count_kernel.arg_names)
    monkeypatch.setattr(cautious, "_count_kernel", kernel)
    case = Case.make(Storage(BF16, INT16, BF16), BF16, [5000, 0, 70])
    tensors, one = case.tensors(), torch.ones(())
    kinds = [{"grad_scale": None}, {"grad_scale": one}, {"grad_scale": one, "grads": [g.float() for g in case.grads]}]
    for kind in kinds * 2:
        cautious.count_aligned(tensors, **({"grads": case.grads, "scalars": case.scalars} | kind))
    assert len(kernel.compiled) == len(kinds)
    for first, second in (compiled.launches for compiled in kernel.compiled):
        assert first[0] == second[0] and first[1].keys() == second[1].keys()
        for key, value in first[1].items():
            if key not in ("grads", "counts"):  # made anew
                assert value is second[1][key] or value == second[1][key], key


def test_integers_among_the_hyperparameters_make_no_other_kernel():
    for lr, kind in ((0, float), (torch.zeros(()), torch.Tensor)):
        scalars = StepScalars.from_group(lr, (0, 0), 0)
        assert type(scalars.lr) is type(scalars.decay) is kind
        assert type(scalars.beta1) is type(scalars.beta2) is float
