"""``load`` refuses before it changes anything: shapes and dtypes of state, settings of groups, pieces that are none."""

import pathlib
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint.consolidated import import_consolidated
from tests.checkpoint.hostile import change_group, change_metadata, refused, small, write_file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "c"
    model, optimizer = small()
    checkpoint.save(path, model=model, optimizer=optimizer, extra={"step": 1})
    return path


@pytest.fixture
def path(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "c")
    return tmp_path / "c"


def test_what_was_saved_loads(path):
    assert refused(path) is None


def test_what_was_saved_loads_as_changed_by_nobody(path):
    change_metadata(path, lambda metadata: None)
    change_group(path, lr=0.5)
    assert refused(path) is None


def test_what_python_3_11_2_saved_loads(path, monkeypatch):
    """Its enums are pickled by name: by a call of getattr, which nothing else of a checkpoint may make."""
    by_name = lambda self, protocol: (getattr, (type(self), self.name))  # noqa: E731
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    change_metadata(path, lambda metadata: None)
    assert b"getattr" in (path / ".metadata").read_bytes()
    assert refused(path) is None


@pytest.mark.parametrize("attribute", [(pathlib.Path, "exists"), (torch.Size, "numel"), (_MEM_FORMAT_ENCODING, 1)])
def test_no_other_attribute_is_got(path, attribute):
    class Stored:
        def __reduce__(self):
            return getattr, attribute

    write_file(path, ".metadata", pickle.dumps(Stored()))
    assert "it asks for an attribute of" in refused(path)


NAN = float("nan")
SETTINGS = {
    "no lr": ({"lr": ...}, "param group 0 has no lr"),
    "no betas": ({"betas": ...}, "param group 0 has no betas"),
    "no decay": ({"weight_decay": ...}, "param group 0 has no weight_decay"),
    "lr null": ({"lr": None}, "has lr None"),
    "lr NaN": ({"lr": NAN}, "has lr nan"),
    "lr infinite": ({"lr": float("inf")}, "has lr inf"),
    "lr negative": ({"lr": -1.0}, "lr must be"),
    "lr a flag": ({"lr": True}, "has lr True"),
    "lr a string": ({"lr": "1e-3"}, "has lr '1e-3'"),
    "one beta": ({"betas": [0.9]}, "betas must be two numbers"),
    "betas a number": ({"betas": 0.9}, "has betas 0.9"),
    "beta 1": ({"betas": [0.9, 1.0]}, "betas must be two numbers"),
    "beta NaN": ({"betas": [0.9, NAN]}, "has betas nan"),
    "decay negative": ({"weight_decay": -0.1}, "weight_decay must be"),
    "initial_lr a list": ({"initial_lr": [1]}, r"has initial_lr \[1\]"),
    "an unknown setting": ({"foreach": True}, "has settings that this version does not know: foreach"),
}


