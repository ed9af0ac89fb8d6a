"""Checkpoints as a fuzzer writes them: right values or CheckpointError, nothing of the process or the model changed."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import time
import warnings
import zipfile

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from lion_dist import checkpoint
from lion_dist.checkpoint import manifest
from lion_dist.checkpoint.consolidated import consolidate
from lion_dist.checkpoint.contents import read_contents
from lion_dist.checkpoint.metadata import DTYPES
from tests.checkpoint.hostile import (
    bits_of,
    change_metadata,
    outcome,
    read_manifest,
    refused,
    small,
    write_file,
    write_manifest,
)
from tests.seeds import fuzz_seed

SECONDS = 8
DATA = "__0_0.distcp"
NAMES = ["../x", "/etc/passwd", "/dev/zero", "", ".", "..", "a/b", "a\0b", DATA, ".metadata", manifest.NAME, "fifo", 7]
NUMBERS = [-1, 0, 1, 2, 2**31, 2**63 - 1, 2**63, 10**30, True, None, "1", 1.5, float("nan"), [], {}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "c"
    model, optimizer = small()
    checkpoint.save(path, model=model, optimizer=optimizer, extra={"step": 1})
    return path


# ---- the process, which a file must not change


def process_state():
    """What a pickle could reach by the classes that metadata names."""
    classes = [pathlib.Path, pathlib.PosixPath, torch.Size, TensorStorageMetadata, ChunkStorageMetadata, MetadataIndex]
    members = {(c, name): value for c in classes for name, value in vars(c).items()}
    return members, vars(torch).get("float32"), os.getcwd(), torch.get_default_dtype()


class Pickled:
    """Pickles as what ``reduce`` says."""

    def __init__(self, *reduce):
        self.reduce = reduce

    def __reduce__(self):
        return self.reduce


def build_on(module, name, state):
    """A pickle that sets attributes of a class (the instruction BUILD)."""
    state = pickle.dumps(state, protocol=2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + state + b"b."


# ---- changes


def keys_of(metadata):
    return sorted(metadata.state_dict_metadata)


def metadata_bytes(rng, path):
    content = bytearray((path / ".metadata").read_bytes())
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    write_file(path, ".metadata", bytes(content))


def metadata_cut(rng, path):
    content = (path / ".metadata").read_bytes()
    write_file(path, ".metadata", content[: rng.randrange(len(content))])


def metadata_object(rng, path):
    nested = []
    for _ in range(200):
        nested = [nested]
    objects = [
        nested, {}, [], None, 3, "x", torch.Size([1]), pathlib.Path("x"), Pickled(os.system, ("exit 3",)),
        Pickled(getattr, (pathlib.Path, "exists")), Pickled(getattr, (_MEM_FORMAT_ENCODING, "__class__")),
        Pickled(torch.Size, ([2**62] * 8,)),
    ]  # fmt: skip
    write_file(path, ".metadata", pickle.dumps(rng.choice(objects)))


def metadata_deep(rng, path):
    deep = rng.choice([b"(" * 50_000, b"]" + b"(l" * 30_000, b"\x8e" + (2**60).to_bytes(8, "little"), b"]" * 50_000])
    write_file(path, ".metadata", deep + b".")


def metadata_build(rng, path):
    module, name = rng.choice([
        ("pathlib", "Path"), ("pathlib", "PosixPath"), ("torch", "Size"), ("torch", "float32"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"), ("torch.serialization", "_get_layout"),
    ])  # fmt: skip
    state = rng.choice([{"exists": True, "__len__": 1}, (None, {"exists": True, "numel": 3}), {"chunks": []}])
    write_file(path, ".metadata", build_on(module, name, state))


def metadata_pieces(rng, path):
    def change(metadata):
        stored = metadata.state_dict_metadata[rng.choice(keys_of(metadata))]
        chunk = rng.choice(stored.chunks)
        match rng.randrange(7):
            case 0:
                stored.chunks.remove(chunk)
            case 1:
                stored.chunks.append(chunk)
            case 2:
                chunk.offsets = torch.Size([o + rng.choice([1, 5, 2**40]) for o in chunk.offsets])
            case 3:
                chunk.sizes = torch.Size([max(0, n + rng.choice([-1, 1, 2**40])) for n in chunk.sizes])
            case 4:
                stored.size = torch.Size([rng.choice([0, 1, 7, 2**40]) for _ in range(rng.randrange(5))])
            case 5:
                stored.size = chunk.sizes = torch.Size([2**31] * rng.randint(1, 3))
            case 6:
                stored.chunks = rng.choice([[], None, {}, [None], [[0], [1]]])

    change_metadata(path, change)


def metadata_dtype(rng, path):
    def change(metadata):
        stored = metadata.state_dict_metadata[rng.choice(keys_of(metadata))]
        others = [torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, None, "float32"]
        stored.properties.dtype = rng.choice([*DTYPES.values(), *others])

    change_metadata(path, change)


def metadata_places(rng, path):
    def change(metadata):
        place = metadata.storage_data[rng.choice(list(metadata.storage_data))]
        match rng.randrange(4):
            case 0:
                place.relative_path = rng.choice(NAMES)
            case 1:
                place.offset = rng.choice([*NUMBERS, place.offset + 1])
            case 2:
                place.length = rng.choice([*NUMBERS, place.length - 1])
            case 3:
                metadata.storage_data.pop(rng.choice(list(metadata.storage_data)))

    change_metadata(path, change)


def metadata_names(rng, path):
    def change(metadata):
        key = rng.choice(keys_of(metadata))
        other = rng.choice(["model.x", "optimizer.0.weight.velocity", "counters", "", "model.", 7, None, "\0"])
        metadata.state_dict_metadata[other] = metadata.state_dict_metadata.pop(key)

    change_metadata(path, change)


def manifest_value(rng, path):
    entries = read_manifest(path)
    files = entries["files"]
    target = rng.choice([entries, entries["param_groups"][0], files[DATA], files, entries["tied"]])
    key = rng.choice([*target, "x"])
    if rng.random() < 0.2:
        target.pop(key, None)
    else:
        target[key] = rng.choice([*NUMBERS, *NAMES])
    write_manifest(path, entries)


def manifest_file(rng, path):
    entries = read_manifest(path)
    entries["files"][str(rng.choice(NAMES))] = rng.choice(
        [{"bytes": 0, "crc32": "00000000"}, {"bytes": 2**70, "crc32": "0"}, {"bytes": -1, "crc32": ""}, {}, None]
    )
    write_manifest(path, entries)


def manifest_text(rng, path):
    deep = rng.choice(["[", '{"a":', '{"format":2,"files":{"a":'])
    many = "{" + '"a":1,' * 10_000
    texts = [deep * 50_000, "{}", "null", "[]", "1e999", '"', many, '{"format": 2}', "\ud800", "9" * 5000]
    (path / manifest.NAME).write_text(rng.choice(texts), errors="surrogatepass")


def data_bytes(rng, path):
    content = bytearray((path / DATA).read_bytes())
    for _ in range(rng.randint(1, 30)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    write_file(path, DATA, bytes(content))


def data_cut(rng, path):
    content = (path / DATA).read_bytes()
    write_file(path, DATA, content[: rng.randrange(len(content))])


def data_archive(rng, path):
    """Another zip in the place of a piece: compressed members, other names, a bomb."""
    content = (path / DATA).read_bytes()
    bomb, names = bytes(rng.choice([8, 48, 1 << 20])), rng.choice([("data/0",), ("data/0", "data/0"), ("x",)])

    def change(metadata):
        nonlocal content
        place = metadata.storage_data[rng.choice(list(metadata.storage_data))]
        archive = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(archive, "w", rng.choice([0, 8, 12, 14])) as zipped:
            warnings.simplefilter("ignore")  # two members of one name
            for name in names:
                zipped.writestr(f"archive/{name}", bomb)
            zipped.writestr("archive/byteorder", rng.choice([b"little", b"big", bomb]))
        place.offset, place.length = len(content), len(archive.getvalue())
        content += archive.getvalue()

    change_metadata(path, change)
    write_file(path, DATA, content)


def data_special(rng, path):
    name = rng.choice([DATA, ".metadata", manifest.NAME])
    (path / name).unlink()
    match rng.randrange(5):
        case 0:
            os.mkfifo(path / name)
        case 1:
            (path / name).symlink_to(rng.choice(["/dev/zero", "/dev/tty", name, "/etc/passwd", "/proc/self/mem"]))
        case 2:
            (path / name).mkdir()
        case 3:
            (path / name).touch()
        case 4:
            pass


CHANGES = [
    metadata_bytes, metadata_cut, metadata_object, metadata_deep, metadata_build, metadata_pieces, metadata_dtype,
    metadata_places, metadata_names, manifest_value, manifest_file, manifest_text, data_bytes, data_cut, data_archive,
    data_special,
]  # fmt: skip


# ---- what readers make of them


@contextlib.contextmanager
def bounded_memory(spare=2 << 30):
    """A bomb is a MemoryError here, which no test expects."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def accepted_by(path, target):
    """Which of the readers that need no model take it; each other one raises CheckpointError."""
    readers = {
        "newest": lambda: checkpoint.newest(path.parent),
        "newest verified": lambda: checkpoint.newest(path.parent, verified=True),
        "verify": lambda: checkpoint.verify(path),
        "inspect": lambda: read_contents(path),
        "convert": lambda: consolidate(path, target),
    }
    accepted = []
    for name, read in readers.items():
        with contextlib.suppress(checkpoint.CheckpointError):
            read()
            accepted.append(name)
    return accepted


