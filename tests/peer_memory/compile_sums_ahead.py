"""Compile the kernels that add up for sm_90 where there is no GPU, and print what is in their PTX as JSON.

A process of its own, as ``compile_ahead.py``: ``python -m tests.peer_memory.compile_sums_ahead``.
"""

from __future__ import annotations

import json

from lion_dist.peer_memory import ordered_sum_triton
from lion_dist.triton_backend import launch, squares
from lion_dist.triton_backend.launch import TL_DTYPES
from tests.kernels.cases import BF16, FP32
from tests.kernels.compile_ahead import compile_for_hopper, count_instructions

TABLES = {"addresses": "*i64", "numels": "*i64", "first_blocks": "*i32", "search_table": "*i32"}


def compile_squares(dtype):
    constants = {
        "DTYPE": TL_DTYPES[dtype],
        "STRIDE": launch.SEARCH_STRIDE,
        "BLOCK": squares.BLOCK,
        "PIECE": squares.PIECE,
    }
    types = TABLES | {"sums_of_blocks": "*fp64"}
    return compile_for_hopper(squares._squares_kernel, types, constants, squares.NUM_WARPS)


def compile_ordered_sum(dtype):
    """Of four ranks; as Triton specializes it on buffers, which begin on 16 bytes."""
    types = dict.fromkeys(["output", "others"], "*bf16" if dtype == BF16 else "*fp32")
    aligned = list(types)
    types |= {"squares": "*fp64", "pieces": "*i64", "piece_of_block": "*i32", "addresses": "*i64", "row_numel": "i64"}
    constants = {"RANK": 1, "RANKS": 4, "ADDS_UP": False, "BLOCK": ordered_sum_triton.BLOCK}
    kernel, warps = ordered_sum_triton._ordered_sum_kernel, ordered_sum_triton.NUM_WARPS
    return compile_for_hopper(kernel, types, constants, warps, aligned=aligned)


def main() -> None:
    result = {}
    for name, compile_kernel in (("squares", compile_squares), ("ordered sum", compile_ordered_sum)):
        for dtype in (FP32, BF16):
            result[f"{name}, {dtype}"] = count_instructions(compile_kernel(dtype))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
