"""Each parameter has a storage of its own, so whoever saves a model saves all of it, and no more than that."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from lion_dist import ShardedLion, ShardingConfig
from lion_dist.sharding.memory_format import MemoryFormat, with_own_storage
from tests.models import GivenGradients, mlp
from tests.shared_files import over_shared_files

SHAPES = [(3, 5), (), (0, 4), (70,), (1,), (130, 7)]


class TiedWords(nn.Module):
    """An embedding whose weight is that of the output layer too, and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)))


def trained(model: nn.Module, x: Tensor) -> ShardedLion:
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model)
    model(x).float().square().mean().backward()
    opt.step()
    return opt


@pytest.fixture
def words():
    model = TiedWords()
    opt = trained(model, torch.arange(11))
    yield model
    opt.close()


def assert_same_bits(mine: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


# ---- the storages


def look_at_storages(dtype: torch.dtype) -> None:
    model = GivenGradients(*SHAPES, dtype=dtype)
    before = [p.detach().round().clone() for p in model.weights]  # steps of 0.5 are exact
    for param, value in zip(model.weights, before, strict=True):
        param.data.copy_(value)
    opt = ShardedLion(model.parameters(), lr=0.5, sharding=ShardingConfig(bucket_numel=200))
    assert len(opt.buckets) > 1
    storages = [p.untyped_storage() for p in model.weights]
    assert [s.nbytes() for s in storages] == [p.nbytes for p in model.weights]
    assert not any(s.resizable() for s in storages)
    full = [s.data_ptr() for s in storages if s.nbytes()]
    assert len(set(full)) == len(full) == 5
    for param, value, shape in zip(model.weights, before, SHAPES, strict=True):
        assert param.shape == shape and torch.equal(param, value) and param.is_contiguous()
    model.loss([torch.ones_like(p) for p in model.weights]).backward()
    opt.step()
    for param, value in zip(model.weights, before, strict=True):
        assert torch.equal(param, value - 0.5)  # what is gathered into flat buffers is what the parameters hold


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peers", [False, True], ids=["collectives", "peers"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_parameter_has_a_storage_of_its_own_size(gloo, ranks, peers, dtype):
    gloo.run(ranks, *([over_shared_files] if peers else []), look_at_storages, dtype)


def test_a_parameter_keeps_its_memory_alive():
    model = mlp(8, 8)
    opt = ShardedLion(model.parameters(), module=model)
    values = [p.detach().clone() for p in model.parameters()]
    opt.close()
    del opt
    gc.collect()
    others = [torch.full((4096,), 7.0) for _ in range(64)]
    for param, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(param, value)
    assert len(others) == 64


@pytest.mark.parametrize("nbytes", [0, 10_000])
def test_a_parameters_storage_cannot_be_resized(nbytes):
    """Resized, it would leave the flat buffer that is updated, or give away memory that it does not own."""
    model = mlp(8, 8)
    opt = ShardedLion(model.parameters(), module=model)
    with pytest.raises(RuntimeError, match="not resizable"):
        model[0].weight.untyped_storage().resize_(nbytes)
    with pytest.raises(RuntimeError, match="not resizable"):
        model[0].weight.data.resize_(100, 100)
    assert opt.buckets[0].moved_params() == []


def test_a_storage_of_its_own_shows_the_strides_of_the_view():
    flat = torch.arange(100.0)
    view = MemoryFormat(torch.Size((2, 3)), (1, 2)).place_in(flat[10:16])
    own = with_own_storage(view)
    assert torch.equal(own, view) and own.stride() == (1, 2) and own.untyped_storage().nbytes() == 24
    flat[10] = -1
    assert own[0, 0] == -1


# ---- savers


def test_torch_save_writes_the_bytes_of_the_parameter_alone(words):
    file = io.BytesIO()
    torch.save(words.norm.weight, file)
    assert len(file.getvalue()) < 24 + 2000
    file = io.BytesIO()
    torch.save(words.state_dict(), file)
    assert len(file.getvalue()) < (11 * 6 + 12) * 4 + 4000
    file.seek(0)
    loaded = torch.load(file)
    assert_same_bits(loaded, words.state_dict())
    assert loaded["head.weight"].data_ptr() == loaded["embedding.weight"].data_ptr()


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save])
def test_a_copied_model_is_whole_tied_and_apart_from_the_optimizer(words, copied):
    other = copied(words)
    assert_same_bits(other.state_dict(), words.state_dict())
    assert other.head.weight is other.embedding.weight
    with torch.no_grad():
        other.norm.weight.fill_(9.0)
    assert (words.norm.weight != 9.0).all()


def test_safetensors_save_model_writes_every_tensor_and_ties_what_is_tied(words, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_model(words, path)
    assert len(safetensors.load_file(path)) == 3  # of four names, two of one tensor
    other = TiedWords()
    safetensors.load_model(other, path)
    assert_same_bits(other.state_dict(), words.state_dict())
    assert other.head.weight is other.embedding.weight


def test_safetensors_save_file_takes_a_state_dict(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = mlp(5, 6, 7)
    trained(model, torch.ones(2, 5))
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_same_bits(safetensors.load_file(tmp_path / "model.safetensors"), model.state_dict())


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerates_save_model_writes_every_tensor(accelerator, words, tmp_path):
    from safetensors.torch import load_file

    model = mlp(5, 6, 7)
    trained(model, torch.ones(2, 5))
    accelerator.save_model(model, tmp_path / "mlp")
    assert_same_bits(load_file(tmp_path / "mlp" / "model.safetensors"), model.state_dict())
    accelerator.save_model(words, tmp_path / "words")
    saved = load_file(tmp_path / "words" / "model.safetensors")
    other = TiedWords()
    other.load_state_dict(saved, strict=False)
    assert len(saved) == 3
    assert_same_bits(other.state_dict(), words.state_dict())


def test_accelerates_save_state_is_loaded_back(accelerator, words, tmp_path):
    model = accelerator.prepare(words)
    before = copy.deepcopy(model.state_dict())
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    accelerator.load_state(tmp_path)
    assert_same_bits(model.state_dict(), before)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_save_pretrained_and_from_pretrained_give_equal_bits(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model)
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    opt.step()
    model.save_pretrained(tmp_path)
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(other.state_dict(), model.state_dict())
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    other_opt = ShardedLion(other.parameters(), module=other)  # and it trains on
    other(input_ids=tokens, labels=tokens).loss.backward()
    other_opt.step()