def one(rng, saved, folder):
    """One checkpoint; returns what changed it and what became of it."""
    path = folder / "c"
    shutil.copytree(saved, path)
    change = rng.choice(CHANGES)
    change(rng, path)
    if change.__name__ == "data_special":
        (folder / "fifo").unlink(missing_ok=True)
    accepted = accepted_by(path, folder / "one.pt")
    assert {"newest", "newest verified"} <= set(accepted)  # one odd neighbour stops neither
    error, bits = outcome(path)
    # Others may change what the file says: a number, or which of two pieces of one form is whose.
    if error is None and change in (metadata_pieces, metadata_names, metadata_build, manifest_file, data_special):
        assert bits == bits_of(*small())
    return change.__name__, error


@pytest.mark.filterwarnings("ignore")
def test_a_hostile_checkpoint_gives_right_values_or_checkpoint_error(saved, tmp_path):
    seed = fuzz_seed()
    rng, before, counts = random.Random(seed), process_state(), {}
    end, number = time.monotonic() + SECONDS, 0
    with bounded_memory():
        while number < 20 or time.monotonic() < end:
            (tmp_path / str(number)).mkdir()
            name, error = one(rng, saved, tmp_path / str(number))
            assert process_state() == before, (number, name)
            counts.setdefault(name, []).append(error is not None)
            shutil.rmtree(tmp_path / str(number))
            number += 1
    print({name: f"{sum(found)} of {len(found)} refused" for name, found in counts.items()})
    for name in {"metadata_build", "metadata_cut", "metadata_deep", "data_special"} & counts.keys():
        assert all(counts[name]), name


