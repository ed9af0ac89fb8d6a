"""Compile the statistics kernel for sm_90 where there is no GPU, and print what is in its PTX as JSON.

A process of its own, as ``compile_ahead.py``: ``python -m tests.metrics.compile_statistics_ahead``.
"""

from __future__ import annotations

import json

import torch

from lion_dist.metrics import statistics_triton
from lion_dist.triton_backend import launch
from lion_dist.triton_backend.launch import TL_DTYPES
from tests.kernels.cases import Storage
from tests.kernels.compile_ahead import SCALARS, VARIANTS, compile_for_hopper, count_instructions

TABLES = {"rows": "*i64", "grads": "*i64", "first_blocks": "*i32", "search_table": "*i32", "sums_of_blocks": "*fp64"}


def compile_kernel(storage: Storage, grad_dtype: torch.dtype, all_arguments: bool):
    function, shape = statistics_triton._statistics_kernel, statistics_triton.LAUNCH_SHAPE
    types = TABLES | dict.fromkeys(SCALARS, "fp32") | {"seed_key": "i32"}
    if all_arguments:
        types |= dict.fromkeys(["lr", "decay", "grad_scale", "active"], "*fp32")
    constants = {
        "PARAM_DTYPE": TL_DTYPES[storage.param],
        "MAIN_DTYPE": None if storage.main is None else TL_DTYPES[storage.main],
        "EXP_AVG_DTYPE": TL_DTYPES[storage.exp_avg],
        "GRAD_DTYPE": TL_DTYPES[grad_dtype],
        "SCALARS_ON_DEVICE": all_arguments,
        "STRIDE": launch.SEARCH_STRIDE,
        "BLOCK": shape.block,
        "PIECE": shape.piece,
    }
    return compile_for_hopper(function, types, constants, shape.num_warps)


def main() -> None:
    result = {}
    for name, (storage, grad_dtype) in VARIANTS.items():
        for all_arguments in (False, True):
            found = count_instructions(compile_kernel(storage, grad_dtype, all_arguments))
            result[f"{name}, {'most' if all_arguments else 'fewest'} arguments"] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()
