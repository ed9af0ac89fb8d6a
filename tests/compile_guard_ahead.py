"""Compile the spike guard's kernel for sm_90 where there is no GPU, and print what is in its PTX as JSON.

``python -m tests.compile_guard_ahead``
"""

import json

from lion_dist.spike_guard import watch_triton
from tests.kernels.compile_ahead import compile_for_hopper, count_instructions

if __name__ == "__main__":
    types = {"state": "*fp64", "norm": "*fp32", "loss": "*bf16", "skip": "*fp32", "verdict": "*fp32"}
    types["clip_coefficient"] = "*fp32"
    constants = {"SIGMAS": 6.0, "LEAST_STD": 1e-6, "WINDOW": 100, "BLOCK": 128}
    compiled = compile_for_hopper(watch_triton._verdict_kernel, types, constants, num_warps=1)
    print(json.dumps(count_instructions(compiled)))
