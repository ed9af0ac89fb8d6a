"""A Llama-shaped language model for benchmarks: 6 tensors a layer, 3 around them, nothing that is not timed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {
    "1.35B": {"layers": 24, "dim": 2048, "heads": 16, "ffn": 5504, "vocab": 32_000},  # 147 tensors
    "tiny": {"layers": 2, "dim": 64, "heads": 4, "ffn": 176, "vocab": 256},
}


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ffn: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_and_up, self.down = nn.Linear(dim, 2 * ffn, bias=False), nn.Linear(ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq_len, dim = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, seq_len, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, seq_len, dim))
        gate, up = self.gate_and_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """forward(tokens [batch, seq_len + 1]) returns the mean next-token loss."""

    def __init__(self, layers: int, dim: int, heads: int, ffn: int, vocab: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, ffn) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, vocab, bias=False)
        for param in self.parameters():
            if param.dim() == 2:
                nn.init.normal_(param, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens[:, 1:].flatten())


def make_llama(size: str, device: torch.device, dtype: torch.dtype, compile_blocks: bool) -> Llama:
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(**SIZES[size]).to(dtype)
    if compile_blocks:
        for block in model.blocks:
            block.compile()
    return model
