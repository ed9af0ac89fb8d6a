"""``lion-dist doctor``: does this machine run what it should, and what to do where it does not.

Alone it starts ranks of its own for the collectives (one a GPU, else two on the CPU); under torchrun every rank takes
part, so that a broken node is named by its host.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from lion_dist.cli import collective_check, machine_checks
from lion_dist.cli.findings import BROKEN, Finding, report

OTHERS_FAILED = Finding("collectives", BROKEN, "this rank's worked, but another rank did not answer", "see its lines")


def add_parser(verbs) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="versions, GPUs, a kernel and a collective check, and what would not work here",
        description="Checks this machine: versions, GPUs, the kernels against the reference implementation, and "
        "collectives. Exits with 1 when something is broken. Under torchrun it checks every rank: "
        "torchrun --nproc-per-node 8 -m lion_dist.cli doctor",
    )
    parser.set_defaults(run=run)


def run(_args) -> int:
    findings = [finding for check in machine_checks.CHECKS for finding in _guarded(check)]
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        findings += _guarded(collective_check.under_torchrun)
        findings, speaks = _from_all_ranks(findings)
        if speaks:
            print(report(findings), flush=True)
    else:
        findings += _guarded(collective_check.on_own_ranks)
        print(report(findings))
    return 1 if any(finding.state == BROKEN for finding in findings) else 0


def _guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check that itself fails is a finding: the report must come out whatever is wrong."""
    try:
        return check()
    except Exception as error:
        return [
            Finding(check.__name__.replace("_", " "), BROKEN, f"the check ended with {type(error).__name__}: {error}")
        ]


def _from_all_ranks(findings: list[Finding]) -> tuple[list[Finding], bool]:
    """What this rank reports, and whether it does: the first rank for all, or each for itself where they cannot talk.

    The first rank's findings, and what is broken on others, by rank and host.
    """
    try:
        if findings[-1].state == BROKEN:  # the collectives
            raise RuntimeError
        by_rank: list = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, (socket.gethostname(), findings))
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError:  # this rank's collectives failed, or, after a time-out, another's
        me = f"rank {os.environ['RANK']} on {socket.gethostname()}"
        broken = [finding for finding in findings if finding.state == BROKEN]
        return [replace(f, what=f"{f.what}, {me}") for f in broken or [OTHERS_FAILED]], True
    merged = list(by_rank[0][1])
    for rank, (host, others) in enumerate(by_rank[1:], 1):
        for finding in others:
            if finding.state == BROKEN and finding not in by_rank[0][1]:
                merged.append(replace(finding, what=f"{finding.what}, rank {rank} on {host}"))
    return merged, os.environ["RANK"] == "0"
