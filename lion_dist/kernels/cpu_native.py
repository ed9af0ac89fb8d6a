"""The step on the CPU in C: ``cpu_native.c``, compiled at the first step (``compiled_library.py``) and kept.

PyTorch operations cannot fuse: in cache-sized chunks (``cpu.py``, used where there is no compiler) they take about
twice the time, and each of their OpenMP barriers waits for the slowest thread. Here every thread runs through its own
range of elements once, called through ctypes, which lets go of the interpreter lock.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lion_dist.kernels import compiled_library
from lion_dist.kernels.reference import StepScalars, random_keys_int

SOURCE = Path(__file__).with_suffix(".c")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int16: 3, None: 4}
PIECES_PER_THREAD = 8
THREAD_NUMEL = 1 << 18  # a second thread is worth its start from about this many elements on


class _Scalars(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("lr", "decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2")),
        ("grad_scale", ctypes.c_float),
        ("key_1", ctypes.c_uint32),
        ("key_2", ctypes.c_uint32),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, or None, said once, where it cannot be made."""
    try:
        loaded = compiled_library.load(SOURCE, symbols=["lion_update"])
    except compiled_library.NoLibraryError as problem:
        warnings.warn(
            f"lion_dist: {problem}, so CPU tensors are updated by PyTorch operations, with the same bits and about "
            "half as fast. Install gcc or clang (or set CC) to change that.",
            stacklevel=2,
        )
        return None
    loaded.lion_update.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int] * 5
    loaded.lion_update.argtypes += [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int64]
    loaded.lion_update.restype = None
    return loaded


@functools.cache
def threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="lion_dist")


os.register_at_fork(after_in_child=threads.cache_clear)  # a forked child has none of its parent's threads


def update(tensors, grads, scalars: StepScalars, *, grad_scale, skip, active, seed) -> None:
    """Arguments as ``lion_update_``'s, on the CPU; ``library()`` is not None."""
    if skip is not None and skip.item() != 0:
        return
    rounding = int(tensors.stochastic_momentum)
    columns = (tensors.params, tensors.mains, tensors.exp_avgs, grads)
    types = [TYPES[None if column is None else column[0].dtype] for column in columns]
    sizes = [0 if column is None else column[0].element_size() for column in columns]
    calls = []
    structs = {None: _scalars(scalars, grad_scale)}  # by completed steps, None without random bits
    # Several pieces a thread, so that one that is held up does not hold up the step.
    piece = max(THREAD_NUMEL, -(-sum(tensors.numels) // (PIECES_PER_THREAD * torch.get_num_threads())))
    for i, numel in enumerate(tensors.numels):
        if active is not None and active[i].item() == 0:
            continue
        addresses = [0 if column is None else column[i].data_ptr() for column in columns]
        first = tensors.index_starts[i] if tensors.is_stochastic else 0
        step = int(tensors.steps[i]) if tensors.is_stochastic else None
        if step not in structs:
            structs[step] = _with_keys(structs[None], random_keys_int(seed, step))
        struct = ctypes.byref(structs[step])
        for start in range(0, numel, piece):
            here = [address + start * size for address, size in zip(addresses, sizes, strict=True)]
            calls.append((*here, *types, rounding, struct, first + start, min(piece, numel - start)))
    lion = library().lion_update
    if len(calls) == 1 or sum(tensors.numels) <= THREAD_NUMEL or torch.get_num_threads() == 1:
        for call in calls:
            lion(*call)
    else:
        list(threads(torch.get_num_threads()).map(lambda call: lion(*call), calls))


def _scalars(scalars: StepScalars, grad_scale) -> _Scalars:
    return _Scalars(
        float(scalars.lr),
        float(scalars.decay),
        scalars.beta1,
        1.0 - scalars.beta1,
        scalars.beta2,
        1.0 - scalars.beta2,
        1.0 if grad_scale is None else grad_scale.item(),
    )


def _with_keys(scalars: _Scalars, keys: tuple[int, int]) -> _Scalars:
    result = _Scalars.from_buffer_copy(scalars)
    result.key_1, result.key_2 = keys
    return result
