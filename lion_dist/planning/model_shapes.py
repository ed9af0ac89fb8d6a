"""The shapes of a model's parameters, without the model: what ``planning.py`` counts.

From a preset (``"7b"``), a family (``model_families.py``), a Hugging Face ``config.json``, or a module that is there.
"""

from __future__ import annotations

import importlib.util
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import nn

from lion_dist import values
from lion_dist.planning.model_families import (
    ALIASES,
    FAMILIES,
    decoder_shapes,
    family_shapes,
    parse_size,
    sized_like_llama,
)

# Llama-shaped, by their published configs. kv: key and value heads; tied: one matrix is embedding and head.
PRESETS = {
    "1b": {"hidden": 2048, "ffn": 8192, "layers": 16, "heads": 32, "kv": 8, "vocab": 128_256, "tied": True},
    "3b": {"hidden": 3072, "ffn": 8192, "layers": 28, "heads": 24, "kv": 8, "vocab": 128_256, "tied": True},
    "7b": {"hidden": 4096, "ffn": 11008, "layers": 32, "heads": 32, "kv": 32, "vocab": 32_000, "tied": False},
    "8b": {"hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 128_256, "tied": False},
    "13b": {"hidden": 5120, "ffn": 13824, "layers": 40, "heads": 40, "kv": 40, "vocab": 32_000, "tied": False},
    "70b": {"hidden": 8192, "ffn": 28672, "layers": 80, "heads": 64, "kv": 8, "vocab": 32_000, "tied": False},
    "405b": {"hidden": 16384, "ffn": 53248, "layers": 126, "heads": 128, "kv": 8, "vocab": 128_256, "tied": False},
}
PRESET_NAMES = {
    "1b": "Llama 3.2 1B",
    "3b": "Llama 3.2 3B",
    "7b": "Llama 2 7B",
    "8b": "Llama 3 8B",
    "13b": "Llama 2 13B",
    "70b": "Llama 2 70B",
    "405b": "Llama 3.1 405B",
}
# Config types whose parameters are exactly those of decoder_shapes; others need transformers.
LLAMA_LIKE = ("llama", "mistral")
# What most configs call their sizes. Lists, one value a layer, are left to the model.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
LARGEST_LAYERS, LARGEST_SIZE = 10_000, 2**31  # beyond any model; the layers are made one by one
BLOCK = re.compile(r"^(.*?\.)?\d+(?=\.)")  # "model.layers.3" of "model.layers.3.mlp.up_proj.weight"


@dataclass(frozen=True)
class ModelShapes:
    """Names and shapes in registration order; a tied parameter once, under its first name.

    ``hidden``, ``layers`` and ``vocab`` size the activations; ``source`` says where the shapes come from.
    """

    name: str
    source: str
    params: tuple[tuple[str, tuple[int, ...]], ...]
    hidden: int
    layers: int
    vocab: int

    @property
    def numels(self) -> list[int]:
        return [prod(shape) for _, shape in self.params]

    @property
    def numel(self) -> int:
        return sum(self.numels)

    def blocks(self) -> list[list[tuple[int, ...]]]:
        """Shapes of what ``fully_shard`` would wrap: each numbered block, and last the rest, which is the root's."""
        blocks: dict[str, list[tuple[int, ...]]] = {}
        root = []
        for name, shape in self.params:
            match = BLOCK.match(name)
            (root if match is None else blocks.setdefault(match[0], [])).append(shape)
        return [*blocks.values(), root]


def shapes_of(model: nn.Module, name: str, source: str, *, hidden: int, layers: int, vocab: int) -> ModelShapes:
    """Of a module, which may be on the meta device; its trainable parameters."""
    named = ((name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad)
    return ModelShapes(name, source, tuple(named), hidden, layers, vocab)


def preset(name: str) -> ModelShapes:
    """One of ``PRESETS``."""
    sizes = PRESETS[name]
    params = tuple(decoder_shapes(**sizes))
    source = f"the shapes of {PRESET_NAMES[name]}"
    return ModelShapes(name, source, params, sizes["hidden"], sizes["layers"], sizes["vocab"])


def family(name: str) -> ModelShapes:
    """One of ``model_families.FAMILIES``."""
    sizes, shapes = family_shapes(name)
    source = f"the shapes of {name}"
    return ModelShapes(name, source, tuple(shapes), sizes["hidden"], sizes["layers"], sizes["vocab"])


def of_size(numel: int) -> ModelShapes:
    """A model like Llama with about ``numel`` parameters."""
    sizes = sized_like_llama(numel)
    source = f"made up, shaped like Llama: {sizes['layers']} layers, {sizes['hidden']} wide"
    params = tuple(decoder_shapes(**sizes))
    return ModelShapes(f"{numel:.3g}", source, params, sizes["hidden"], sizes["layers"], sizes["vocab"])


def read_shapes(where: str) -> ModelShapes:
    """``where``: the name of a preset or a family, a number of parameters, or the path of a Hugging Face config.json.

    With transformers installed its own model is built on the meta device, which holds no data; without it Llama-like
    configs are read by the formula above.

    Raises:
        ValueError: neither, or a config that cannot be made into a causal language model here.
    """
    path = values.path("where", where)
    name = str(where).lower()
    name = ALIASES.get(name, name)
    if name in PRESETS:
        return preset(name)
    if name in FAMILIES:
        return family(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        numel = parse_size(name)
        if numel is not None:
            return of_size(numel)
        raise ValueError(
            f"--params {where}: neither a file nor one of {', '.join([*PRESETS, *FAMILIES, *ALIASES])}, nor a number "
            "such as 6.7e9. Pass a config.json."
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--params {where} is not JSON ({error}). Pass a Hugging Face config.json.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f'--params {where} has no "model_type". Pass the config.json of a Hugging Face model.')
    if importlib.util.find_spec("transformers") is not None:
        return _by_transformers(path, config)
    return _by_formula(path, config)


def _by_transformers(path: Path, config: dict) -> ModelShapes:
    import torch
    import transformers

    kind, text = config["model_type"], config.get("text_config")  # nested where a model also sees or hears
    text = text if isinstance(text, dict) else config
    _check_sizes(path, {name: text[name] for name in SIZES if name in text and not isinstance(text[name], list)})
    settings = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    try:
        if kind not in transformers.CONFIG_MAPPING:
            raise KeyError("it has no such model type")
        hf_config = transformers.AutoConfig.for_model(kind, **settings)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(hf_config)
        text_config = hf_config.get_text_config()
        hidden, layers, vocab = text_config.hidden_size, text_config.num_hidden_layers, text_config.vocab_size
    except Exception as error:  # a wrong value may fail anywhere in the model's own code
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise ValueError(
            f"--params {path}: transformers {transformers.__version__} makes no causal language model of "
            f"{kind!r} ({reason}). Correct it, pass another config.json, or a preset: {', '.join(PRESETS)}."
        ) from error
    return shapes_of(
        model,
        path.parent.name if path.name == "config.json" and path.parent.name else path.stem,
        f"{type(model).__name__} of transformers {transformers.__version__} on the meta device",
        hidden=hidden,
        layers=layers,
        vocab=vocab,
    )


def _check_sizes(path: Path, sizes: Mapping[str, object]) -> None:
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            shown = json.dumps(value)[:80]
            raise ValueError(
                f'--params {path}: "{name}" must be a whole number of at least 1, got {shown}. Correct it, or pass a '
                f"preset: {', '.join(PRESETS)}."
            )
        largest = LARGEST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE
        if value > largest:
            raise ValueError(f'--params {path}: "{name}" is beyond any model (at most {largest}). Correct it.')


def _by_formula(path: Path, config: dict) -> ModelShapes:
    kind = config["model_type"]
    if kind not in LLAMA_LIKE or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(
            f"--params {path} is a {kind!r} model, whose shapes only transformers knows, and it is not installed: "
            f"pip install transformers. Without it: {' and '.join(LLAMA_LIKE)} configs without biases."
        )
    needed = (*SIZES, "intermediate_size")
    for name in needed:
        if name not in config:
            raise ValueError(f'--params {path} has no "{name}". Pass a whole config.json.')
    optional = {name: config[name] for name in ("num_key_value_heads", "head_dim") if config.get(name) is not None}
    _check_sizes(path, {name: config[name] for name in needed} | optional)
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(
            f'--params {path}: "tie_word_embeddings" must be true or false, got {values.shown(tied)}. Correct it.'
        )
    sizes = {
        "hidden": config["hidden_size"],
        "ffn": config["intermediate_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv": optional.get("num_key_value_heads", config["num_attention_heads"]),
        "vocab": config["vocab_size"],
        "tied": tied,
        "head_dim": optional.get("head_dim"),
    }
    params = tuple(decoder_shapes(**sizes))
    source = f"formula for {kind} configs (transformers is not installed)"
    return ModelShapes(path.stem, source, params, sizes["hidden"], sizes["layers"], sizes["vocab"])
