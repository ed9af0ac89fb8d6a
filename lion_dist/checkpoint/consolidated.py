"""One ``torch.save`` file of a whole checkpoint, as lion-pytorch's users keep it, and back; streaming, in one process::

    {"model": {name: tensor},                         for model.load_state_dict
     "optimizer": {"state": {i: {"exp_avg": ...}},    for load_state_dict of lion_pytorch.Lion, and of ours
                   "param_groups": [{"lr", "betas", "weight_decay", "params": [i], "param_names": [name]}]},
     "extra": {...}}

Main params and step counts are in the state as well: lion-pytorch ignores them, and the way back gives the same bits.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from lion_dist import values
from lion_dist.boxed_tensor import BoxedTensor
from lion_dist.checkpoint import directory, manifest
from lion_dist.checkpoint.errors import CheckpointError
from lion_dist.checkpoint.fit import STATE_KEYS, wrong_setting, wrong_state
from lion_dist.checkpoint.metadata import DTYPES
from lion_dist.checkpoint.ranks import Ranks, describe
from lion_dist.checkpoint.save import Snapshot, write
from lion_dist.checkpoint.sharded_state import GROUP_KEYS, boxed
from lion_dist.checkpoint.storage import Reader, start_of_data


def consolidate(path: str | Path, target: str | Path, progress: manifest.Progress | None = None) -> None:
    """Write the checkpoint ``path`` to the file ``target``. Holds one piece at a time.

    Args:
        progress: told of bytes as they are done.

    Raises:
        CheckpointError: a checkpoint that is damaged, or ``target`` exists or cannot be written.
    """
    found, target = directory.find(values.path("path", path)), values.path("target", target)
    if target.exists():
        raise CheckpointError(f"{target} exists: give another name, or remove it first")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is no folder: make it first, or give another one")
    entries = manifest.read(found)
    manifest.check_sizes(found, entries["files"])
    for name, entry in entries["files"].items():
        manifest.check_contents(found, name, entry)
    reader = Reader(found, entries["files"])
    # torch.empty memory that is never touched takes none; the file gets room for it.
    empty = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in reader.metadata.state_dict_metadata.items()
    }
    partial = target.with_name(target.name + ".partial")
    try:
        with torch.serialization.skip_data():
            torch.save(_as_one(empty, entries), partial)
        with open(partial, "r+b") as file:
            for key, start in _starts_in(partial, _order_in_file(empty, entries)).items():
                if empty[key].numel():
                    _fill(file, start, empty[key], key, reader, progress)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(target)
        directory.sync(target.parent)
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{target} could not be written. {describe(error)}") from error


def import_consolidated(source: str | Path, path: str | Path, progress: manifest.Progress | None = None) -> None:
    """Make the checkpoint ``path`` of the file ``source``: one of :func:`consolidate`, or one saved by a program that
    trains with lion-pytorch as ``{"model": model.state_dict(), "optimizer": optimizer.state_dict()}``.

    Tensors are read from the file as they are written; nothing but tensors and numbers is unpickled.

    Raises:
        CheckpointError: the file is something else, or does not say which state belongs to which parameter.
    """
    source, path = values.path("source", source), values.path("path", path)
    try:
        _check_archive(source)
        content = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        found = ", ".join(_unsafe_globals(source)) or "an object"
        raise CheckpointError(
            f"{source} holds more than tensors and numbers ({found}), which could run code when it is unpickled. Save "
            '{"model": model.state_dict(), "optimizer": optimizer.state_dict()} alone.'
        ) from error
    except Exception as error:  # a damaged file can end in anything
        raise CheckpointError(f"{source} is no file of torch.save: {error!r:.300}") from error
    if not isinstance(content, dict) or not {"model", "optimizer"} <= content.keys():
        raise CheckpointError(f'{source} is no consolidated checkpoint: it needs "model" and "optimizer"')
    model, optimizer = content["model"], content["optimizer"]
    _check_form(source, model, optimizer)
    groups = _named_groups(source, model, optimizer)
    _check_state(source, model, optimizer, groups)
    extra = _checked_extra(source, content.get("extra", {}))
    firsts: dict[tuple, str] = {}
    tied = {}
    for name, tensor in model.items():
        first = firsts.setdefault((tensor.untyped_storage().data_ptr(), tensor.shape, tensor.storage_offset()), name)
        if first != name and tensor.numel():
            tied[name] = first
    tensors = {f"model.{name}": boxed(tensor) for name, tensor in model.items() if name not in tied}
    for group, saved in zip(groups, optimizer["param_groups"], strict=True):
        for name, i in zip(group["params"], saved["params"], strict=True):
            tensors |= _state_tensors(name, optimizer["state"].get(i, {}))
    entries = {"param_groups": groups, "extra": extra, "tied": tied}
    write(directory.absolute(path), Snapshot(tensors, entries), Ranks(None), progress)


# ---- to one file


def _as_one(tensors: dict[str, Tensor], entries: dict) -> dict:
    model = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    model |= {second: model[first] for second, first in entries["tied"].items()}
    state, groups = {}, []
    for group in entries["param_groups"]:
        ids = list(range(len(state), len(state) + len(group["params"])))
        for i, name in zip(ids, group["params"], strict=True):
            kinds = {kind: f"optimizer.{name}.{kind}" for kind in STATE_KEYS}
            state[i] = {kind: tensors[key] for kind, key in kinds.items() if key in tensors}
        settings = {key: group[key] for key in GROUP_KEYS if key in group} | {"betas": tuple(group["betas"])}
        groups.append(settings | {"params": ids, "param_names": group["params"]})
    state = {i: kinds for i, kinds in state.items() if kinds}
    return {"model": model, "optimizer": {"state": state, "param_groups": groups}, "extra": entries["extra"]}


def _order_in_file(tensors: dict[str, Tensor], entries: dict) -> list[str]:
    """Names of the tensors in the order in which ``torch.save`` meets their storages."""
    keys = {id(tensor): key for key, tensor in tensors.items()}
    content = _as_one(tensors, entries)
    met = [*content["model"].values(), *(t for kinds in content["optimizer"]["state"].values() for t in kinds.values())]
    return list(dict.fromkeys(keys[id(tensor)] for tensor in met))


def _starts_in(path: Path, order: list[str]) -> dict[str, int]:
    with zipfile.ZipFile(path) as zipped, open(path, "rb") as file:
        entries = {entry.filename.split("/", 1)[1]: entry for entry in zipped.infolist()}
        starts = {}
        for number, key in enumerate(order):
            entry = entries[f"data/{number}"]
            file.seek(entry.header_offset)
            starts[key] = start_of_data(entry.header_offset, file.read(30))
    return starts


def _fill(file, start: int, like: Tensor, key: str, reader: Reader, progress: manifest.Progress | None) -> None:
    file.seek(start)
    for box in boxed(like).pieces:  # in row-major order: one follows the other in the file
        piece = torch.empty(box.sizes, dtype=like.dtype)
        reader.read_into({key: BoxedTensor(like.shape, {box: piece}, dtype=like.dtype, device=like.device)})
        # Not through mmap, where a full disk is a SIGBUS: the file that skip_data leaves has no blocks here yet.
        file.write(piece.view(-1).view(torch.uint8).numpy())
        if progress is not None:
            progress(piece.nbytes)


# ---- from one file


def _check_archive(source) -> None:
    """Raise CheckpointError for a zip of compressed members: torch maps their bytes as if they were plain."""
    with manifest.open_regular(Path(source)) as file, zipfile.ZipFile(file) as zipped:
        compressed = [entry.filename for entry in zipped.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise CheckpointError(f"{source} is a compressed zip ({compressed[0]}), which torch.save does not write")


def _unsafe_globals(source) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except Exception:  # it is for a message only, and the pickle may be damaged as well
        return []


def _check_form(source, model: object, optimizer: object) -> None:
    """Raise CheckpointError unless they are ``state_dict()`` of a model and of a Lion."""
    if not isinstance(model, dict):
        raise CheckpointError(f'{source}: "model" is a {type(model).__name__}. Save model.state_dict() there.')
    others = [name for name, value in model.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f'{source}: "model" holds {others[0]!r}, a {type(model[others[0]]).__name__} and no tensor ({len(others)} '
            "of them). Make extra state of modules buffers, or leave it out."
        )
    for name, tensor in model.items():
        wrong = "is not named by a string" if not isinstance(name, str) else _wrong_tensor(tensor)
        if wrong is not None:
            raise CheckpointError(f'{source}: {name!r} of "model" {wrong}')
    if not isinstance(optimizer, dict) or not {"state", "param_groups"} <= optimizer.keys():
        raise CheckpointError(f'{source}: "optimizer" lacks "state" or "param_groups". Save its state_dict() there.')
    if not isinstance(optimizer["state"], dict) or not isinstance(optimizer["param_groups"], list):
        raise CheckpointError(f'{source}: "state" or "param_groups" is of another kind than in a state_dict()')
    for i, group in enumerate(optimizer["param_groups"]):
        if not isinstance(group, dict) or not isinstance(group.get("params", []), list):
            raise CheckpointError(f"{source}: param group {i} is of another kind than in a state_dict()")
        missing = sorted({"betas", "params"} - group.keys())
        if missing:
            raise CheckpointError(
                f"{source}: param group {i} has {sorted(group)} but no {', '.join(missing)}: it is not a Lion's. Keep "
                "the model alone, and start with fresh optimizer state."
            )
        names = group.get("param_names")
        if not all(isinstance(key, int | str) for key in group["params"]):
            raise CheckpointError(f'{source}: "params" of param group {i} are no numbers')
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            raise CheckpointError(f'{source}: "param_names" of param group {i} are no names, but {names!r:.60}')
        if names is not None and len(names) != len(group["params"]):
            raise CheckpointError(
                f'{source}: param group {i} has {len(names)} "param_names" for {len(group["params"])} parameters. '
                "Write one for each, as in the model's state_dict()."
            )


def _wrong_tensor(tensor: Tensor) -> str | None:
    """Why a checkpoint cannot hold it; None when it can."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in DTYPES.values():
        return f"is {tensor.layout} of {tensor.dtype}, and a checkpoint holds plain tensors. Make it dense first."
    if tensor.device.type != "cpu":
        return f"has no data in the file, but is on {tensor.device}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"has {tensor.nbytes} bytes, the file {tensor.untyped_storage().nbytes()} of them. Clone it first."
    return None


