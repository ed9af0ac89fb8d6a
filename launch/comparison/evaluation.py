"""The held-out windows, and which of them a rank evaluates."""

import hashlib
import math

import torch


def fingerprint(text: tuple[torch.Tensor, torch.Tensor]) -> str:
    """Tells whether a resumed run, or another rank, reads the same text."""
    digest = hashlib.sha256()
    for part in text:
        digest.update(part.numpy())
    return digest.hexdigest()[:16]


def held_out_windows(text: torch.Tensor, count: int, seq_len: int) -> torch.Tensor:
    """At most `count` windows spread evenly over the held-out text, uint8 [windows, seq_len + 1]."""
    last_start = text.numel() - seq_len - 1
    starts = torch.linspace(0, last_start, min(count, last_start + 1), dtype=torch.float64).long()
    return text[starts[:, None] + torch.arange(seq_len + 1)]


def held_out_parts(windows: torch.Tensor, rank: int, world_size: int, rows: int) -> list[tuple[torch.Tensor, int]]:
    """What a rank evaluates: (at most `rows` windows, their weight in the mean), the same number on every rank.

    A rank whose windows are used up goes on with one of weight 0, because FSDP's forward pass waits for all ranks.
    """
    parts = [(part, len(part)) for part in windows[rank::world_size].split(rows) if len(part)]
    most = math.ceil(math.ceil(len(windows) / world_size) / rows)
    return parts + [(windows[:1], 0)] * (most - len(parts))
