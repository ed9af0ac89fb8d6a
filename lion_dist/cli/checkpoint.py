"""``lion-dist checkpoint {inspect,convert,verify}``: in one process, without a model or a process group."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lion_dist.cli.errors import UsageError
from lion_dist.reporting import ProgressBar, aligned

MIB = 1 << 20


def add_parser(verbs) -> None:
    parser = verbs.add_parser("checkpoint", help="look at a checkpoint, check it, convert it")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    inspect = actions.add_parser("inspect", help="print what a checkpoint holds")
    inspect.add_argument("path", type=Path, help="the directory that save() was given")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.set_defaults(run=run_inspect)

    verify = actions.add_parser("verify", help="read every file and compare checksums")
    verify.add_argument("path", type=Path, help="the directory that save() was given")
    verify.set_defaults(run=run_verify)

    convert = actions.add_parser("convert", help="to a consolidated file that lion-pytorch loads, or back")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument(
        "--to",
        required=True,
        choices=("lion-pytorch", "lion-dist"),
        help="lion-pytorch: from a checkpoint to one torch.save file; lion-dist: from such a file to a checkpoint",
    )
    convert.set_defaults(run=run_convert)


def run_inspect(args: argparse.Namespace) -> int:
    with _usage_errors():
        _inspect(args)
    return 0


def run_convert(args: argparse.Namespace) -> int:
    with _usage_errors():
        _convert(args)
    return 0


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    from lion_dist.checkpoint import CheckpointError

    try:
        yield
    except (CheckpointError, OSError) as error:
        raise UsageError(str(error)) from error


def _inspect(args: argparse.Namespace) -> None:
    from lion_dist.checkpoint.contents import read_contents

    contents = read_contents(args.path)
    saved = f"{contents.saved:%Y-%m-%d %H:%M:%S} UTC"
    print(f"{args.path}: format {contents.format}, saved {saved}, {len(contents.files)} files")
    rows = [("", "tensors", "dtype", "elements", "MiB")]
    kinds: dict[tuple[str, str], Counter] = {}
    for tensor in contents.tensors:
        kinds.setdefault((tensor.kind, tensor.dtype), Counter()).update(
            tensors=1, elements=tensor.numel, nbytes=tensor.nbytes
        )
    for (kind, dtype), sums in kinds.items():
        rows.append((kind, sums["tensors"], dtype, sums["elements"], f"{sums['nbytes'] / MIB:.2f}"))
    print(aligned(rows))
    for i, group in enumerate(contents.param_groups):
        settings = ", ".join(f"{key} {value}" for key, value in group.items() if key != "params")
        print(f"param group {i}: {len(group['params'])} parameters, {settings}")
    for second, first in contents.tied.items():
        print(f"tied: {second} is {first}")
    for key, value in contents.extra.items():
        print(f"extra: {key} = {value}")
    if args.tensors:
        rows = [("tensor", "shape", "dtype", "pieces")]
        rows += [(t.name, "x".join(map(str, t.shape)) or "scalar", t.dtype, t.pieces) for t in contents.tensors]
        print(aligned(rows))


def run_verify(args: argparse.Namespace) -> int:
    try:
        return _verify(args)
    except OSError as error:
        raise UsageError(str(error)) from error


def _verify(args: argparse.Namespace) -> int:
    from lion_dist.checkpoint import CheckpointError, verify
    from lion_dist.checkpoint.contents import read_contents

    if not args.path.exists():
        raise UsageError(f"there is nothing at {args.path}. Give the directory that save() was given.")
    try:
        total = sum(entry["bytes"] for entry in read_contents(args.path).files.values())
        with ProgressBar("checked", total, "MiB", MIB) as progress:
            verify(args.path, progress)
    except CheckpointError as error:
        print(f"lion-dist: {error}", file=sys.stderr)
        return 1
    print(f"{args.path}: whole, {total / MIB:.1f} MiB as written")
    return 0


def _convert(args: argparse.Namespace) -> None:
    from lion_dist.checkpoint.consolidated import consolidate, import_consolidated
    from lion_dist.checkpoint.contents import read_contents

    if args.to == "lion-pytorch":
        total = sum(tensor.nbytes for tensor in read_contents(args.source).tensors if tensor.kind != "counters")
        with ProgressBar("written", total, "MiB", MIB) as progress:
            consolidate(args.source, args.target, progress)
    else:
        if not args.source.is_file():
            raise UsageError(f"{args.source} is no file; --to lion-dist converts a file of torch.save")
        with ProgressBar("written", args.source.stat().st_size, "MiB", MIB) as progress:
            import_consolidated(args.source, args.target, progress)
    print(args.target)
