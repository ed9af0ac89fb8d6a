"""What is in the machine code for sm_90 of the kernels that add up. No GPU is needed."""

import pytest

NAMES = [f"{kernel}, {dtype}" for kernel in ("squares", "ordered sum") for dtype in ("torch.float32", "torch.bfloat16")]


@pytest.fixture(scope="module")
def instructions(compiled_by) -> dict[str, dict[str, int]]:
    return compiled_by("tests.peer_memory.compile_sums_ahead")


@pytest.mark.parametrize("name, accesses", list(zip(NAMES, (16, 8, 16, 8), strict=True)))
def test_each_byte_is_read_once_16_at_a_time(instructions, name, accesses):
    """8,192 elements of 128 threads; 2,048 elements of each of four addends. All loads come before they are needed."""
    assert instructions[name]["ld.global.v4.b32"] == accesses


@pytest.mark.parametrize("name, accesses", list(zip(NAMES[2:], (4, 2), strict=True)))
def test_sums_are_written_16_bytes_at_a_time(instructions, name, accesses):
    assert instructions[name]["st.global.v4.b32"] == accesses


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_spilled(instructions, name):
    assert not [op for op in instructions[name] if ".local" in op]
