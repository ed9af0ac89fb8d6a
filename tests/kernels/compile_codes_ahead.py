"""Compile the kernels of the update codes for sm_90 where there is no GPU, and print what is in their PTX as JSON.

A process of its own, for the reason that ``compile_ahead.py`` gives: ``python -m tests.kernels.compile_codes_ahead``.
"""

from __future__ import annotations

import json
import re
from collections import Counter

from lion_dist.kernels import codes_triton
from lion_dist.kernels.codes import SENARY, TERNARY
from tests.kernels.compile_ahead import compile_for_hopper

VARIANTS = {  # storage: (kind, integer type, layout)
    "main params under bf16": (codes_triton.BF16, "i16", SENARY),
    "main params under fp16": (codes_triton.FP16, "i16", SENARY),
    "fp32": (codes_triton.FP32, "i32", TERNARY),
    "none": (codes_triton.BF16, "i16", TERNARY),
}
KERNELS = {"encode": codes_triton._encode_kernel, "replay": codes_triton._replay_kernel}
POINTERS = {"packed": "u8", "group_rows": "i32", "rates": "fp32", "index_bases": "i64"}
POINTERS |= {"escape_index": "i32", "count": "i32", "stops": "i32"}
SCALARS = dict.fromkeys(["numel", "num_bytes", "rows_a_shard", "own_shard", "capacity"], "i32") | {"stride": "i64"}
INSTRUCTION = r"\t(?:@%p\d+ )?((?:ld|st|fma|mul|add|sub)\.[\w.:]+)"
# What the launcher finds out by itself, at every launch.
ALIGNED = [*POINTERS, "old", "new", "flat", "escape_bits", "keys", "numel", "num_bytes", "stride"]


def compile_kernel(kernel: str, name: str):
    function, (kind, integer, layout) = KERNELS[kernel], VARIANTS[name]
    types = {pointer: f"*{ty}" for pointer, ty in POINTERS.items()} | SCALARS
    types |= dict.fromkeys(["old", "new", "flat", "escape_bits"], f"*{integer}")
    if name == "none":
        types["keys"] = "*i32"
    constants = {"KIND": kind.value, "RADIX": layout.radix, "PER_BYTE": layout.per_byte}
    constants["GROUPS"] = 8 if integer == "i32" else 16
    return compile_for_hopper(function, types, constants, num_warps=4, aligned=ALIGNED)


def main() -> None:
    result = {}
    for kernel in KERNELS:
        for name in VARIANTS:
            found = re.findall(INSTRUCTION, compile_kernel(kernel, name).asm["ptx"])
            result[f"{kernel}: {name}"] = Counter(found)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
