"""The step on the CPU in C: ``native.c``, compiled at the first step (``compiled_library.py``) and kept.

PyTorch operations cannot fuse: in cache-sized chunks (``eager.py``, used where there is no compiler) they take about
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

from lion_dist.cpu_backend import compiled_library
from lion_dist.kernels.reference import StepScalars, random_keys_int

SOURCE = Path(__file__).with_suffix(".c")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int16: 3, None: 4}
PIECES_PER_THREAD = 8
CAUTIOUS, CAUTIOUS_DECAY = 1, 2  # terms of a step's rule
THREAD_NUMEL = 1 << 18  # a second thread is worth its start from about this many elements on


class _Scalars(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("lr", "decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2")),
        ("grad_scale", ctypes.c_float),
        ("disagreeing_lr", ctypes.c_float),
        *((name, ctypes.c_float) for name in ("ema_decay", "one_minus_ema_decay")),
        ("key_1", ctypes.c_uint32),
        ("key_2", ctypes.c_uint32),
        ("rule", ctypes.c_int32),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, or None, said once, where it cannot be made."""
    try:
        loaded = compiled_library.load(SOURCE, symbols=["lion_update", "lion_count_aligned"])
    except compiled_library.NoLibraryError as problem:
        warnings.warn(
            f"lion_dist: {problem}, so CPU tensors are updated by PyTorch operations, with the same bits and two to "
            "seven times slower. Install gcc or clang (or set CC) to change that.",
            stacklevel=2,
        )
        return None
    loaded.lion_update.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 6
    loaded.lion_update.argtypes += [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int64]
    loaded.lion_update.restype = None
    loaded.lion_count_aligned.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int] * 2 + [ctypes.c_void_p, ctypes.c_int64]
    loaded.lion_count_aligned.restype = ctypes.c_int64
    return loaded


@functools.cache
def threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="lion_dist")


os.register_at_fork(after_in_child=threads.cache_clear)  # a forked child has none of its parent's threads


def update(
    tensors, grads, scalars: StepScalars, *, grad_scale, skip, active, seed, cautious_lrs=None, cautious_wd=False
) -> None:
    """Arguments as ``lion_update_``'s, on the CPU; ``library()`` is not None."""
    if skip is not None and skip.item() != 0:
        return
    rounding, stochastic = int(tensors.stochastic_momentum), tensors.is_stochastic
    columns = (tensors.params, tensors.mains, tensors.exp_avgs, grads, tensors.averages)
    types = [TYPES[None if column is None else column[0].dtype] for column in columns]
    sizes = [0 if column is None else column[0].element_size() for column in columns]
    calls = []
    rule = CAUTIOUS * (cautious_lrs is not None) | CAUTIOUS_DECAY * cautious_wd
    plain = _scalars(scalars, grad_scale, rule)
    if tensors.ema_decay is not None:
        plain.ema_decay, plain.one_minus_ema_decay = tensors.ema_decay, 1.0 - tensors.ema_decay
    # By completed steps and cautious learning rates; None without.
    structs: dict[tuple, _Scalars] = {(None, None): plain}
    lrs = [None] * len(tensors.numels) if cautious_lrs is None else list(map(tuple, cautious_lrs.tolist()))
    piece = _piece_numel(tensors)
    for i, numel in enumerate(tensors.numels):
        if active is not None and active[i].item() == 0:
            continue
        addresses = [0 if column is None else column[i].data_ptr() for column in columns]
        first = tensors.index_starts[i] if stochastic else 0
        step = int(tensors.steps[i]) if stochastic else None
        if (step, lrs[i]) not in structs:
            keys = (0, 0) if step is None else random_keys_int(seed, step)
            structs[step, lrs[i]] = _of_tensor(plain, keys, lrs[i])
        struct = ctypes.byref(structs[step, lrs[i]])
        for start in range(0, numel, piece):
            here = [address + start * size for address, size in zip(addresses, sizes, strict=True)]
            calls.append((*here, *types, rounding, struct, first + start, min(piece, numel - start)))
    _call(library().lion_update, calls, sum(tensors.numels))


def count_aligned(tensors, grads, scalars: StepScalars, *, grad_scale) -> torch.Tensor:
    """Arguments as ``count_aligned_elements``'s, on the CPU; ``library()`` is not None."""
    struct = ctypes.byref(_scalars(scalars, grad_scale, 0))
    columns = (tensors.exp_avgs, grads)
    types = [TYPES[column[0].dtype] for column in columns]
    piece = _piece_numel(tensors)
    calls, owners = [], []
    for i, numel in enumerate(tensors.numels):
        for start in range(0, numel, piece):
            here = [column[i].data_ptr() + start * column[i].element_size() for column in columns]
            calls.append((*here, *types, struct, min(piece, numel - start)))
            owners.append(i)
    counts = [0] * len(tensors.numels)
    for i, count in zip(owners, _call(library().lion_count_aligned, calls, sum(tensors.numels)), strict=True):
        counts[i] += count
    return torch.tensor(counts)


def _piece_numel(tensors) -> int:
    """Elements of one call: several calls a thread, so that one that is held up does not hold up the step."""
    return max(THREAD_NUMEL, -(-sum(tensors.numels) // (PIECES_PER_THREAD * torch.get_num_threads())))


def _call(function, calls: list[tuple], numel: int) -> list:
    """What ``function`` returns for each of ``calls``, by as many threads as ``numel`` elements are worth."""
    if len(calls) == 1 or numel <= THREAD_NUMEL or torch.get_num_threads() == 1:
        return [function(*call) for call in calls]
    return list(threads(torch.get_num_threads()).map(lambda call: function(*call), calls))


def _scalars(scalars: StepScalars, grad_scale, rule: int) -> _Scalars:
    return _Scalars(
        float(scalars.lr),
        float(scalars.decay),
        scalars.beta1,
        1.0 - scalars.beta1,
        scalars.beta2,
        1.0 - scalars.beta2,
        1.0 if grad_scale is None else grad_scale.item(),
        rule=rule,
    )


def _of_tensor(scalars: _Scalars, keys: tuple[int, int], cautious_lrs: tuple[float, float] | None) -> _Scalars:
    """``scalars`` with what differs from one tensor to the next."""
    result = _Scalars.from_buffer_copy(scalars)
    result.key_1, result.key_2 = keys
    if cautious_lrs is not None:
        result.lr, result.disagreeing_lr = cautious_lrs
    return result
