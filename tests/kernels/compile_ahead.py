"""Compile the kernels for sm_90 where there is no GPU, and print what is in their PTX as JSON.

A process of its own, because the test session may have imported the kernels for Triton's interpreter:
``python -m tests.kernels.compile_ahead``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lion_dist.triton_backend import cautious, kernels, launch
from lion_dist.triton_backend.launch import TL_DTYPES, LaunchShape
from tests.kernels.cases import BF16, FP16, FP32, INT16, Storage

HOPPER = GPUTarget("cuda", 90, 32)
SCALARS = ("lr", "decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2")
VARIANTS = {
    "own": (Storage(FP32, None, FP32), FP32),
    "own, bf16 momentum": (Storage(FP32, None, BF16), FP32),
    "fp32 main": (Storage(BF16, FP32, BF16), BF16),
    "fp32 main under fp16": (Storage(FP16, FP32, FP32), FP16),
    "split": (Storage(BF16, INT16, BF16), BF16),
    "split, stochastic momentum": (Storage(BF16, INT16, BF16, True), BF16),
    "none": (Storage(BF16, None, BF16), BF16),
    "none, stochastic momentum": (Storage(BF16, None, BF16, True), BF16),
}


# What of a rule is compiled: the precision that is the default, and the one that draws random bits.
RULED = [("split", "list", "cautious"), ("split", "flat", "both"), ("none", "list", "cautious decay")]
COUNTED = ("own", "split")
# With an average of the weights.
AVERAGED = {
    "split, fp32 average": (Storage(BF16, INT16, BF16, average=FP32), BF16),
    "none, bf16 average": (Storage(BF16, None, BF16, average=BF16), BF16),
    "own, bf16 average": (Storage(FP32, None, FP32, average=BF16), FP32),
}


RULES = {"plain": (False, False), "cautious": (True, False), "cautious decay": (False, True), "both": (True, True)}


def launch_shape(kernel: str, storage: Storage, grad_dtype: torch.dtype, rule: str = "plain") -> LaunchShape:
    others = (storage.main or storage.param, storage.average or storage.param)
    widest = max(dtype.itemsize for dtype in (storage.param, storage.exp_avg, grad_dtype, *others))
    kind = {"random": storage.is_stochastic, "average": storage.average is not None}
    return launch.shape_for(widest, **kind, is_list=kernel == "list", cautious_wd=RULES[rule][1])


def compile_kernel(kernel: str, storage: Storage, grad_dtype: torch.dtype, rule: str = "plain"):
    """``kernel``: "flat", with the fewest arguments that a step can have, or "list", with all there are."""
    is_cautious, cautious_wd = RULES[rule]
    shape = launch_shape(kernel, storage, grad_dtype, rule)
    types = dict.fromkeys(SCALARS, "fp32") | {"seed_key": "i32"} | ({"cautious_lrs": "*fp32"} if is_cautious else {})
    constants = {
        "SCALARS_ON_DEVICE": kernel == "list",
        "CAUTIOUS_WD": cautious_wd,
        "STOCHASTIC_MOMENTUM": storage.stochastic_momentum,
        "STOCHASTIC_AVERAGE": storage.average == BF16,
        "BLOCK": shape.block,
        "MASKED_BLOCK": launch.masked_block(shape),
        "VECTOR": shape.vector,
    }
    tl_types = {
        "PARAM": TL_DTYPES[storage.param],
        "MAIN": None if storage.main is None else TL_DTYPES[storage.main],
        "EXP_AVG": TL_DTYPES[storage.exp_avg],
        "GRAD": TL_DTYPES[grad_dtype],
        "AVERAGE": None if storage.average is None else TL_DTYPES[storage.average],
    }
    types |= {} if storage.average is None else dict.fromkeys(("ema_decay", "one_minus_ema_decay"), "fp32")
    if kernel == "flat":
        function = kernels._flat_kernel
        types |= {name.lower(): f"*{ty}".replace("int", "i") for name, ty in tl_types.items() if ty is not None}
        types |= {"numel": "i64", "index_start": "i64"} | ({"step": "*i64"} if storage.is_stochastic else {})
    else:
        function = kernels._list_kernel
        types |= {"rows": "*i64", "grads": "*i64", "first_blocks": "*i32", "search_table": "*i32"}
        types |= dict.fromkeys(["lr", "decay", "grad_scale", "skip", "active"], "*fp32")
        constants |= {f"{name}_DTYPE": ty for name, ty in tl_types.items()}
        constants["STRIDE"] = launch.SEARCH_STRIDE
    return compile_for_hopper(function, types, constants, shape.num_warps)


def compile_count(storage: Storage, grad_dtype: torch.dtype):
    """The kernel that counts for a cautious step, with all arguments that it can have."""
    shape = launch_shape("list", storage, grad_dtype)
    block, piece = cautious.count_shape(shape)
    types = {"rows": "*i64", "grads": "*i64", "first_blocks": "*i32", "search_table": "*i32", "counts": "*i64"}
    types |= {"beta1": "fp32", "one_minus_beta1": "fp32", "grad_scale": "*fp32"}
    constants = {"EXP_AVG_DTYPE": TL_DTYPES[storage.exp_avg], "GRAD_DTYPE": TL_DTYPES[grad_dtype]}
    constants |= {"STRIDE": launch.SEARCH_STRIDE, "BLOCK": block, "PIECE": piece, "VECTOR": shape.vector}
    return compile_for_hopper(cautious._count_kernel, types, constants, shape.num_warps)


def compile_for_hopper(function, types: dict[str, str], constants: dict, num_warps: int, aligned: Sequence[str] = ()):
    """``function`` with those of its arguments that have ``types``, ``constants`` for others, and None for the rest.

    ``aligned``: arguments that a launch finds divisible by 16.
    """
    names = function.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {name: constants.get(name) for name in names if name not in types}
    found = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types and name in aligned}
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = end_with_ptx
        return triton.compile(ASTSource(function, signature, constants, found), target=HOPPER, options=options)


def end_with_ptx(_backend=None, stages=None, *_) -> tuple[str, str] | None:
    """Leave out ptxas, whose machine code nobody reads: a tenth of the time. Triton's protocol: the same function,
    without arguments, says what is added to the key and the hash that compiled kernels are kept under."""
    if stages is None:
        return "end with PTX", "end with PTX"
    stages["cubin"] = lambda _ptx, _metadata: b""


def count_instructions(compiled) -> Counter:
    """Memory accesses and arithmetic, by name with all suffixes."""
    return Counter(re.findall(r"\t(?:@%p\d+ )?((?:ld|st|fma|mul|add|sub)\.[\w.:]+)", compiled.asm["ptx"]))


def main() -> None:
    result = {}
    for kernel in ("flat", "list"):
        for name, (storage, grad_dtype) in (VARIANTS | AVERAGED).items():
            result[f"{kernel}: {name}"] = count_instructions(compile_kernel(kernel, storage, grad_dtype))
    for name, kernel, rule in RULED:
        result[f"{rule}, {kernel}: {name}"] = count_instructions(compile_kernel(kernel, *VARIANTS[name], rule))
    for name in COUNTED:
        result[f"count: {name}"] = count_instructions(compile_count(*VARIANTS[name]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
