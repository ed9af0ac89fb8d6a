"""Compile the kernels of the update codes for sm_90 where there is no GPU, and print what is in their PTX as JSON.

A process of its own, for the reason that ``compile_ahead.py`` gives:
``python -m tests.coded_sync.compile_codes_ahead``.
"""

from __future__ import annotations

import json

from lion_dist.coded_sync import codes_triton
from lion_dist.coded_sync import update_triton as coded_update_triton
from lion_dist.coded_sync.codes import SENARY, TERNARY
from tests.kernels.compile_ahead import compile_for_hopper, count_instructions

VARIANTS = {  # storage: (kind, type, integer type, main params, layout)
    "main params under bf16": (codes_triton.BF16, "bf16", "i16", "fp32", SENARY),
    "main params under fp16": (codes_triton.FP16, "fp16", "i16", "fp32", SENARY),
    "main params, split": (codes_triton.BF16, "bf16", "i16", "i16", SENARY),
    "fp32": (codes_triton.FP32, "fp32", "i32", None, TERNARY),
    "none": (codes_triton.BF16, "bf16", "i16", None, TERNARY),
}
KERNELS = {
    "encode": codes_triton._encode_kernel,
    "replay": codes_triton._replay_kernel,
    "update and encode": coded_update_triton._update_and_encode_kernel,
}
POINTERS = {"packed": "u8", "group_rows": "i32", "rates": "fp32", "index_bases": "i64"}
POINTERS |= {"escape_index": "i32", "count": "i32", "stops": "i32", "moves": "u8", "grad_scale": "fp32"}
SCALARS = dict.fromkeys(["numel", "num_bytes", "rows_a_shard", "own_shard", "capacity"], "i32") | {"stride": "i64"}
SCALARS |= dict.fromkeys(["beta1", "one_minus_beta1", "beta2", "one_minus_beta2"], "fp32")
STATE = ["param", "main", "exp_avg", "grad"]
# What the launcher finds out by itself, at every launch.
ALIGNED = [*POINTERS, *STATE, "old", "new", "flat", "escape_bits", "keys", "numel", "num_bytes", "stride"]


def compile_kernel(kernel: str, name: str):
    function, (kind, dtype, integer, main, layout) = KERNELS[kernel], VARIANTS[name]
    types = {pointer: f"*{ty}" for pointer, ty in POINTERS.items()} | SCALARS
    types |= dict.fromkeys(["old", "new", "flat", "escape_bits"], f"*{integer}")
    types |= dict.fromkeys(["param", "exp_avg", "grad"], f"*{dtype}")
    if main is not None:
        types["main"] = f"*{main}"
    if name == "none":
        types["keys"] = "*i32"
    constants = {"KIND": kind.value, "RADIX": layout.radix, "PER_BYTE": layout.per_byte, "STOCHASTIC_MOMENTUM": False}
    constants["CAUTIOUS_WD"] = False
    is_wide = integer == "i32" or (kernel == "update and encode" and main == "fp32")
    constants["GROUPS"] = codes_triton.GROUPS[4 if is_wide else 2]
    return compile_for_hopper(function, types, constants, num_warps=4, aligned=ALIGNED)


def main() -> None:
    result = {}
    for kernel in KERNELS:
        for name in VARIANTS:
            result[f"{kernel}: {name}"] = count_instructions(compile_kernel(kernel, name))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
