"""What a rank says when it fails: what it was doing, and what has become of the others.

A rank that waits for a dead or stuck one gets an error from gloo or NCCL that names a socket or a sequence number. So
every rank that fails leaves word in the rendezvous store, which outlives the process group, and reads the others':
whoever leaves no word was killed or is stuck.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

WORD_SECONDS = 2.0  # between leaving word and reading the others': they fail at about the same time
SHOWN = 8  # ranks whose word is printed


@contextmanager
def doing(what: str) -> Iterator[None]:
    """An error that leaves the block carries a note of what this rank was doing; blocks may be nested."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def fail(error: Exception, store: dist.Store, rank: int, world_size: int) -> NoReturn:
    """Prints the traceback and what is known of all ranks, and ends the process with exit code 1."""
    what = ", ".join(getattr(error, "__notes__", ["the run"]))
    reason = traceback.format_exception_only(error)[0].splitlines()[0]
    word = {"rank": rank, "doing": what, "error": reason}
    traceback.print_exception(error)
    get_error_handler().record_exception(error)  # torchrun's own summary
    lines = [f"compare_engines.py: rank {rank} of {world_size} failed in {what}: {reason}"]
    lines += _others(store, word, world_size) if world_size > 1 else []
    print("\n".join(lines), file=sys.stderr, flush=True)
    leave_at_once(1)


def refuse(reason: str) -> None:
    """Prints once a node what all of its ranks have found.

    torchrun ends the other ranks as soon as one has left, so those that say nothing wait for the one that does: ranks
    that have not met may be seconds apart. torchrun ends their waiting, too.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(reason, file=sys.stderr, flush=True)
    else:
        time.sleep(WORD_SECONDS if dist.is_initialized() else 15 * WORD_SECONDS)


def leave_at_once(exit_code: int) -> NoReturn:
    """Past the interpreter's own end, where a process group that is not shut down on all ranks may be waited for, or
    abort the process: gloo's did so once in some fifty runs (torch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _others(store: dist.Store, word: dict, world_size: int) -> list[str]:
    """One line on each other rank, those without a word first."""
    try:
        store.append("failures", json.dumps(word) + "\n")
        time.sleep(WORD_SECONDS * (2 if word["rank"] == 0 else 1))  # the store may be this process's own
        words = [json.loads(line) for line in store.get("failures").decode().splitlines()]
    except dist.DistError as lost:
        return [f"  no word from any: the store they leave it in, rank 0's or its torchrun's, is gone ({lost})"]
    heard = {w["rank"]: f"failed in {w['doing']}: {w['error']}" for w in words if w["rank"] != word["rank"]}
    silent = [rank for rank in range(world_size) if rank != word["rank"] and rank not in heard]
    lines = [f"  rank {rank}: no word from it, it was killed, is stuck or trains on" for rank in silent]
    lines += [f"  rank {rank}: {text}" for rank, text in sorted(heard.items())]
    return lines[:SHOWN] + ([f"  and {len(lines) - SHOWN} ranks more"] if len(lines) > SHOWN else [])
