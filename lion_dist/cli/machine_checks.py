"""What ``lion-dist doctor`` asks of this machine without any other rank: versions, GPUs, compiler, kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable

import torch

from lion_dist.cli.findings import BROKEN, NOTE, OK, Finding
from lion_dist.cpu_backend import native
from lion_dist.integrations.deepspeed import check_version
from lion_dist.kernels.backends import choose_backend
from lion_dist.kernels.reference import StepScalars
from lion_dist.kernels.update import LionTensors, lion_update_

# As docs/guarantees.md says under Versions, and pyproject.toml.
OLDEST_PYTHON, OLDEST_TORCH, FIRST_UNTESTED_TORCH = (3, 11), (2, 11), (2, 16)
OLDEST_TRITON, FIRST_UNTESTED_TRITON = (3, 6), (3, 10)
OLDEST_CAPABILITY_WITH_BF16 = (8, 0)
KERNEL_NUMELS = (1, 63, 4096, 70_001)  # shorter than a vector, than a block, aligned, and neither
KERNEL_STORAGES = {  # name: (param dtype, main dtype or None, dtype of the average of the weights or None)
    "fp32": (torch.float32, None, None),
    "bf16 split": (torch.bfloat16, torch.int16, None),
    "bf16 none": (torch.bfloat16, None, None),
    "fp32 with an average": (torch.float32, None, torch.float32),
    "bf16 split with an average": (torch.bfloat16, torch.int16, torch.float32),
    "bf16 none with an average": (torch.bfloat16, None, torch.bfloat16),
}


def _version(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    parts = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts[:3])


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_and_torch() -> list[Finding]:
    findings = [Finding("python", OK, platform.python_version())]
    if sys.version_info[:2] < OLDEST_PYTHON:
        findings = [Finding("python", BROKEN, platform.python_version(), "python 3.11 or newer is needed")]
    if _version(torch.__version__) < OLDEST_TORCH:
        findings.append(Finding("torch", BROKEN, torch.__version__, "torch 2.11 or newer is needed"))
    elif _version(torch.__version__) >= FIRST_UNTESTED_TORCH:
        findings.append(Finding("torch", NOTE, f"{torch.__version__}, not tested here", "tested: 2.11 to 2.15"))
    else:
        findings.append(Finding("torch", OK, torch.__version__))
    return findings


def triton() -> list[Finding]:
    found = _installed("triton")
    if found is None:
        if not torch.cuda.is_available():
            return [Finding("triton", OK, "not installed; CPUs do not need it")]
        remedy = "several times slower without it: pip install 'lion-dist[triton]'"
        return [Finding("triton", NOTE, "not installed", remedy)]
    if not OLDEST_TRITON <= _version(found) < FIRST_UNTESTED_TRITON:
        return [Finding("triton", NOTE, f"{found}, not tested here", "tested: 3.6 to 3.9, what torch itself pins")]
    return [Finding("triton", OK, found)]


def deepspeed() -> list[Finding]:
    found = _installed("deepspeed")
    if found is None:
        return [Finding("deepspeed", OK, "not installed; only --engine deepspeed and its integration need it")]
    try:
        check_version()
    except ImportError as error:
        return [Finding("deepspeed", BROKEN, str(error).split(". pip")[0], "pip" + str(error).split(". pip")[-1])]
    return [Finding("deepspeed", OK, found)]


def optional_packages() -> list[Finding]:
    if importlib.util.find_spec("matplotlib") is not None:
        return []
    return [Finding("matplotlib", NOTE, "not installed; lion-dist plot needs it", "pip install matplotlib")]


def gpus() -> list[Finding]:
    driver = _driver_version()
    if not torch.cuda.is_available():
        if driver is None:
            return [Finding("GPUs", OK, "none; CPUs and gloo")]
        if torch.version.cuda is None:
            fact = f"driver {driver} is there, but torch {torch.__version__} is a CPU build"
            remedy = "install the CUDA build of torch: https://pytorch.org/get-started"
        else:
            fact = f"driver {driver} is there, but torch (CUDA {torch.version.cuda}) sees none"
            remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver may be older than this CUDA asks for"
        return [Finding("GPUs", BROKEN, fact, remedy)]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    findings = [Finding("CUDA", OK, f"{torch.version.cuda}, driver {driver or 'unknown'}")]
    if nccl is None:
        findings.append(Finding("NCCL", BROKEN, "not in this torch", "install a build of torch with NCCL"))
    else:
        findings.append(Finding("NCCL", OK, nccl))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        fact = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        if (properties.major, properties.minor) < OLDEST_CAPABILITY_WITH_BF16:
            findings.append(Finding(f"GPU {index}", NOTE, fact, "no bf16 arithmetic: use fp32 or fp16 models"))
        else:
            findings.append(Finding(f"GPU {index}", OK, fact))
    return findings


def _driver_version() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def shared_memory() -> list[Finding]:
    """NCCL and data loaders pass data between ranks of a node through /dev/shm; containers often have 64 MiB."""
    if torch.cuda.device_count() < 2:
        return []
    size = shutil.disk_usage("/dev/shm").total
    if size < 2**30:
        remedy = "start the container with --shm-size=16g, or --ipc=host"
        return [Finding("/dev/shm", NOTE, f"{size / 2**20:.0f} MiB", remedy)]
    return [Finding("/dev/shm", OK, f"{size / 2**30:.0f} GiB")]


def peer_memory() -> list[Finding]:
    """ShardedLion's ranks on one host read each other's memory where they can (``ShardingConfig.peer_memory``)."""
    indices = range(torch.cuda.device_count())
    apart = [(i, j) for i in indices for j in indices if i != j and not torch.cuda.can_device_access_peer(i, j)]
    if apart:
        fact = f"GPU {apart[0][0]} cannot read the memory of GPU {apart[0][1]}"
        if len(apart) > 1:
            fact += f", nor {len(apart) - 1} other pairs"
        remedy = "NCCL moves the bytes, which slows the computation beside it; nvidia-smi topo -p2p r says why"
        return [Finding("peer memory", NOTE, fact, remedy)]
    return [Finding("peer memory", OK, "all GPUs read each other's")] if len(indices) > 1 else []


def c_compiler() -> list[Finding]:
    """Of the CPU's step; Triton needs one as well, to build its launchers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library = native.library()
    said = [str(warning.message).removeprefix("lion_dist: ").split(", so ")[0] for warning in caught]
    if library is not None and said:
        return [Finding("CPU step", NOTE, f"compiled C, again in every process: {said[0]}", "set XDG_CACHE_HOME")]
    if library is not None:
        return [Finding("CPU step", OK, "compiled C")]
    remedy = "install gcc or clang, or set CC"
    if torch.cuda.is_available():
        remedy += "; Triton needs one too"
    return [
        Finding(
            "CPU step",
            NOTE,
            f"PyTorch operations, two to seven times slower: {(said or ['no compiled step'])[0]}",
            remedy,
        )
    ]


