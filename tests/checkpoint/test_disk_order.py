"""What a save reports as written is on the disk: bytes before their fsync, fsyncs before the name, the name itself."""

import pytest
import torch
from torch import nn

from lion_dist import Lion, checkpoint
from lion_dist.checkpoint import directory, manifest
from lion_dist.checkpoint.consolidated import consolidate, import_consolidated
from lion_dist.checkpoint.storage import ChecksummedFile
from tests.checkpoint.disk_order import faults, recorded
from tests.checkpoint.engines import engine, train


def small():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, Lion(model.parameters())


def save(path):
    model, optimizer = small()
    checkpoint.save(path, model=model, optimizer=optimizer)


def save_in_background(path):
    model, optimizer = small()
    checkpoint.save_async(path, model=model, optimizer=optimizer).wait()


def save_from_a_file(path):
    model, _ = small()
    source, optimizer = path.with_name(path.name + ".pt"), Lion(model.named_parameters())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, source)
    import_consolidated(source, path)


@pytest.mark.parametrize("write", [save, save_in_background, save_from_a_file])
def test_every_file_and_name_is_durable_before_the_checkpoint_gets_its_name(tmp_path, write):
    with recorded() as events:
        write(tmp_path / "c")
    assert faults(events, tmp_path / "c") == []
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == [".metadata", "__0_0.distcp", manifest.NAME]


def test_an_overwriting_save_removes_the_old_one_after_the_new_one_is_durable_under_its_name(tmp_path, monkeypatch):
    save(tmp_path / "c")
    at_removal = []
    clear = directory.clear

    def clearing(doomed):
        at_removal.append(faults(events, tmp_path / "c"))
        return clear(doomed)

    monkeypatch.setattr(directory, "clear", clearing)
    with recorded() as events:
        save(tmp_path / "c")
    assert at_removal == [[]]


def test_folders_that_a_save_makes_are_durable(tmp_path):
    with recorded() as events:
        save(tmp_path / "runs" / "a" / "c")
    synced = [event.seen for event in events if event.call == "fsync" and isinstance(event.seen, dict)]
    for made in (tmp_path / "runs", tmp_path / "runs" / "a", tmp_path / "runs" / "a" / "c"):
        assert any(names.get(made.name) == made.stat().st_ino for names in synced), made


def test_a_consolidated_file_is_durable_before_it_gets_its_name(tmp_path):
    save(tmp_path / "c")
    with recorded() as events:
        consolidate(tmp_path / "c", tmp_path / "one.pt")
    assert faults(events, tmp_path / "one.pt") == []


def save_recorded(path):
    model, optimizer = engine("sharded", "split")
    train(model, optimizer, range(1))
    with recorded() as events:
        checkpoint.save(path, model=model, optimizer=optimizer)
    return events


def test_every_rank_s_file_is_durable(gloo, tmp_path):
    of_ranks = gloo.run(2, save_recorded, str(tmp_path / "c"))
    # Every rank's fsyncs come before the first rank's rename: it waits for them.
    events = [e for e in of_ranks[1] if e.call == "fsync"] + of_ranks[0]
    assert faults(events, tmp_path / "c") == []


def test_the_recorder_notices_a_file_that_is_synced_while_its_bytes_are_in_a_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(ChecksummedFile, "fileno", lambda stream: stream.file.fileno())
    monkeypatch.setattr(ChecksummedFile, "flush", lambda stream: None)  # torch 2.14 calls it, 2.13 does not
    with recorded() as events:
        save(tmp_path / "c")
    assert ".metadata was synced before its last bytes were written" in faults(events, tmp_path / "c")


def test_the_recorder_notices_a_name_that_is_not_durable(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "sync", lambda path: None)
    with recorded() as events:
        save(tmp_path / "c")
    found = faults(events, tmp_path / "c")
    assert found == ["c was not synced with its files", f"{tmp_path.name} was not synced with c"]
