"""One file for lion-pytorch, and back."""

import argparse
import io

import pytest
import torch
from lion_pytorch import Lion as PublishedLion
from torch import nn

from lion_dist import Lion, PrecisionPolicy, checkpoint
from lion_dist.checkpoint import consolidated
from lion_dist.checkpoint.consolidated import consolidate, import_consolidated
from tests.checkpoint.engines import POLICIES, assert_same_tensors, engine, new_model, tensors_in, train

ENGINES = [("plain", 1), ("sharded", 2), ("fsdp2", 4), ("fsdp1", 2), ("fsdp1 flat", 2)]


def save_after_two_steps(path, name, policy):
    model, optimizer = engine(name, policy)
    train(model, optimizer, range(2))
    checkpoint.save(path, model=model, optimizer=optimizer, extra={"step": 2})


@pytest.mark.parametrize("name, ranks", ENGINES)
def test_every_engine_goes_on_under_lion_pytorch(gloo, tmp_path, name, ranks):
    gloo.run(ranks, save_after_two_steps, str(tmp_path / "c"), name, "fp32 parameters")
    consolidate(tmp_path / "c", tmp_path / "one.pt")
    content = torch.load(tmp_path / "one.pt", weights_only=True)
    model = new_model(torch.float32)
    model.load_state_dict(content["model"])
    published = PublishedLion(model.parameters(), lr=7.0)
    published.load_state_dict(content["optimizer"])
    assert (published.param_groups[0]["lr"], published.param_groups[0]["weight_decay"]) == (1e-3, 0.1)
    saved = tensors_in(tmp_path / "c")
    for key, param in model.named_parameters():
        assert torch.equal(param, saved[f"model.{key}"]), key
        assert torch.equal(published.state[param]["exp_avg"], saved[f"optimizer.{key}.exp_avg"]), key
    assert torch.equal(model.scale, saved["model.scale"])
    assert content["extra"] == {"step": 2}
    train(model, published, range(2, 3))


@pytest.mark.parametrize("policy", POLICIES)
def test_there_and_back_is_the_same_checkpoint(gloo, tmp_path, policy):
    gloo.run(2, save_after_two_steps, str(tmp_path / "c"), "fsdp2", policy)
    consolidate(tmp_path / "c", tmp_path / "one.pt")
    import_consolidated(tmp_path / "one.pt", tmp_path / "back")
    assert_same_tensors(tmp_path / "c", tmp_path / "back")
    model, optimizer = engine("plain", policy)
    assert checkpoint.load(tmp_path / "back", model=model, optimizer=optimizer) == {"step": 2}


def tied_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def test_tied_weights_are_stored_once_and_stay_tied_there_and_back(tmp_path):
    model = tied_model()
    optimizer = Lion(model.parameters())
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    assert sorted(tensors_in(tmp_path / "c")) == ["model.0.weight", "optimizer.0.weight.exp_avg"]
    consolidate(tmp_path / "c", tmp_path / "one.pt")
    content = torch.load(tmp_path / "one.pt", weights_only=True)
    assert content["model"]["0.weight"].data_ptr() == content["model"]["1.weight"].data_ptr()
    import_consolidated(tmp_path / "one.pt", tmp_path / "back")
    assert_same_tensors(tmp_path / "c", tmp_path / "back")
    checkpoint.load(tmp_path / "back", model=model, optimizer=optimizer)


def published_file(path, groups_of):
    model = new_model(torch.float32)
    published = PublishedLion(groups_of(model), lr=1e-3, weight_decay=0.1)
    train(model, published, range(2))
    torch.save({"model": model.state_dict(), "optimizer": published.state_dict()}, path)
    return model, published


def test_a_file_of_lion_pytorch_becomes_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    published = PublishedLion(model.parameters(), lr=1e-3, weight_decay=0.1)
    model(torch.ones(2, 4)).sum().backward()
    published.step()
    torch.save({"model": model.state_dict(), "optimizer": published.state_dict()}, tmp_path / "one.pt")
    import_consolidated(tmp_path / "one.pt", tmp_path / "c")
    again = nn.Linear(4, 3)
    optimizer = Lion(again.parameters())
    checkpoint.load(tmp_path / "c", model=again, optimizer=optimizer)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(optimizer.state[ours]["exp_avg"], published.state[theirs]["exp_avg"])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def load_and_save(old, new, name):
    model, optimizer = engine(name, "fp32 parameters")
    checkpoint.load(old, model=model, optimizer=optimizer)
    checkpoint.save(new, model=model, optimizer=optimizer)


@pytest.mark.parametrize("name, ranks", ENGINES)
def test_a_file_of_lion_pytorch_goes_on_under_every_engine(gloo, tmp_path, name, ranks):
    model, published = published_file(tmp_path / "one.pt", lambda m: m.named_parameters())
    import_consolidated(tmp_path / "one.pt", tmp_path / "c")
    gloo.run(ranks, load_and_save, str(tmp_path / "c"), str(tmp_path / "again"), name)
    loaded = tensors_in(tmp_path / "again")
    for key, param in model.named_parameters():
        assert torch.equal(loaded[f"model.{key}"], param), key
        assert torch.equal(loaded[f"optimizer.{key}.exp_avg"], published.state[param]["exp_avg"]), key


