"""What launching asks of a kernel beyond compiling it."""

import inspect

import pytest

pytest.importorskip("triton")

from lion_dist.kernels import coded_update_triton, codes_triton, statistics_triton, triton_kernels

KERNELS = {
    name: function.fn
    for module in (triton_kernels, statistics_triton, codes_triton, coded_update_triton)
    for name, function in vars(module).items()
    if name.endswith("_kernel") and hasattr(function, "fn")
}


@pytest.mark.parametrize("name", KERNELS)
def test_no_argument_has_a_name_that_tritons_launcher_uses_itself(name):
    """It writes ``params = {...}`` before it looks at the arguments, so one of that name arrives as this dict."""
    assert not {"params", "specialization", "options"} & set(inspect.signature(KERNELS[name]).parameters)
