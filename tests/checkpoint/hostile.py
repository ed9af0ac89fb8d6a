"""Checkpoints changed by one who can write files: with checksums put right, so that only what they say is wrong."""

import copy
import json
import pickle
import zlib

import torch
from torch import nn

from lion_dist import Lion, PrecisionPolicy, checkpoint
from lion_dist.checkpoint import manifest


def small(dtype=torch.bfloat16):
    """A model with a buffer, and its optimizer after a step: main params, momentum and step counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).to(dtype)
    model.register_buffer("scale", torch.ones(3))
    precision = PrecisionPolicy(main_params="split", momentum_rounding="stochastic", seed=1)
    optimizer = Lion(model.parameters(), lr=1e-3, precision=precision)
    model(torch.ones(2, 6, dtype=dtype)).sum().backward()
    optimizer.step()
    return model, optimizer


def bits_of(model, optimizer):
    """All that a load could change, bit for bit."""
    tensors = dict(model.state_dict())
    for i, param in enumerate(model.parameters()):
        tensors |= {f"{i}.{kind}": tensor for kind, tensor in optimizer.state[param].items()}
    settings = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    return copy.deepcopy(settings), {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).tolist() for name, tensor in tensors.items()
    }


def zeroed():
    """The small model with zeros for what was saved, so that a load shows."""
    model, optimizer = small()
    with torch.no_grad():
        for tensor in [*model.state_dict().values(), *(optimizer.state[p]["exp_avg"] for p in model.parameters())]:
            tensor.zero_()
    return model, optimizer


def outcome(path):
    """(the error of a load, which has changed nothing, or None when it loaded; all bits after it)."""
    model, optimizer = zeroed()
    before = bits_of(model, optimizer)
    try:
        checkpoint.load(path, model=model, optimizer=optimizer)
    except checkpoint.CheckpointError as error:
        assert bits_of(model, optimizer) == before
        return str(error), before
    return None, bits_of(model, optimizer)


def refused(path):
    return outcome(path)[0]


def write_manifest(path, entries):
    """As it stands, with its own checksum."""
    entries = {key: value for key, value in entries.items() if key != "crc32"}
    (path / manifest.NAME).unlink()
    (path / manifest.NAME).write_text(
        json.dumps(entries | {"crc32": f"{zlib.crc32(json.dumps(entries).encode()):08x}"})
    )


def read_manifest(path):
    return json.loads((path / manifest.NAME).read_text())


def write_file(path, name, content):
    (path / name).write_bytes(content)
    entries = read_manifest(path)
    entries["files"][name] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    write_manifest(path, entries)


def change_metadata(path, change):
    metadata = pickle.loads((path / ".metadata").read_bytes())  # our own file
    change(metadata)
    write_file(path, ".metadata", pickle.dumps(metadata))


def change_group(path, **settings):
    entries = read_manifest(path)
    for key, value in settings.items():
        entries["param_groups"][0].pop(key, None)
        if value is not ...:
            entries["param_groups"][0][key] = value
    write_manifest(path, entries)
