"""``lion-dist VERB``: what a user asks before, beside and after a training run.

A verb is a module of this package with ``add_parser(verbs)``, which adds its arguments and sets
``parser.set_defaults(run=function)``; ``run(args)`` returns the exit code. Exit codes: 0 well, 1 the verb found
something broken, 2 the user asked for something that cannot be (one line on stderr). What a verb needs beyond torch it
imports inside its functions, so that ``--help`` is quick and no verb needs another's packages.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from lion_dist import __version__
from lion_dist.cli import checkpoint, doctor, plan, plot, suggest
from lion_dist.cli.errors import UsageError

VERBS = (checkpoint, doctor, plan, plot, suggest)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lion-dist",
        description="Tools around the Lion optimizer of lion_dist.",
        epilog="lion-dist VERB --help says more. Training itself is started by torchrun: see docs/launch.md.",
    )
    parser.add_argument("--version", action="version", version=f"lion-dist {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The program. ``argv``: the arguments, ``sys.argv[1:]`` when None. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files are any bytes
    args = make_parser().parse_args(argv)
    try:
        exit_code = args.run(args)
        sys.stdout.flush()
        return exit_code
    except UsageError as error:
        print(f"lion-dist: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would complain of what is left
        return 1
    except OSError as error:  # a file that cannot be read or written
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"lion-dist: {where}{error.strerror or error}. Pass a path that can be used.", file=sys.stderr)
        return 2
