"""``lion-dist suggest``: a first learning rate, weight decay and betas, from an AdamW recipe."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict

from lion_dist.cli.errors import UsageError
from lion_dist.planning.from_adamw import suggest
from lion_dist.reporting import aligned

UNITS = {"": 1.0, "K": 1e3, "M": 1e6}


def add_parser(verbs) -> None:
    parser = verbs.add_parser(
        "suggest",
        help="a first learning rate, weight decay and betas, from an AdamW recipe",
        description="Where to begin with Lion when AdamW's hyperparameters are known: each line with its source and "
        "what stands behind it. docs/from-adamw.md says how to tune from there.",
        epilog="Example: lion-dist suggest --adamw-lr 3e-4 --adamw-wd 0.1 --batch-tokens 0.5M",
    )
    add = parser.add_argument
    add("--adamw-lr", required=True, type=float, metavar="3e-4", help="AdamW's peak learning rate")
    add("--adamw-wd", required=True, type=float, metavar="0.1", help="AdamW's weight decay")
    add("--vision", action="store_true", help="the paper's default betas, not those for language models")
    add("--batch-tokens", type=_tokens, metavar="0.5M", help="tokens a step of the job, over all ranks")
    add("--recipe-batch-tokens", type=_tokens, metavar="4M",
        help="tokens a step where these betas are known to be good; keeps beta2's half-life in tokens")  # fmt: skip
    add("--json", action="store_true", help="the lines as JSON")
    parser.set_defaults(run=run)


def _tokens(text: str) -> float:
    match = re.fullmatch(r"([0-9]+\.?[0-9]*(?:[eE][0-9]+)?)([KM]?)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens; write 500000, 5e5, 500K or 0.5M")
    return float(match[1]) * UNITS[match[2]]


def run(args) -> int:
    try:
        found = suggest(
            args.adamw_lr,
            args.adamw_wd,
            language_model=not args.vision,
            batch_tokens=args.batch_tokens,
            recipe_batch_tokens=args.recipe_batch_tokens,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.json:
        print(json.dumps([asdict(line) for line in found], indent=2))
        return 0
    rows = [("", "begin with", "look at", "source", "evidence")]
    rows += [(line.name, line.value, line.look, line.source, line.evidence) for line in found]
    print(aligned(rows, text_columns=5))
    return 0
