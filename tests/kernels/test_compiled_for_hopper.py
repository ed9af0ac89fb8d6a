"""What is in the kernels' machine code for sm_90. No GPU is needed: compiling ahead of time is enough."""

from collections import Counter

import pytest

from lion_dist.triton_backend.cautious import PIECES
from lion_dist.triton_backend.launch import LaunchShape
from tests.kernels.compile_ahead import AVERAGED, COUNTED, RULED, VARIANTS, launch_shape

KINDS = VARIANTS | AVERAGED
NAMES = [f"{kernel}: {name}" for kernel in ("flat", "list") for name in KINDS]
RULED_NAMES = [f"{rule}, {kernel}: {name}" for name, kernel, rule in RULED]
COUNT_NAMES = [f"count: {name}" for name in COUNTED]


@pytest.fixture(scope="module")
def instructions(compiled_by) -> dict[str, dict[str, int]]:
    return compiled_by("tests.kernels.compile_ahead")


def shape_of(name: str) -> LaunchShape:
    """``name``: of NAMES or RULED_NAMES."""
    kernel, precision = name.split(": ")
    rule, _, kernel = kernel.rpartition(", ")
    return launch_shape(kernel, *KINDS[precision], rule or "plain")


def elements_a_thread(name: str) -> int:
    shape = shape_of(name)
    return shape.block // (32 * shape.num_warps)


@pytest.mark.parametrize("name", NAMES + RULED_NAMES)
def test_whole_blocks_move_in_wide_accesses_each_byte_once(instructions, name):
    """16 bytes a thread and access; 8 for the 16-bit tensors of a kernel that also touches 32-bit ones, and where a
    thread has no more than four elements of 16 bits."""
    storage, grad_dtype = KINDS[name.split(": ")[1]]
    shape = shape_of(name)
    per_thread = elements_a_thread(name)
    kept = (storage.main or storage.param, storage.exp_avg, storage.average)
    state = [dtype for dtype in kept if dtype is not None]
    read, written = [*state, grad_dtype], state
    if storage.main is not None:  # the low-precision copy is written beside the main params, and half of a split
        written = [storage.param, *written]
        if storage.main.itemsize == 2:
            read = [storage.param, *read]
    expected = Counter()
    for direction, dtypes in (("ld", read), ("st", written)):
        for dtype in dtypes:
            at_once = min(shape.vector, per_thread)
            width = {16: "v4", 8: "v2"}[at_once * dtype.itemsize]
            expected[f"{direction}.global.{width}.b32"] += per_thread // at_once
    found = {name: count for name, count in instructions[name].items() if ".v4." in name or ".v2." in name}
    assert found == expected
    assert per_thread == 4 or found["ld.global.v4.b32"] and found["st.global.v4.b32"]


@pytest.mark.parametrize("name", NAMES + RULED_NAMES + COUNT_NAMES)
def test_no_operation_is_fused_or_free_to_be(instructions, name):
    """An unrounded ``mul.f32`` may still be contracted below PTX; ``mul.rn.f32`` may not."""
    assert not [op for op in instructions[name] if op.startswith("fma.") or op in ("mul.f32", "add.f32")]
    assert instructions[name]["mul.rn.f32"] and instructions[name]["add.rn.f32"]


@pytest.mark.parametrize("name", NAMES + RULED_NAMES)
def test_nothing_goes_through_local_or_shared_memory(instructions, name):
    assert not [op for op in instructions[name] if ".local" in op or ".shared" in op]


@pytest.mark.parametrize("name", RULED_NAMES)
def test_a_rule_moves_what_the_plain_step_moves(instructions, name):
    """No byte of a tensor more, an element; what it reads beside is two learning rates a tensor."""
    rule, plain = name.split(", ")
    times = elements_a_thread(name) // elements_a_thread(plain)
    wide = lambda op: op.startswith(("ld.global.v", "st.global.v"))  # noqa: E731
    accesses = {op: n for op, n in instructions[name].items() if wide(op)}
    assert accesses == {op: n * times for op, n in instructions[plain].items() if wide(op)}
    loads = {
        op: n for op, n in instructions[name].items() if op.startswith(("ld.global", "st.global")) and not wide(op)
    }
    of_plain = {op: n for op, n in instructions[plain].items() if op.startswith(("ld.global", "st.global"))}
    more = {op: n - of_plain.get(op, 0) for op, n in loads.items() if n != of_plain.get(op, 0)}
    assert more.keys() <= ({"ld.global.b32"} if rule != "cautious decay" else set())


@pytest.mark.parametrize("name", COUNT_NAMES)
def test_counting_reads_momentum_and_gradient_once_in_wide_accesses(instructions, name):
    storage, grad_dtype = VARIANTS[name.split(": ")[1]]
    shape = launch_shape("list", storage, grad_dtype)
    accesses = PIECES * shape.block // (32 * shape.num_warps) // shape.vector
    assert instructions[name]["ld.global.v4.b32"] == 2 * accesses
    assert not [op for op in instructions[name] if ".local" in op]
