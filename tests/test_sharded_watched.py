"""What ShardedLion chose and what it does can be watched: a line in the log, labels under the profiler."""

import logging

import torch
import torch.distributed as dist

from lion_dist import ShardedLion, ShardingConfig
from tests.models import mlp


def train_under_the_profiler() -> set[str]:
    model = mlp(4, 8, 4)
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(bucket_numel=64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):
            model(torch.ones(2, 4)).square().sum().backward()
            opt.clip_grad_norm_(1.0)
            opt.step()
    return {event.name for event in profile.events() if event.name.startswith("lion_dist.")}


def test_every_phase_carries_a_label_with_the_first_and_last_parameter_of_its_bucket(gloo):
    for labels in gloo.run(2, train_under_the_profiler):
        assert {"lion_dist.norm", "lion_dist.update"} <= labels
        for phase in ("grad_sync", "param_sync"):
            assert f"lion_dist.{phase} 0.weight .. 0.bias" in labels, sorted(labels)
            assert f"lion_dist.{phase} 2.weight .. 2.bias" in labels


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