def test_what_the_fuzzer_starts_from_loads_with_the_values_that_were_saved(saved):
    assert outcome(saved) == (None, bits_of(*small()))


def test_a_build_instruction_changes_no_class(saved, tmp_path):
    """After a refused load ``pathlib.Path.exists`` was True in the whole process."""
    shutil.copytree(saved, tmp_path / "c")
    write_file(tmp_path / "c", ".metadata", build_on("pathlib", "Path", {"exists": True}))
    assert ".metadata is" in refused(tmp_path / "c")
    assert callable(pathlib.Path.exists)


@pytest.mark.parametrize("name", [DATA, ".metadata", manifest.NAME])
def test_a_file_that_the_disk_does_not_give_back_is_refused_by_name(saved, tmp_path, monkeypatch, name):
    shutil.copytree(saved, tmp_path / "c")

    class Broken(io.FileIO):
        def readinto(self, buffer):
            raise OSError(5, "Input/output error")

        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    opened = manifest.open_regular

    def open_broken(path):
        with opened(path) as file:
            return Broken(os.dup(file.fileno())) if path.name == name else opened(path)

    monkeypatch.setattr(manifest, "open_regular", open_broken)
    assert f"{name} cannot be read: [Errno 5]" in refused(tmp_path / "c")
    assert "newest verified" in accepted_by(tmp_path / "c", tmp_path / "one.pt")


def huge(metadata):
    stored = metadata.state_dict_metadata["model.0.weight"]
    stored.size = stored.chunks[0].sizes = torch.Size([2**31, 2**31 - 1])


def test_a_tensor_larger_than_its_file_is_refused_before_anything_is_allocated(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "c")
    change_metadata(tmp_path / "c", huge)
    assert " bytes, and " in refused(tmp_path / "c")
    assert accepted_by(tmp_path / "c", tmp_path / "one.pt") == ["newest", "newest verified"]


def test_settings_of_every_kind_are_refused_or_taken(saved, tmp_path):
    """Each value in each place of the manifest."""
    for key in ("lr", "betas", "weight_decay", "initial_lr", "params"):
        for i, value in enumerate([*NUMBERS, [0.9, 0.99], [0.9, "x"], [None, None]]):
            path = tmp_path / f"{key}-{i}"
            shutil.copytree(saved, path)
            entries = read_manifest(path)
            entries["param_groups"][0][key] = json.loads(json.dumps(value))
            write_manifest(path, entries)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                refused(path)
