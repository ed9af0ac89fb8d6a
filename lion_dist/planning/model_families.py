"""The shapes of well-known models by name, and of a model of any size, without transformers and without a config.

The sizes are those of the published configs; ``tests/test_model_families.py`` compares them with transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod

Shapes = Iterator[tuple[str, tuple[int, ...]]]

# kv: key and value heads; tied: one matrix is embedding and head.
GPT2 = {
    "gpt2": {"hidden": 768, "layers": 12},
    "gpt2-medium": {"hidden": 1024, "layers": 24},
    "gpt2-large": {"hidden": 1280, "layers": 36},
    "gpt2-xl": {"hidden": 1600, "layers": 48},
}
LLAMA = {
    "llama-3-70b": {"hidden": 8192, "ffn": 28672, "layers": 80, "heads": 64, "kv": 8, "vocab": 128_256},
    "mistral-7b": {"hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 32_000},
}
QWEN2 = {
    "qwen2.5-0.5b": {
        "hidden": 896, "ffn": 4864, "layers": 24, "heads": 14, "kv": 2, "vocab": 151_936, "tied": True,
    },
    "qwen2.5-7b": {"hidden": 3584, "ffn": 18944, "layers": 28, "heads": 28, "kv": 4, "vocab": 152_064},
}  # fmt: skip
QWEN3 = {
    "qwen3-0.6b": {
        "hidden": 1024, "ffn": 3072, "layers": 28, "heads": 16, "kv": 8, "vocab": 151_936, "tied": True,
        "head_dim": 128,
    },
    "qwen3-8b": {
        "hidden": 4096, "ffn": 12288, "layers": 36, "heads": 32, "kv": 8, "vocab": 151_936, "head_dim": 128,
    },
}  # fmt: skip
MIXTRAL = {
    "mixtral-8x7b": {
        "hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 32_000, "experts": 8,
    },
}  # fmt: skip
FAMILIES = {**GPT2, **LLAMA, **QWEN2, **QWEN3, **MIXTRAL}
# Other names of these, and of presets.
ALIASES = {
    "llama-2-7b": "7b",
    "llama-2-13b": "13b",
    "llama-2-70b": "70b",
    "llama-3-8b": "8b",
    "llama-3.1-8b": "8b",
    "llama-3.1-70b": "llama-3-70b",
    "llama-3.1-405b": "405b",
    "llama-3.2-1b": "1b",
    "llama-3.2-3b": "3b",
    "mistral": "mistral-7b",
    "mixtral": "mixtral-8x7b",
    "qwen": "qwen3-8b",
}
GPT2_VOCABULARY, GPT2_POSITIONS = 50_257, 1024

SIZE = re.compile(r"([0-9]+\.?[0-9]*(?:e[0-9]+)?)([mb]?)")
UNITS = {"": 1, "m": 10**6, "b": 10**9}
SMALLEST, LARGEST = 10**6, 10**13  # a number without a unit that is below was meant otherwise


def gpt2_shapes(hidden: int, layers: int) -> Shapes:
    """As ``GPT2LMHeadModel`` registers them; the head is the embedding."""
    yield "transformer.wte.weight", (GPT2_VOCABULARY, hidden)
    yield "transformer.wpe.weight", (GPT2_POSITIONS, hidden)
    for layer in range(layers):
        block = f"transformer.h.{layer}"
        for part, width in (("ln_1", None), ("attn.c_attn", 3), ("attn.c_proj", 1), ("ln_2", None)):
            yield from _affine(f"{block}.{part}", (hidden,) if width is None else (hidden, width * hidden))
        yield from _affine(f"{block}.mlp.c_fc", (hidden, 4 * hidden))
        yield from _affine(f"{block}.mlp.c_proj", (4 * hidden, hidden))
    yield from _affine("transformer.ln_f", (hidden,))


def _affine(name: str, weight: tuple[int, ...]) -> Shapes:
    yield f"{name}.weight", weight
    yield f"{name}.bias", (weight[-1],)


def decoder_shapes(
    *,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv: int,
    vocab: int,
    tied: bool = False,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    experts: int = 0,
) -> Shapes:
    """As ``LlamaForCausalLM`` registers them, with biases (Qwen 2), norms (Qwen 3) or experts (Mixtral)."""
    head_dim = head_dim or hidden // heads
    queries, keys = heads * head_dim, kv * head_dim
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for part, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{block}.self_attn.{part}.weight", (width, hidden)
            if qkv_bias:
                yield f"{block}.self_attn.{part}.bias", (width,)
        yield f"{block}.self_attn.o_proj.weight", (hidden, queries)
        if qk_norm:
            yield f"{block}.self_attn.q_norm.weight", (head_dim,)
            yield f"{block}.self_attn.k_norm.weight", (head_dim,)
        if experts:
            yield f"{block}.mlp.gate.weight", (experts, hidden)
            yield f"{block}.mlp.experts.gate_up_proj", (experts, 2 * ffn, hidden)
            yield f"{block}.mlp.experts.down_proj", (experts, hidden, ffn)
        else:
            yield f"{block}.mlp.gate_proj.weight", (ffn, hidden)
            yield f"{block}.mlp.up_proj.weight", (ffn, hidden)
            yield f"{block}.mlp.down_proj.weight", (hidden, ffn)
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocab, hidden)


def family_shapes(name: str) -> tuple[dict[str, int], Shapes]:
    """(hidden, layers and vocab, shapes) of one of ``FAMILIES``."""
    sizes = FAMILIES[name]
    if name in GPT2:
        return sizes | {"vocab": GPT2_VOCABULARY}, gpt2_shapes(**sizes)
    return sizes, decoder_shapes(**sizes, qkv_bias=name in QWEN2, qk_norm=name in QWEN3)


def parse_size(text: str) -> int | None:
    """The number of parameters that ``"6.7e9"``, ``"6700000000"``, ``"6.7b"`` or ``"350m"`` says; None if it says none.

    Raises:
        ValueError: it is beyond what is planned.
    """
    match = SIZE.fullmatch(text.lower())
    if match is None:
        return None
    numel = float(match[1]) * UNITS[match[2]]
    if not SMALLEST <= numel <= LARGEST:
        raise ValueError(f"--params {text}: {numel:.3g} parameters; a number is between 1e6 and 1e13, such as 6.7e9.")
    return round(numel)


def sized_like_llama(numel: int) -> dict[str, int]:
    """Sizes of a model like Llama 2 with about ``numel`` parameters, for :func:`decoder_shapes`.

    Of all widths that come within half a percent, the one nearest to 128 times as wide as deep, as Llama's are.
    """
    found = [sizes for hidden in range(64, 65_536 + 1, 64) if (sizes := _sizes_of_width(hidden, numel)) is not None]
    misses = [abs(numel_of(decoder_shapes(**(sizes | {"layers": 1})), sizes["layers"]) / numel - 1) for sizes in found]
    near = [sizes for sizes, miss in zip(found, misses, strict=True) if miss <= max(0.005, min(misses))]
    return min(near, key=lambda sizes: abs(sizes["hidden"] / sizes["layers"] / 128 - 1))


def _sizes_of_width(hidden: int, numel: int) -> dict[str, int] | None:
    vocab = 32_000 if numel >= 10**8 else 2_000
    ffn = -(-8 * hidden // 3 // 64) * 64
    layers = round((numel - 2 * vocab * hidden - hidden) / (4 * hidden**2 + 3 * hidden * ffn + 2 * hidden))
    if layers < 1:
        return None
    heads = max(1, hidden // 128)
    return {"hidden": hidden, "ffn": ffn, "layers": layers, "heads": heads, "kv": heads, "vocab": vocab}


def numel_of(shapes: Shapes, layers: int = 1) -> int:
    """Elements of a model of so many layers like the one of ``shapes``."""
    return sum(prod(shape) * (layers if ".layers." in name else 1) for name, shape in shapes)
