"""What cannot be captured says so before anything runs."""

import pytest
import torch
from torch import nn

from lion_dist import CapturedStep, Lion, ShardedLion, ShardingConfig


def sharded(**settings) -> ShardedLion:
    return ShardedLion(nn.Linear(2, 2).parameters(), **settings)


def test_another_optimizer_is_refused_by_name():
    with pytest.raises(ValueError, match="CapturedStep is for ShardedLion, got a Lion.*use torch.cuda.graph"):
        CapturedStep(lambda: None, Lion(nn.Linear(2, 2).parameters()))


def test_parameters_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="CUDA graphs need parameters on a GPU, got cpu"):
        CapturedStep(lambda: None, sharded())


def test_an_optimizer_without_trained_parameters_is_refused_with_the_remedy():
    """Such as that of a pipeline stage of which all is frozen."""
    frozen = ShardedLion(nn.Linear(2, 2).requires_grad_(False).parameters())
    with pytest.raises(ValueError, match="this ShardedLion has none: all are frozen. Set requires_grad before"):
        CapturedStep(lambda: None, frozen)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sharding": ShardingConfig(param_sync="coded")}, 'param_sync="coded"'),
        ({"sharding": ShardingConfig(update_in_backward=True)}, "update_in_backward=True"),
        ({"sharding": ShardingConfig(check_replicas_every=10)}, "check_replicas_every=10"),
        ({"metrics_every": 5}, "metrics_every=5"),
    ],
)
def test_what_the_host_does_in_every_step_is_refused(settings, words, monkeypatch):
    optimizer = sharded(**settings)
    monkeypatch.setattr(type(optimizer.buckets[0]), "device", torch.device("cuda", 0))
    with pytest.raises(ValueError, match=words):
        CapturedStep(lambda: None, optimizer)
