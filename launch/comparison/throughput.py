"""Tokens a second, and which share of the GPUs' arithmetic the model uses (MFU)."""

from argparse import Namespace
from dataclasses import dataclass

import torch
import torch.distributed as dist

from train import DTYPES

# Dense bf16 TFLOP/s by the makers' data sheets. The first name that is part of the device's counts.
PEAK_BF16_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "A10G": 70,
    "A10": 125,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device, or None where the table does not know it: CPUs, other GPUs, fp32 (it depends on TF32)."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """bf16 FLOP/s of a GPU by its name."""
    found = next((tflops for known, tflops in PEAK_BF16_TFLOPS.items() if known in name), None)
    return None if found is None else found * 1e12


def flops_per_token(numel: int, layers: int, dim: int, seq_len: int) -> int:
    """Forward and backward: 6 a parameter, and 12 * layers * dim * seq_len of attention.

    As in PaLM (arXiv 2204.02311, appendix B): nothing is taken off for the causal mask, and what activation
    checkpointing computes again does not count. `numel` has a tied embedding once.
    """
    return 6 * numel + 12 * layers * dim * seq_len


@dataclass(frozen=True)
class Throughput:
    """Columns of a metrics row. `peak` is of one rank, FLOP/s; None leaves MFU out."""

    tokens_per_step: int
    flops_per_token: int
    ranks: int
    peak: float | None

    def columns(self, steps: int, seconds: float) -> dict[str, float]:
        """`steps` took `seconds`: tokens/s over all ranks, seconds a step, MFU where it is known."""
        rate = steps * self.tokens_per_step / seconds
        columns = {"tokens_per_s": round(rate), "seconds": seconds / steps}
        if self.peak is not None:
            columns["mfu"] = rate * self.flops_per_token / (self.ranks * self.peak)
        return columns


def throughput_of(args: Namespace, numel: int, device: torch.device) -> Throughput:
    """Of a run of compare_engines.py; `numel`: the whole model's parameters."""
    peak = args.peak_tflops * 1e12 if args.peak_tflops else peak_flops(device, DTYPES[args.precision])
    flops = flops_per_token(numel, args.layers, args.dim, args.seq_len)
    return Throughput(args.batch_size * args.seq_len, flops, dist.get_world_size(), peak)