def test_a_file_whose_state_has_no_names_and_more_than_one_meaning_is_refused(tmp_path):
    published_file(tmp_path / "one.pt", lambda m: [{"params": [p]} for p in m.parameters()])
    with pytest.raises(checkpoint.CheckpointError, match="does not say which optimizer state belongs to which"):
        import_consolidated(tmp_path / "one.pt", tmp_path / "c")


@pytest.mark.parametrize("content", [b"not a zip", None])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save([1], tmp_path / "one.pt")
    if content is not None:
        (tmp_path / "one.pt").write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="one.pt is no"):
        import_consolidated(tmp_path / "one.pt", tmp_path / "c")


BETAS = {"betas": (0.9, 0.99)}
UNFIT = {
    "a namespace": ({"args": argparse.Namespace(lr=1)}, r"holds more than tensors and numbers \(argparse.Namespace\)"),
    "no model": ({"model": [1]}, '"model" is a list. Save model.state_dict'),
    "extra state": (
        {"model": {"0.weight": torch.ones(2), "0._extra_state": {"a": 1}}},
        "holds '0._extra_state', a dict and no tensor",
    ),
    "a list for a state": ({"optimizer": [1]}, 'lacks "state" or "param_groups"'),
    "no groups": ({"optimizer": {"state": {}}}, 'lacks "state" or "param_groups"'),
    "another optimizer": (
        {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "momentum": 0, "params": [0, 1]}]}},
        r"param group 0 has \['lr', 'momentum', 'params'\] but no betas: it is not a Lion's",
    ),
    "too few names": (
        {"optimizer": {"state": {}, "param_groups": [BETAS | {"params": [0, 1], "param_names": ["bias"]}]}},
        'param group 0 has 1 "param_names" for 2 parameters',
    ),
    "state of another kind": (
        {"optimizer": {"state": {0: {"x": torch.ones(2)}}, "param_groups": [BETAS | {"params": [0]}]}},
        "does not say which optimizer state belongs to which",
    ),
}


@pytest.mark.parametrize("content, message", UNFIT.values(), ids=UNFIT)
def test_a_file_that_is_not_of_a_model_and_a_lion_is_refused_by_what_is_wrong(tmp_path, content, message):
    model = nn.Linear(2, 2)
    fit = {"model": model.state_dict(), "optimizer": Lion(model.named_parameters()).state_dict()}
    torch.save(fit, tmp_path / "fit.pt")
    import_consolidated(tmp_path / "fit.pt", tmp_path / "c")
    torch.save(fit | content, tmp_path / "one.pt")
    with pytest.raises(checkpoint.CheckpointError, match=message):
        import_consolidated(tmp_path / "one.pt", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_an_existing_file_is_not_overwritten(tmp_path):
    save_after_two_steps(tmp_path / "c", "plain", "split")
    (tmp_path / "one.pt").write_text("dear")
    with pytest.raises(checkpoint.CheckpointError, match="one.pt exists"):
        consolidate(tmp_path / "c", tmp_path / "one.pt")
    assert (tmp_path / "one.pt").read_text() == "dear"


def test_fp32_main_params_survive_in_the_file_beside_what_lion_pytorch_reads(tmp_path):
    model = nn.Linear(4, 3, dtype=torch.bfloat16)
    optimizer = Lion(model.parameters(), precision=PrecisionPolicy(main_params="fp32"))
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    consolidate(tmp_path / "c", tmp_path / "one.pt")
    state = torch.load(tmp_path / "one.pt", weights_only=True)["optimizer"]["state"]
    assert state[0]["main_param"].dtype == torch.float32
    PublishedLion(model.parameters()).load_state_dict(torch.load(tmp_path / "one.pt")["optimizer"])


def test_a_folder_that_is_not_there_is_said(tmp_path):
    save_after_two_steps(tmp_path / "c", "plain", "split")
    with pytest.raises(checkpoint.CheckpointError, match="nowhere is no folder: make it first"):
        consolidate(tmp_path / "c", tmp_path / "nowhere" / "one.pt")


def test_a_disk_without_room_for_the_file_is_an_error_and_nothing_is_left(tmp_path, monkeypatch):
    model = nn.Linear(300, 200)
    checkpoint.save(tmp_path / "c", model=model, optimizer=Lion(model.parameters()))

    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    def open_full(path, mode):
        return FullDisk(path, mode) if "+" in mode else open(path, mode)

    monkeypatch.setattr(consolidated, "open", open_full, raising=False)
    with pytest.raises(checkpoint.CheckpointError, match="one.pt could not be written. OSError: .* No space left"):
        consolidate(tmp_path / "c", tmp_path / "one.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
