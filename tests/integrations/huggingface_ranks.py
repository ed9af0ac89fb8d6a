"""What the tests of Accelerate, the Trainer, PEFT and TRL share: ranks of the gloo pool as frameworks see ranks."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

VOCABULARY = 32
metadata = functools.cache(importlib.metadata.metadata)  # Accelerate asks 20 times a run, and each time it is parsed


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """As under torchrun: frameworks read the environment, and keep what they find until they are told to forget."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    rank, world_size = dist.get_rank(), dist.get_world_size()
    variables = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    environment = mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()})
    with environment, mock.patch.object(importlib.metadata, "metadata", metadata):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            PartialState._reset_state()


def tiny_llama(seed: int = 0, **changes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes)))


def sequences(count: int = 64) -> list[dict]:
    """Of 9 tokens, of which 8 are predicted: sums are divided by powers of two, which is exact in any order."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCABULARY, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def params_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names of parameters whose bits differ."""
    assert list(one) == list(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


def assert_ranks_agree(params: dict[str, torch.Tensor]) -> None:
    for name, param in params.items():
        first = param.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, param), name


def tiny_lora(seed: int = 0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_llama(seed), LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]))


def tokenizer():
    """Of single words "0" to "31", which is what the sequences would be as text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1", eos_token="2")
