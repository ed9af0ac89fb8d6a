"""An exception anywhere in a step, and ``zero_grad()`` brings a usable optimizer.

OutOfMemoryError or KeyboardInterrupt is raised at every call that the library makes or receives, one after another, by
a profile function. (A rank's own C++ threads are not Python's, so nothing is raised in the middle of a collective.)
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lion_dist
from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.sharding import collectives
from tests.models import mlp
from tests.shared_files import over_shared_files

LIBRARY = str(Path(lion_dist.__file__).parent)
ERRORS = (torch.OutOfMemoryError, KeyboardInterrupt)
# Phase of the step, event and function, what it calls; how often until then, and meetings of ranks in the phase.
Place = tuple[str, str, str, int, int]
SEED = 0


class Calls:
    """Counts the calls of the library while it is entered; raises ``error`` at one ``place`` of them.

    Ranks count apart, so a place is a function and not a number of calls: it is the same on all of them.
    """

    def __init__(self, place: Place | None = None, error: type[BaseException] | None = None):
        self.place, self.error = place, error
        self.places: list[Place] = []
        self._is_entered = False
        self._phase = ""
        self._count: Counter = Counter()
        self._met = 0  # so often have ranks met in this phase, or begun to

    def __enter__(self) -> Calls:
        self._is_entered = True
        return self

    def __exit__(self, *_exception) -> None:
        sys.setprofile(None)

    def begin(self, phase: str) -> None:
        """A phase of the step begins. Only the phase of the place is looked at, because that slows it."""
        self._phase, self._met = phase, 0
        if self._is_entered:
            sys.setprofile(self._look if self.place is None or self.place[0] == phase else None)

    def _look(self, frame, event: str, arg) -> None:
        code = frame.f_code
        if event == "return" or not code.co_filename.startswith(LIBRARY):
            return
        self._met += event == "call" and code.co_name in ("count_sent", "_barrier")
        if self.place is not None and not self.place[1].endswith(code.co_qualname):
            return  # most calls: only those of the place need be counted
        called = "" if event == "call" else getattr(arg, "__name__", "")
        where = self._phase, f"{event} {code.co_qualname}", called
        self._count[where] += 1
        place = *where, self._count[where], self._met
        if self.place is None:
            self.places.append(place)
        elif place == self.place:
            raise self.error(f"injected at {self.place}")


class Run:
    """One optimizer, whose step is interrupted again and again from the same state."""

    def __init__(self, sharding: ShardingConfig, precision: PrecisionPolicy, dtype: torch.dtype, group=None):
        self.model = mlp(8, 8, 8).to(dtype)
        settings = dict(lr=2**-7, weight_decay=0.5, precision=precision, sharding=sharding, process_group=group)
        self.opt = ShardedLion(self.model.parameters(), module=self.model, **settings)
        self.sharding, self.dtype = sharding, dtype
        self.step(Calls())
        self.step(Calls())
        self.start = self.state()
        with Calls() as calls:
            self.step(calls)
        self.places = calls.places
        self.expected = self.state()
        self.restore()

    def step(self, calls: Calls) -> None:
        opt, x = self.opt, torch.full((2, 8), 1.0 + dist.get_rank(), dtype=self.dtype)
        calls.begin("zero_grad")
        opt.zero_grad()
        with opt.no_sync():
            calls.begin("forward")
            loss = self.model(x).square().mean()
            calls.begin("backward")
            loss.backward()
        calls.begin("backward")
        self.model(x + 1).square().mean().backward()
        if not self.sharding.update_in_backward:
            calls.begin("clip")
            opt.clip_grad_norm_(0.1)
        calls.begin("step")
        opt.step()
        calls.begin("sync")
        opt.finish_param_sync()

    def tensors(self) -> list[Tensor]:
        per_shard = [(s.bucket.flat_params, s.exp_avg, s.main_param, s.steps) for s in self.opt.shards]
        return [tensor for tensors in per_shard for tensor in tensors if tensor is not None]

    def state(self) -> list[Tensor]:
        self.opt.finish_param_sync()
        return [tensor.clone() for tensor in self.tensors()]

    def restore(self) -> None:
        for tensor, value in zip(self.tensors(), self.start, strict=True):
            tensor.copy_(value)

    def has(self, state: list[Tensor]) -> bool:
        return all(map(torch.equal, self.tensors(), state))

    def interrupt(self, place: Place, error: type[BaseException]) -> None:
        opt = self.opt
        try:
            with Calls(place, error) as calls:
                self.step(calls)
        except ERRORS:
            opt.zero_grad()
            opt.finish_param_sync()
            early = place[0] in ("zero_grad", "forward", "backward", "clip") and not self.sharding.update_in_backward
            assert not early or self.has(self.start), "a step that was given up has changed the state"
            everybody = _gathered(torch.stack([shard.bucket.flat_params.sum() for shard in opt.shards]))
            assert all(map(torch.equal, everybody, everybody[1:])), "replicas differ"
        self.restore()
        self.step(Calls())
        assert self.has(self.expected), "the step after is another"
        self.restore()


def _gathered(tensor: Tensor) -> list[Tensor]:
    everybody = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, tensor)
    return everybody


SHARDINGS = {
    "stage 1": ShardingConfig(1, bucket_numel=64),
    "stage 2": ShardingConfig(2, bucket_numel=64),
    "codes": ShardingConfig(2, bucket_numel=64, param_sync="coded"),
    "update in backward": ShardingConfig(1, bucket_numel=64, update_in_backward=True),
}


def places_of(run: Run) -> list[Place]:
    """Those that all ranks have."""
    of_ranks = collectives.gather_objects(run.places, dist.group.WORLD)
    common = set.intersection(*map(set, of_ranks))
    return [place for place in of_ranks[0] if place in common]


def interrupt_everywhere(
    name: str, most: int, dtype: torch.dtype = torch.float32, but_those_of: torch.dtype | None = None
) -> tuple[int, int, float]:
    """At ``most`` of the places, but those that a step of the other dtype has. Returns how many were, of how many."""
    run = Run(SHARDINGS[name], PrecisionPolicy(), dtype)
    places = places_of(run)
    if but_those_of is not None:
        others = set(places_of(Run(SHARDINGS[name], PrecisionPolicy(), but_those_of)))
        places = [place for place in places if place not in others]
    chosen = places if len(places) <= most else random.Random(SEED).sample(places, most)
    began = time.monotonic()
    for i, place in enumerate(chosen):
        try:
            run.interrupt(place, ERRORS[i % 2])
        except BaseException as error:
            raise AssertionError(f"{ERRORS[i % 2].__name__} at {place}, seed {SEED}: {error}") from error
    return len(chosen), len(places), time.monotonic() - began


@pytest.mark.parametrize("name", SHARDINGS)
def test_zero_grad_recovers_from_an_exception_at_any_call(gloo, name):
    print(gloo.run(1, interrupt_everywhere, name, 300))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDINGS)
def test_zero_grad_recovers_from_an_exception_at_every_call(gloo, name):
    print(gloo.run(1, interrupt_everywhere, name, 10**6))


@pytest.mark.parametrize("name", SHARDINGS)
def test_zero_grad_on_all_ranks_recovers_from_an_exception_on_all(gloo, name):
    print(gloo.run(2, interrupt_everywhere, name, 100))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "but_those_of"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)], ids=["bf16", "only in fp32"]
)
@pytest.mark.parametrize("name", SHARDINGS)
def test_zero_grad_on_all_ranks_recovers_wherever_the_exception_was(gloo, name, dtype, but_those_of):
    """bf16 has all the state that there is, and fp32 few places of its own."""
    print(gloo.run(2, interrupt_everywhere, name, 10**6, dtype, but_those_of, timeout=600))


def test_zero_grad_recovers_over_peer_memory(gloo):
    print(gloo.run(2, over_shared_files, interrupt_everywhere, "stage 2", 30))


def step_without_zero_grad(name: str) -> str:
    run = Run(SHARDINGS[name], PrecisionPolicy(), torch.float32)
    place = next(p for p in run.places if p[1] == "call Bucket.start_param_sync")
    with pytest.raises(KeyboardInterrupt), Calls(place, KeyboardInterrupt) as calls:
        run.step(calls)
    with pytest.raises(RuntimeError) as raised:
        run.opt.step()
    run.opt.zero_grad()
    run.step(Calls())
    return str(raised.value)


@pytest.mark.parametrize("name", ["stage 2", "update in backward"])
def test_a_step_after_an_update_that_was_ended_is_refused(gloo, name):
    for says in gloo.run(2, step_without_zero_grad, name):
        assert "an exception has ended an update of parameters" in says and "Call zero_grad() on every rank" in says


# ---- on one rank alone


def fail_alone(phase: str, function: str, occurrence: int) -> str:
    """Rank 0 fails, forgets the step and goes on; rank 1 knows nothing of it."""
    torch.manual_seed(0)
    run = Run(SHARDINGS["stage 2"], PrecisionPolicy(), torch.float32, dist.new_group(timeout=timedelta(seconds=2)))
    places = [place for place in run.places if place[0] == phase and place[1] == f"call {function}"]
    place = places[occurrence] if dist.get_rank() == 0 else None
    outcome = "went on"
    try:
        for attempt in range(4):
            try:
                with Calls(place if attempt == 0 else None, torch.OutOfMemoryError) as calls:
                    run.step(calls)
            except torch.OutOfMemoryError:
                run.opt.zero_grad()
    except RuntimeError as error:
        outcome = str(error)
    everybody = _gathered(torch.cat([shard.bucket.flat_params for shard in run.opt.shards]))
    equal = all(torch.equal(everybody[0], other) for other in everybody)
    return f"{'equal' if equal else 'different'} replicas; {outcome}"


@pytest.mark.parametrize(
    ("phase", "function", "occurrence"),
    [
        ("backward", "GradBufferPool.take", 0),
        ("backward", "GradBufferPool.take", -1),
        ("backward", "Bucket.complete_reduction", -1),
        ("clip", "GradNorm._check", 0),
        ("step", "ShardState.grad_slices", 0),
        ("sync", "Bucket.finish_param_sync", -1),
    ],
)
def test_ranks_do_not_drift_apart_when_one_alone_fails(gloo, phase, function, occurrence):
    """They go on alike, or both get an error from gloo when messages do not match or do not come."""
    for outcome in gloo.run(2, fail_alone, phase, function, occurrence, timeout=60):
        print(outcome)
        assert outcome.startswith("equal replicas") or not outcome.endswith("went on"), outcome