def kernels(update: Callable[..., None] = lion_update_) -> list[Finding]:
    """The backend that ``Lion`` chooses on each device, against the reference implementation, bit for bit.

    ``update``: what runs it.
    """
    here = range(torch.cuda.device_count())
    if "LOCAL_RANK" in os.environ:  # under torchrun each rank looks at its own
        here = [i for i in here if i == int(os.environ["LOCAL_RANK"])]
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in here)]
    return [_kernel_finding(device, update) for device in devices]


def _kernel_finding(device: torch.device, update: Callable[..., None]) -> Finding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing has a line of its own
        backend = choose_backend(device, use_triton=None)
    what = f"kernel on {device}"
    try:
        differing = [name for name in KERNEL_STORAGES if _differs_from_reference(name, backend, device, update)]
    except Exception as error:
        fact = f"{backend} ended with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        remedy = "Triton most often lacks a C compiler; Lion(use_triton=False) goes without Triton"
        return Finding(what, BROKEN, fact, remedy)
    if differing:
        return Finding(
            what,
            BROKEN,
            f"{backend} differs from the reference implementation in {', '.join(differing)}",
            "do not train on this machine; report it with these lines",
        )
    return Finding(what, OK, f"{backend}, bit-identical to the reference implementation")


def _differs_from_reference(storage: str, backend: str, device: torch.device, update: Callable[..., None]) -> bool:
    chosen, definition = (_small_case(storage, device) for _ in range(2))
    scalars = StepScalars.from_group(1e-3, (0.9, 0.99), 0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        dtype = KERNEL_STORAGES[storage][0]
        grads = [torch.randn(n, generator=generator).to(device, dtype) for n in KERNEL_NUMELS]
        update(chosen, grads, scalars, backend=backend)
        lion_update_(definition, grads, scalars, backend="chunked_reference")
    pairs = zip(_all_tensors(chosen), _all_tensors(definition), strict=True)
    return any(not torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _small_case(storage: str, device: torch.device) -> LionTensors:
    dtype, main, average = KERNEL_STORAGES[storage]
    generator = torch.Generator().manual_seed(7)
    params = [torch.randn(n, generator=generator).to(device, dtype) for n in KERNEL_NUMELS]
    return LionTensors(
        params=params,
        exp_avgs=[torch.zeros_like(p) for p in params],
        mains=None if main is None else [torch.zeros_like(p, dtype=main) for p in params],
        averages=None if average is None else [p.to(average, copy=True) for p in params],
        ema_decay=None if average is None else 0.9,
        index_starts=[sum(KERNEL_NUMELS[:i]) for i in range(len(params))],
        steps=torch.zeros(len(params), dtype=torch.int64, device=device),
        stochastic_momentum=dtype == torch.bfloat16,
    )


def _all_tensors(tensors: LionTensors) -> list[torch.Tensor]:
    return [*tensors.params, *tensors.exp_avgs, *(tensors.mains or []), *(tensors.averages or [])]


CHECKS = (python_and_torch, triton, deepspeed, optional_packages, gpus, shared_memory, peer_memory, c_compiler, kernels)
