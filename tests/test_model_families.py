"""Shapes of models by name and by size, against transformers and the published numbers."""

from __future__ import annotations

import pytest
import torch

from lion_dist.planning.model_families import ALIASES, FAMILIES, decoder_shapes, family_shapes, gpt2_shapes
from lion_dist.planning.model_shapes import PRESETS, read_shapes

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize(("name", "numel"), PUBLISHED.items())
def test_families_have_the_published_number_of_parameters(name, numel):
    assert read_shapes(name).numel == read_shapes(name.upper()).numel == numel


@pytest.mark.parametrize("name", ["qwen", "mistral", "mixtral", *ALIASES])
def test_every_other_name_leads_to_a_model(name):
    assert ALIASES[name] in (FAMILIES | PRESETS)


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
OURS = {"hidden": 64, "ffn": 96, "layers": 2, "heads": 4, "kv": 2, "vocab": 50}
KINDS = {
    "llama": ({}, {}),
    "mistral": ({"head_dim": 16}, {}),
    "qwen2": ({}, {"qkv_bias": True}),
    "qwen3": ({"head_dim": 32}, {"qk_norm": True, "head_dim": 32}),
    "mixtral": ({"num_local_experts": 4}, {"experts": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    theirs, ours = KINDS[kind]
    config = transformers.AutoConfig.for_model(kind, num_key_value_heads=2, **SMALL, **theirs)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert dict(decoder_shapes(**OURS, **ours)) == expected


def test_shapes_of_gpt2_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4))
    expected = {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert dict(gpt2_shapes(64, 2)) == expected


def test_a_family_without_a_head_of_its_own_is_tied():
    assert not any(name.startswith("lm_head") for name, _ in family_shapes("qwen3-0.6b")[1])


@pytest.mark.parametrize(
    ("text", "numel"), [("6.7e9", 6.7e9), ("6700000000", 6.7e9), ("6.7B", 6.7e9), ("350m", 3.5e8), ("1e12", 1e12)]
)
def test_a_number_is_a_model_of_about_that_many_parameters_shaped_like_llama(text, numel):
    found = read_shapes(text)
    assert found.numel == pytest.approx(numel, rel=0.006)
    assert 32 <= found.hidden / found.layers <= 512
    assert "made up" in found.source


@pytest.mark.parametrize("text", ["6.7", "7", "1e14", "0b"])
def test_a_number_that_no_model_has_is_refused(text):
    with pytest.raises(ValueError, match="a number is between 1e6 and 1e13"):
        read_shapes(text)
