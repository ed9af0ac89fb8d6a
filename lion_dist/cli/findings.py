"""What ``lion-dist doctor`` finds, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``note``: it works, but less well than it could, or something optional is missing."""

    what: str
    state: str
    fact: str
    remedy: str = ""


def report(findings: list[Finding]) -> str:
    """A line for each: its state, what, the fact, and below it the remedy; then the verdict."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        fact = " ".join(finding.fact.split())  # what a compiler or a library says may be many lines
        lines.append(f"{finding.state:<8}{finding.what:<{width + 2}}{fact}")
        if finding.remedy:
            lines.append(" " * (width + 10) + finding.remedy)
    broken = sum(finding.state == BROKEN for finding in findings)
    notes = sum(finding.state == NOTE for finding in findings)
    verdict = f"{broken} broken" if broken else "nothing is broken"
    return "\n".join([*lines, "", f"{verdict}, {notes} {'note' if notes == 1 else 'notes'}"])
