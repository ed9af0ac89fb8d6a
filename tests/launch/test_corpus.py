"""The text that launch/train.py reads, the batches it draws, and the held-out windows of launch/compare_engines.py."""

import pytest
import torch

from comparison.evaluation import fingerprint, held_out_parts, held_out_windows
from train import global_batch, read_corpus


@pytest.fixture
def folder(tmp_path):
    """40 files, each a line that names it, in two folders; and what has to be passed over."""
    for i in range(40):
        path = tmp_path / ("even" if i % 2 == 0 else "odd") / f"{i:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<{i:02d}>" * 20)
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def names_in(text: torch.Tensor) -> set[bytes]:
    return set(bytes(text.tolist()).replace(b"\0", b"").replace(b"><", b"> <").split())


def test_held_out_files_are_never_trained_on(folder):
    trained, held_out = map(names_in, read_corpus(str(folder), seq_len=8))
    assert len(held_out) == 2 and not trained & held_out
    assert trained | held_out == {b"<%02d>" % i for i in range(40)}


def test_standard_library_is_read_the_same_way_twice():
    first, second = read_corpus(None, seq_len=256), read_corpus(None, seq_len=256)
    assert fingerprint(first) == fingerprint(second)
    assert torch.equal(first[0], second[0])
    assert first[0].numel() > 4_000_000 and first[1].numel() > 100_000


def test_single_file_is_cut_in_two(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 201)))
    train, held_out = read_corpus(str(path), seq_len=4)
    assert train.tolist() + held_out.tolist() == list(range(1, 201))
    assert held_out.numel() == 10


def test_a_few_files_hold_out_the_last(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name * 50)
    train, held_out = read_corpus(str(tmp_path), seq_len=8)
    assert bytes(train.tolist()) == b"a" * 50 + b"\0" + b"b" * 50
    assert bytes(held_out.tolist()) == b"c" * 50


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder: .*missing"),
        (lambda path: path.touch(), "missing has 0 bytes to train on"),
        (lambda path: path.mkdir(), "missing has 0 bytes to train on"),
        (lambda path: path.write_bytes(b"\0\1\2"), "binary and empty files do not count"),
        (lambda path: path.write_text("short"), "has 5 bytes to train on and 0 held out .* window is 17.* Pass more"),
    ],
)
def test_unusable_data_is_named_with_a_remedy(tmp_path, make, message):
    make(tmp_path / "missing")
    with pytest.raises(ValueError, match=message) as error:
        read_corpus(str(tmp_path / "missing"), seq_len=16)
    assert "--data" in str(error.value)


def test_unreadable_file_is_an_error(tmp_path, monkeypatch):
    """Not a file without permissions: root may read those."""
    path = tmp_path / "secret.txt"
    path.write_text("secret")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(PermissionError, match="Permission denied: .*secret.txt"):
        read_corpus(str(path), seq_len=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_number_of_ranks_sees_the_same_batch(world_size):
    text = torch.arange(10_000).remainder(251).to(torch.uint8)
    whole = global_batch(text, batch_size=8, seq_len=16, seed=3, step=7)
    parts = global_batch(text, batch_size=8, seq_len=16, seed=3, step=7).chunk(world_size)
    assert all(part.shape == (8 // world_size, 17) for part in parts)
    assert torch.equal(torch.cat(parts), whole)


def test_batches_depend_on_seed_and_step():
    """torch's CPU generator drops all but the low 32 bits of a seed: one packed above them is lost."""
    text = torch.arange(10_000).remainder(251).to(torch.uint8)
    batches = [global_batch(text, 8, 16, seed, step) for seed in (0, 1) for step in (1, 2)]
    assert len({bytes(batch.flatten().tolist()) for batch in batches}) == 4


def test_windows_are_runs_of_the_text_up_to_its_last_byte():
    text = torch.arange(20, dtype=torch.uint8)
    batch = global_batch(text, batch_size=200, seq_len=4, seed=0, step=0)
    assert torch.equal(batch - batch[:, :1], torch.arange(5, dtype=torch.uint8).expand(200, 5))
    assert batch.min() == 0 and batch.max() == 19


def test_held_out_windows_are_spread_over_the_text():
    text = torch.arange(100, dtype=torch.uint8)
    windows = held_out_windows(text, count=4, seq_len=9)
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    assert held_out_windows(text[:11], count=4, seq_len=9).shape == (2, 10)


@pytest.mark.parametrize(("count", "world_size"), [(3, 4), (1, 8), (33, 2), (128, 7), (128, 4)])
def test_every_rank_evaluates_as_often_and_every_window_counts_once(count, world_size):
    windows = torch.arange(count)[:, None]
    by_rank = [held_out_parts(windows, rank, world_size, rows=16) for rank in range(world_size)]
    assert len({len(parts) for parts in by_rank}) == 1
    assert all(len(part) for parts in by_rank for part, _ in parts)  # the mean of no window is NaN
    counted = [window for parts in by_rank for part, weight in parts if weight for window in part.flatten().tolist()]
    assert sorted(counted) == list(range(count))
    assert sum(weight for parts in by_rank for _, weight in parts) == count