def _check_state(source, model: dict[str, Tensor], optimizer: dict, groups: list[dict]) -> None:
    """Raise CheckpointError unless settings, and the state of each parameter, could be loaded again."""
    for i, (group, saved) in enumerate(zip(groups, optimizer["param_groups"], strict=True)):
        wrong = wrong_setting(group)
        if wrong is not None:
            raise CheckpointError(f"{source}: param group {i} {wrong}")
        for name, key in zip(group["params"], saved["params"], strict=True):
            if name not in model:
                raise CheckpointError(f'{source}: param group {i} names {name!r}, which is not in "model"')
            state = optimizer["state"].get(key, {})
            wrong = "is no dict" if not isinstance(state, dict) else _wrong_kinds(state, model[name])
            if wrong is not None:
                raise CheckpointError(f"{source}: the state of {name!r} {wrong}")


def _wrong_kinds(state: dict, param: Tensor) -> str | None:
    for kind in STATE_KEYS:
        if kind not in state:
            continue
        value = torch.as_tensor(state[kind]) if type(state[kind]) is int else state[kind]
        if not isinstance(value, Tensor):
            return f"holds {kind}, a {type(value).__name__}"
        wrong = _wrong_tensor(value) or wrong_state(kind, value.shape, value.dtype, param.shape, param.dtype)
        if wrong is not None:
            return f"holds {kind}, which {wrong}"
    return None


