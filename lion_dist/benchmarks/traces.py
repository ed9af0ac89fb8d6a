"""What the device did in a trace of ``torch.profiler``, and which phase of a step each piece of it belongs to.

A kernel, copy or fill has the number (``correlation``) of the call that launched it; the call has a thread and a time
of the host. The innermost label of ``sharding/phases.py`` on that thread at that time is the phase. All kernels of a
replayed CUDA graph have the number of its launch. Labels of others (of a model, of NCCL) are nobody's phase.

Work that was launched outside every label computes: forward and backward; so does what measures (metrics, checksums).
So does work whose launch is not in the trace, for want of knowledge: it is counted, and said.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lion_dist.sharding.phases import LABEL, PHASES, Phase

CAUSES: tuple[Phase, ...] = ("update", "grad_sync", "param_sync", "norm")
COMPUTE = "compute"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
NCCL = "nccl"  # its kernels' names begin so
PEER_BARRIER = "barrier_kernel"  # of torch's symmetric memory


class TraceError(ValueError):
    """A trace that does not show what belongs to which phase."""


@dataclass(frozen=True)
class Kernel:
    """What ran on the device. ``cause``: one of ``CAUSES``, or ``COMPUTE``."""

    cause: str
    start: float  # microseconds
    stop: float
    communicates: bool = False


@dataclass(frozen=True)
class Trace:
    """Attributes:
    kernels: in the order of their starts.
    unattributed: how many of them have no launch in the trace.
    unlabelled_graphs: how many came from CUDA graphs that were replayed outside every label.
    """

    kernels: list[Kernel]
    unattributed: int = 0
    unlabelled_graphs: int = 0

    def doubts(self) -> Iterator[str]:
        """What has been counted as computing and may be something else, a line each."""
        of = f"of {len(self.kernels)} kernels, copies and fills"
        if self.unattributed:
            yield f"{self.unattributed} {of} have no launch in the trace, and count as {COMPUTE}"
        if self.unlabelled_graphs:
            yield (
                f"{self.unlabelled_graphs} {of} were replayed by CUDA graphs outside every label, and count as "
                f"{COMPUTE}; if a graph holds a whole step (CapturedStep), trace the step uncaptured"
            )


class Label:
    """One stretch of the host's time in a phase."""

    def __init__(self, event: dict):
        self.start, self.stop = event["ts"], event["ts"] + event["dur"]
        self.phase = event["name"].removeprefix(LABEL).split(" ")[0]
        self.outer: Label | None = None
        self.has_barrier = False  # it moves bytes between peers


class Labels:
    """The labels of one thread, of which each lies within another one or beside it."""

    def __init__(self, labels: Iterable[Label]):
        self._labels = sorted(labels, key=lambda label: (label.start, -label.stop))
        self._starts = [label.start for label in self._labels]
        outer: Label | None = None
        for label in self._labels:
            while outer is not None and outer.stop <= label.start:
                outer = outer.outer
            label.outer, outer = outer, label

    def __iter__(self) -> Iterator[Label]:
        return iter(self._labels)

    def innermost(self, time: float) -> Label | None:
        i = bisect_right(self._starts, time)
        label = self._labels[i - 1] if i else None
        while label is not None and label.stop <= time:
            label = label.outer
        return label


def read_trace(path: Path) -> Trace:
    """Read what ``torch.profiler.profile.export_chrome_trace`` has written.

    Raises:
        TraceError: it holds nothing of a device, or no label; or a phase that is not known here.
    """
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        events = json.load(file)["traceEvents"]
    on_device = sorted((e for e in events if e.get("cat") in ON_DEVICE), key=lambda e: e["ts"])
    by_thread = _labels_of(events)
    _refuse_blind(path, on_device, by_thread)
    launches = {_correlation(e): e for e in events if e.get("cat") in LAUNCHES}
    launches.pop(None, None)
    return _attributed(on_device, launches, by_thread)


def _labels_of(events: list[dict]) -> dict[tuple, Labels]:
    by_thread: dict[tuple, list[Label]] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"].startswith(LABEL):
            by_thread.setdefault((event["pid"], event["tid"]), []).append(Label(event))
    return {thread: Labels(labels) for thread, labels in by_thread.items()}


def _refuse_blind(path: Path, on_device: list[dict], by_thread: dict[tuple, Labels]) -> None:
    if not on_device:
        raise TraceError(
            f"{path} holds no kernel, copy or fill of a GPU. Profile with ProfilerActivity.CUDA, on a machine with one."
        )
    if not by_thread:
        raise TraceError(
            f"{path} holds {len(on_device)} kernels, copies and fills, and no label {LABEL}* of a phase: all would "
            "count as computing. Trace again with ProfilerActivity.CPU and .CUDA both (without CPU no label is "
            "recorded), eager steps (a CapturedStep replays without labels), and this version of lion_dist."
        )
    unknown = {label.phase for labels in by_thread.values() for label in labels} - set(PHASES)
    if unknown:
        raise TraceError(
            f"{path} holds labels of phases {sorted(unknown)}, and this version of lion_dist knows {list(PHASES)}. "
            "Read the trace with the version that has written it."
        )


def _attributed(on_device: list[dict], launches: dict[int, dict], by_thread: dict[tuple, Labels]) -> Trace:
    found, unattributed, unlabelled_graphs = [], 0, 0
    for event in on_device:
        launch, label = launches.get(_correlation(event)), None
        if launch is None:
            unattributed += 1
        else:
            labels = by_thread.get((launch["pid"], launch["tid"]))
            label = None if labels is None else labels.innermost(launch["ts"])
            unlabelled_graphs += label is None and "GraphLaunch" in launch["name"]
        if label is not None and PEER_BARRIER in event["name"]:
            label.has_barrier = True
        found.append((event, label))
    return Trace([_kernel(*pair) for pair in found], unattributed, unlabelled_graphs)


def _kernel(event: dict, label: Label | None) -> Kernel:
    cause = COMPUTE if label is None or label.phase not in CAUSES else label.phase
    return Kernel(cause, event["ts"], event["ts"] + event["dur"], _communicates(event, label))


def _communicates(event: dict, label: Label | None) -> bool:
    """NCCL's kernels do, whoever launched them; of a label with a barrier between peers, copies, fills and barriers."""
    if event["cat"] == "kernel" and event["name"].startswith(NCCL):
        return True
    return label is not None and label.has_barrier and (event["cat"] != "kernel" or PEER_BARRIER in event["name"])


def _correlation(event: dict) -> int | None:
    return event.get("args", {}).get("correlation")
