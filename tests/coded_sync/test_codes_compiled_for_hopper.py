"""What is in the machine code of the update codes for sm_90. No GPU is needed: compiling ahead of time is enough."""

import pytest

pytestmark = pytest.mark.slow  # half a minute of compiling; tests/kernels/test_compiled_for_hopper.py is a quick one
NAMES = ["main params under bf16", "main params under fp16", "main params, split", "fp32", "none"]


@pytest.fixture(scope="module")
def instructions(compiled_by) -> dict[str, dict[str, int]]:
    return compiled_by("tests.coded_sync.compile_codes_ahead")


@pytest.mark.parametrize("name", NAMES)
def test_replay_reads_and_writes_each_stream_once_in_wide_accesses(instructions, name):
    """16 bytes a thread: one access a stream, three streams with main params and five without."""
    found, streams = instructions[f"replay: {name}"], 3 if name.startswith("main") else 5
    assert found["ld.global.v4.b32"] == found["st.global.v4.b32"] == streams


@pytest.mark.parametrize("name, streams, tensors", [("main params, split", 3, 4), ("fp32", 5, 3), ("none", 5, 3)])
def test_the_update_that_encodes_reads_and_writes_each_stream_once_in_wide_accesses(
    instructions, name, streams, tensors
):
    """Parameters are loaded twice, by the update and by the encoder; the second load finds them in the cache."""
    found = instructions[f"update and encode: {name}"]
    assert found["ld.global.v4.b32"] == streams * (tensors + 1)
    assert found["st.global.v4.b32"] == streams * (tensors - 1)


@pytest.mark.parametrize("kernel", ["encode", "replay", "update and encode"])
@pytest.mark.parametrize("name", NAMES)
def test_no_operation_is_fused_or_free_to_be(instructions, kernel, name):
    """Owner and replica must round alike: an unrounded ``mul.f32`` may still be contracted below PTX."""
    found = instructions[f"{kernel}: {name}"]
    assert not [op for op in found if op.startswith("fma.") or op in ("mul.f32", "add.f32", "sub.f32")]
    assert found["mul.rn.f32"]