def _checked_extra(source, extra: object) -> dict:
    try:
        if not isinstance(extra, dict):
            raise TypeError(f"it is a {type(extra).__name__}")
        return json.loads(json.dumps(extra))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f'{source}: "extra" must be a dict of JSON values: {error}') from error


def _named_groups(source, model: dict[str, Tensor], optimizer: dict) -> list[dict]:
    groups = []
    for group in optimizer["param_groups"]:
        names = group.get("param_names")
        if names is None:
            names = _names_by_order(source, model, optimizer)
        settings = {key: _plain(group[key]) for key in GROUP_KEYS if key in group}
        groups.append(settings | {"params": list(names)})
    return groups


def _plain(value: object) -> object:
    """A learning rate may be a tensor, betas are a tuple."""
    if isinstance(value, Tensor) and value.numel() == 1 and _wrong_tensor(value) is None:
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _names_by_order(source, model: dict[str, Tensor], optimizer: dict) -> list[str]:
    """Without names: one group that holds every tensor of the model, in its order."""
    groups = optimizer["param_groups"]
    states = [optimizer["state"].get(i) for group in groups for i in group["params"]]
    moments = [state.get("exp_avg") for state in states if isinstance(state, dict)]
    shapes = [moment.shape for moment in moments if isinstance(moment, Tensor)]
    if len(groups) == 1 and shapes == [tensor.shape for tensor in model.values()]:
        return list(model)
    raise CheckpointError(
        f"{source} does not say which optimizer state belongs to which parameter. Save it from an optimizer made with "
        '(name, parameter) pairs, or add "param_names" to each of its param_groups.'
    )


def _state_tensors(name: str, state: dict) -> dict[str, BoxedTensor]:
    return {f"optimizer.{name}.{kind}": boxed(torch.as_tensor(state[kind])) for kind in STATE_KEYS if kind in state}
