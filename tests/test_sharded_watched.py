"""What ShardedLion chose and what it does can be watched: a line in the log, labels under the profiler."""

import json
import logging
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from lion_dist import ShardedLion, ShardingConfig, SpikeGuard
from lion_dist.benchmarks.traces import CAUSES, read_trace
from lion_dist.sharding.phases import LABEL
from tests.models import mlp


def profile_of_training(in_backward: bool = False, guard: SpikeGuard | None = None) -> torch.profiler.profile:
    model, sharding = mlp(4, 8, 4), ShardingConfig(bucket_numel=64, update_in_backward=in_backward)
    opt = ShardedLion(model.parameters(), module=model, sharding=sharding, skip_spikes=guard)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):
            model(torch.ones(2, 4)).square().sum().backward()
            if not in_backward:
                opt.clip_grad_norm_(1.0)
            opt.step()
        opt.finish_param_sync()  # or gloo's threads may write into a profile that has ended, and crash when it is freed
    return profile


def train_under_the_profiler(in_backward: bool = False) -> set[str]:
    profile = profile_of_training(in_backward)
    return {event.name for event in profile.events() if event.name.startswith("lion_dist.")}


def test_every_phase_carries_a_label_with_the_first_and_last_parameter_of_its_bucket(gloo):
    for labels in gloo.run(2, train_under_the_profiler):
        assert {"lion_dist.norm", "lion_dist.update"} <= labels
        for phase in ("grad_sync", "param_sync"):
            assert f"lion_dist.{phase} 0.weight .. 0.bias" in labels, sorted(labels)
            assert f"lion_dist.{phase} 2.weight .. 2.bias" in labels


def test_updates_in_backward_carry_labels_too(gloo):
    for labels in gloo.run(2, train_under_the_profiler, True):
        assert "lion_dist.norm" in labels
        for phase in ("grad_sync", "update", "param_sync"):
            assert f"lion_dist.{phase} 0.weight .. 0.bias" in labels, sorted(labels)
            assert f"lion_dist.{phase} 2.weight .. 2.bias" in labels


def number_of_checks(guard: SpikeGuard | None) -> int:
    return sum(event.name == "lion_dist.norm" for event in profile_of_training(guard=guard).events())


def test_what_a_guard_against_spikes_asks_carries_the_label_of_the_check(gloo):
    assert gloo.run(2, number_of_checks, None) == [2, 2]
    assert gloo.run(2, number_of_checks, SpikeGuard()) == [4, 4]


def causes_in_an_exported_trace() -> set[str]:
    """What a kernel would belong to that each label's thread launches as it begins."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile_of_training().export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        for i, event in enumerate([e for e in events if e.get("name", "").startswith(LABEL)]):
            launch = {"name": "cudaLaunchKernel", "ts": event["ts"], "args": {"correlation": i}}
            events.append({"cat": "cuda_runtime", "pid": event["pid"], "tid": event["tid"], **launch})
            events.append({"cat": "kernel", "name": "k", "ts": 0.0, "dur": 1.0, "args": {"correlation": i}})
        path.write_text(json.dumps({"traceEvents": events}))
        return {kernel.cause for kernel in read_trace(path).kernels}


def test_the_overlap_benchmark_finds_the_labels_that_the_profiler_has_written(gloo):
    for causes in gloo.run(2, causes_in_an_exported_trace):
        assert causes == set(CAUSES)


def log_of_construction() -> list[str]:
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("lion_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    ShardedLion(mlp(4, 8, 4).parameters(), sharding=ShardingConfig(bucket_numel=64))
    logger.removeHandler(handler)
    return [dist.get_rank(), *lines]


def test_first_rank_logs_what_was_chosen(gloo):
    (_, *first), (_, *second) = gloo.run(2, log_of_construction)
    assert not second
    (line,) = first
    for words in ("76 parameters in 4 tensors", "2 ranks x 1 replicas", "ZeRO stage 2", "2 buckets", "transport: gloo"):
        assert words in line
