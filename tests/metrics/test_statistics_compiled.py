"""What is in the statistics kernel's machine code for sm_90. No GPU is needed."""

from collections import Counter

import pytest

from tests.kernels.compile_ahead import VARIANTS

NAMES = [f"{name}, {which} arguments" for name in VARIANTS for which in ("fewest", "most")]


@pytest.fixture(scope="module")
def instructions(compiled_by) -> dict[str, dict[str, int]]:
    return compiled_by("tests.metrics.compile_statistics_ahead")


@pytest.mark.parametrize("name", NAMES)
def test_whole_pieces_are_read_in_wide_accesses_each_byte_once(instructions, name):
    """Four elements a thread: 16 bytes of fp32, 8 of what has 16 bits. Nothing but sums is written."""
    storage, grad_dtype = VARIANTS[name.rsplit(", ", 1)[0]]
    read = [storage.main or storage.param, storage.exp_avg, grad_dtype]
    if storage.main is not None and storage.main.itemsize == 2:  # the other half of a split
        read.append(storage.param)
    expected = Counter(f"ld.global.{'v4' if dtype.itemsize == 4 else 'v2'}.b32" for dtype in read)
    found = {op: count for op, count in instructions[name].items() if ".v4." in op or ".v2." in op}
    assert {op: count for op, count in found.items() if "global" in op} == expected
    assert {op for op in instructions[name] if op.startswith("st.global")} == {"st.global.b64"}


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_is_fused_and_nothing_is_spilled(instructions, name):
    ops = instructions[name]
    assert not [op for op in ops if op.startswith("fma.") or op in ("mul.f32", "add.f32") or ".local" in op]
    assert ops["mul.rn.f32"] and ops["mul.rn.f64"]