@pytest.mark.parametrize("settings, message", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_no_optimizer_takes(path, settings, message):
    change_group(path, **settings)
    error = refused(path)
    assert error is not None
    with pytest.raises(checkpoint.CheckpointError, match=message):
        raise checkpoint.CheckpointError(error)


def reshaped(key, *shape):
    """The tensor ``key`` in one piece of another shape; the bytes stay."""

    def change(metadata):
        stored = metadata.state_dict_metadata[key]
        (chunk,) = stored.chunks
        stored.size = chunk.sizes = torch.Size(shape)
        places = metadata.storage_data
        (index,) = (index for index in places if index.fqn == key)
        chunk.offsets = torch.Size([0] * len(shape))
        places[type(index)(key, chunk.offsets, 0)] = places.pop(index)

    return change


def of_dtype(key, dtype):
    def change(metadata):
        metadata.state_dict_metadata[key].properties.dtype = dtype

    return change


METADATA = {
    "exp_avg transposed": (reshaped("optimizer.0.weight.exp_avg", 6, 4), "0.weight.exp_avg is (6, 4), not (4, 6)"),
    "main_param flat": (reshaped("optimizer.0.weight.main_param", 24), "0.weight.main_param is (24,), not (4, 6)"),
    "step 1-D": (reshaped("optimizer.0.weight.step", 1), "0.weight.step is (1,), not ()"),
    "parameter transposed": (reshaped("model.1.weight", 4, 3), "1.weight: (4, 3) saved, (3, 4) here"),
    "buffer reshaped": (reshaped("model.scale", 3, 1), "scale: (3, 1) saved, (3,) here"),
    "exp_avg of integers": (of_dtype("optimizer.0.weight.exp_avg", torch.int16), "no floating-point numbers"),
    "main_param in fp16": (of_dtype("optimizer.0.weight.main_param", torch.float16), "main_param is torch.float16"),
    "step in fp64": (of_dtype("optimizer.0.weight.step", torch.float64), "counts in torch.float64"),
    "a remainder of fp16": (of_dtype("model.0.weight", torch.float16), "is a remainder of bf16"),
    "a parameter of other bytes": (of_dtype("model.1.bias", torch.float32), "holds no piece of 'model.1.bias'"),
    "a complex buffer": (of_dtype("model.scale", torch.complex32), "model.scale: torch.complex32 to torch.float32"),
    "state of nothing": (
        lambda m: m.state_dict_metadata.update({"optimizer.x.exp_avg": m.state_dict_metadata["model.scale"]}),
        "the piece of 'optimizer.x.exp_avg'",
    ),
}


@pytest.mark.parametrize("change, message", METADATA.values(), ids=METADATA)
def test_tensors_that_do_not_fit(path, change, message):
    change_metadata(path, change)
    error = refused(path)
    assert error is not None
    assert message in error


def renamed(metadata):
    key = "optimizer.0.weight.exp_avg"
    metadata.state_dict_metadata["optimizer.0.weight.velocity"] = metadata.state_dict_metadata.pop(key)
    (index,) = (index for index in metadata.storage_data if index.fqn == key)
    place = metadata.storage_data.pop(index)
    metadata.storage_data[type(index)("optimizer.0.weight.velocity", index.offset, 0)] = place


def test_state_of_an_unknown_kind(path):
    change_metadata(path, renamed)
    assert "optimizer.0.weight.velocity belongs to nothing here" in refused(path)


# ---- files of torch.save

STATE = {
    "sparse": ({"exp_avg": torch.ones(2, 2).to_sparse()}, "is torch.sparse_coo"),
    "another shape": ({"exp_avg": torch.ones(4)}, r"exp_avg, which is \(4,\), not \(2, 2\)"),
    "integers": ({"exp_avg": torch.ones(2, 2, dtype=torch.int64)}, "no floating-point numbers"),
    "a list": ({"exp_avg": [1.0]}, "holds exp_avg, a list"),
    "expanded": ({"exp_avg": torch.ones(1).expand(2, 2)}, "Clone it first"),
    "meta": ({"exp_avg": torch.ones(2, 2, device="meta")}, "has no data in the file"),
    "main_param in fp16": ({"main_param": torch.ones(2, 2, dtype=torch.float16)}, "main_param, which is torch.float16"),
    "a fractional step": ({"step": torch.tensor(1.0)}, "counts in torch.float32"),
    "no dict": (7, "is no dict"),
}


def file_with(path, change):
    model = nn.Linear(2, 2)
    content = {"model": model.state_dict(), "optimizer": Lion(model.named_parameters(), lr=1e-3).state_dict()}
    change(content)
    torch.save(content, path)
    return path


def assert_not_imported(tmp_path, change, message):
    file_with(tmp_path / "one.pt", change)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        import_consolidated(tmp_path / "one.pt", tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("state, message", STATE.values(), ids=STATE)
def test_a_file_with_state_that_could_not_be_loaded_is_not_imported(tmp_path, state, message):
    assert_not_imported(tmp_path, lambda content: content["optimizer"]["state"].update({0: state}), message)


MODEL = {
    "quantized": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "of torch.qint8"),
    "sparse": (torch.ones(2, 2).to_sparse(), "is torch.sparse_coo"),
    "expanded": (torch.ones(1).expand(10**9), "4000000000 bytes, the file 4 of them"),
}


@pytest.mark.parametrize("tensor, message", MODEL.values(), ids=MODEL)
def test_a_file_with_a_tensor_that_no_checkpoint_holds_is_not_imported(tmp_path, tensor, message):
    assert_not_imported(tmp_path, lambda content: content["model"].update(x=tensor), message)


GROUPS = {
    "lr NaN": ({"lr": NAN}, "has lr nan"),
    "decay a string": ({"weight_decay": "0"}, "has weight_decay '0'"),
    "another name": ({"param_names": ["weight", "x"]}, "names 'x', which is not in"),
    "names no strings": ({"param_names": [1, 2]}, "are no names"),
    "params no numbers": ({"params": [[0], [1]]}, "are no numbers"),
}


@pytest.mark.parametrize("settings, message", GROUPS.values(), ids=GROUPS)
def test_a_file_with_settings_that_could_not_be_loaded_is_not_imported(tmp_path, settings, message):
    assert_not_imported(tmp_path, lambda content: content["optimizer"]["param_groups"][0].update(settings), message)


def test_a_file_whose_extra_is_a_tensor_is_not_imported(tmp_path):
    assert_not_imported(tmp_path, lambda content: content.update(extra={"a": torch.ones(1)}), '"extra" must be')
