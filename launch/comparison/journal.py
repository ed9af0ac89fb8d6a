"""What the ranks tell each other every --log-every steps, and the first rank writes down."""

import statistics
import time
from argparse import Namespace

import torch
import torch.distributed as dist

from comparison.engines import PlainEngine
from comparison.preemption import Request
from comparison.ranks import mean_over_ranks, say
from comparison.report import Metrics, Progress
from comparison.throughput import Throughput

SLOW = 1.5  # times the median of the ranks' own milliseconds a step


class Journal:
    """Keeps what steps return on the device until the next exchange, which is when the host waits for it.

    Of the first rank only: metrics.jsonl and progress. Every rank calls every method.
    """

    def __init__(self, args: Namespace, engine: PlainEngine, throughput: Throughput, begin: int):
        self.engine, self.throughput = engine, throughput
        self.metrics_every, self.begin = args.metrics_every, begin
        is_first = dist.get_rank() == 0
        self.metrics = Metrics(args.out / "metrics.jsonl", begin) if is_first else None
        self.progress = Progress(args.steps, begin) if is_first else None
        self.unread: list[tuple[int, float, torch.Tensor]] = []
        self.since = time.perf_counter()

    def note(self, step: int, lr: float, values: torch.Tensor) -> None:
        """`values`: fp32 [2] on the device, this rank's loss and the gradient norm."""
        self.unread.append((step, lr, values))

    def exchange(self, request: Request) -> Request:
        """Writes the means over ranks of the steps noted since the last exchange.

        `request` is what signals ask of this rank; returned is what they ask of any. It travels in the same message.
        """
        values = [values for *_, values in self.unread]
        *means, asked = mean_over_ranks(torch.stack([*values, values[0].new_tensor(request)])).tolist()
        speed = self.throughput.columns(len(means), time.perf_counter() - self.since)
        rows = [
            {"step": step, "loss": loss, "lr": lr, "grad_norm": norm} | speed
            for (step, lr, _), (loss, norm) in zip(self.unread, means, strict=True)
        ]
        self._add_measured(rows)
        if self.metrics is not None:
            self.metrics.write(rows)
            self.progress.update(rows[-1])
        self.unread, self.since = [], time.perf_counter()
        return Request(*asked)

    def _add_measured(self, rows: list[dict]) -> None:
        """The optimizer's metrics go into the row of the step that it has measured."""
        measured = [row for row in rows if self.metrics_every and (row["step"] - self.begin) % self.metrics_every == 0]
        if not measured:
            return
        metrics = self.engine.metrics()
        if metrics.pop("step"):  # else every step so far was skipped
            measured[-1] |= metrics | measured[-1]
            slow = _slow_rank(metrics["slowest_rank"], metrics["rank_ms"])
            if slow is not None:
                say(f"step {measured[-1]['step']}: {slow}")

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()


def _slow_rank(slowest: int | None, rank_ms: list[float]) -> str | None:
    """What to say of a rank that holds up the others; None: there is none."""
    if slowest is None:
        return None
    own, median = rank_ms[slowest], statistics.median(rank_ms)
    if own <= SLOW * median:
        return None
    return f"rank {slowest} is slow, {own:.1f} ms of its own a step where the median is {median:.1f}"
