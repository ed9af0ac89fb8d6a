"""``ShardedLion(ddp.parameters(), module=ddp)`` takes the place of DDP's reducer."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from lion_dist import Lion, ShardedLion, ShardingConfig, checkpoint
from tests.models import make_batch, make_model, mlp

SETTINGS = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
}


def normed(seed: int = 0) -> nn.Sequential:
    """With buffers that follow each rank's batches."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def inputs(step: int, micro_batch: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_batch + dist.get_rank())
    return torch.randn(4, 8, generator=generator)


def whole(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.clone() for name, value in model.state_dict().items()}


# ---- the same bits, and the wrapper's ways


def train_everything(wrapped: bool, settings: dict, stage: int) -> dict[str, Tensor]:
    """Unused and frozen parameters, accumulation through no_sync(), a branch that some batches leave out."""
    model = make_model()
    called = DistributedDataParallel(model, **settings) if wrapped else model
    opt = ShardedLion(
        called.parameters(), lr=1e-2, module=called, sharding=ShardingConfig(zero_stage=stage, bucket_numel=200)
    )
    for step in range(4):
        with called.no_sync() if wrapped else opt.no_sync():
            make_batch(step, 0, dist.get_rank()).loss(called).backward()
        make_batch(step, 1, dist.get_rank(), detour=step == 2).loss(called).backward()
        opt.clip_grad_norm_(0.5)
        opt.step()
    return whole(called, "module.")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS)
def test_bits_are_those_of_the_bare_module(gloo, settings, stage):
    bare, wrapped = (gloo.run(2, train_everything, wraps, SETTINGS[settings], stage)[0] for wraps in (False, True))
    assert bare.keys() == wrapped.keys()
    assert all(torch.equal(bare[name], wrapped[name]) for name in bare)


def train_with_buffers(sharded: bool) -> dict[str, Tensor]:
    ddp = DistributedDataParallel(normed())
    opt = ShardedLion(ddp.parameters(), lr=1e-2, module=ddp) if sharded else Lion(ddp.parameters(), lr=1e-2)
    for step in range(4):
        opt.zero_grad()
        ddp(inputs(step)).square().mean().backward()
        opt.step()
        if step == 1:
            with torch.no_grad():
                ddp(inputs(9))  # evaluates in training mode: buffers move on each rank for itself
    return whole(ddp)


def test_buffers_are_broadcast_as_ddp_does_and_bits_are_those_of_ddp_and_lion(gloo):
    for theirs, ours in zip(*(gloo.run(2, train_with_buffers, sharded) for sharded in (False, True)), strict=True):
        assert theirs.keys() == ours.keys() and all(name.startswith("module.") for name in ours)
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def messages_of_a_step(wrapped: bool) -> dict[str, int]:
    model = mlp(8, 8, 8)
    called = DistributedDataParallel(model) if wrapped else model
    opt = ShardedLion(called.parameters(), module=called)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        called(inputs(0)).sum().backward()
        opt.step()
        opt.finish_param_sync()
    return {event.key: event.count for event in found.key_averages() if event.key.startswith("gloo:")}


def test_nothing_is_sent_twice(gloo):
    bare, wrapped = (gloo.run(2, messages_of_a_step, wraps)[0] for wraps in (False, True))
    assert bare == wrapped and bare


def free_the_buckets() -> None:
    ddp = DistributedDataParallel(mlp(8, 8))
    opt = ShardedLion(ddp.parameters(), module=ddp)
    assert "reducer" not in vars(ddp) and isinstance(ddp, DistributedDataParallel)
    with pytest.raises(RuntimeError, match="has been replaced by a ShardedLion"):
        ddp.register_comm_hook(None, lambda state, bucket: None)
    ddp(inputs(0)).sum().backward()
    assert all(param.grad is None for param in ddp.parameters())
    opt.step()


def test_the_reducer_and_its_memory_are_gone(gloo):
    gloo.run(2, free_the_buckets)


def set_the_flag_as_nanogpt_does() -> None:
    """Without the context manager, at every micro-batch."""
    ddp = DistributedDataParallel(mlp(8, 8))
    opt = ShardedLion(ddp.parameters(), module=ddp, sharding=ShardingConfig(zero_stage=1))
    for micro_batch in range(2):
        ddp.require_backward_grad_sync = micro_batch == 1
        ddp(inputs(0, micro_batch)).sum().backward()
        assert (ddp.module[0].weight.grad is None) == (micro_batch == 1)
    opt.step()


def test_require_backward_grad_sync_can_be_set(gloo):
    gloo.run(2, set_the_flag_as_nanogpt_does)


# ---- names and copies


def names_everywhere(path) -> None:
    model = mlp(8, 8)
    ddp = DistributedDataParallel(model)
    opt = ShardedLion(ddp.parameters(), module=ddp)
    ddp(inputs(0)).sum().backward()
    opt.step()
    assert list(ddp.state_dict()) == ["module.0.weight", "module.0.bias"]
    assert list(get_model_state_dict(ddp)) == ["0.weight", "0.bias"]
    assert set(get_optimizer_state_dict(ddp, opt)["state"]) == {"0.weight", "0.bias"}
    checkpoint.save(path, model=ddp, optimizer=opt)
    trained = whole(model)
    other = mlp(8, 8, seed=1)
    other_opt = ShardedLion(other.parameters(), module=other)
    checkpoint.load(path, model=other, optimizer=other_opt)
    assert all(torch.equal(trained[name], value) for name, value in whole(other).items())
    checkpoint.load(path, model=ddp, optimizer=opt)


def test_names_are_those_of_the_bare_module_in_checkpoints(gloo, tmp_path):
    gloo.run(2, names_everywhere, tmp_path / "checkpoint")


def copy_it() -> None:
    ddp = DistributedDataParallel(mlp(8, 8))
    opt = ShardedLion(ddp.parameters(), module=ddp)
    ddp(inputs(0)).sum().backward()
    opt.step()
    twin = copy.deepcopy(ddp)
    assert type(twin) is DistributedDataParallel and "reducer" not in vars(ddp)
    x = torch.ones(2, 8)
    assert torch.equal(twin(x), ddp(x))
    twin(inputs(1)).sum().backward()
    grad = twin.module[0].weight.grad
    sent = grad.clone()
    dist.broadcast(sent, 0)
    assert torch.equal(grad, sent)  # a reducer of its own


def test_a_copy_is_an_ordinary_ddp(gloo):
    gloo.run(2, copy_it)


# ---- the end of the optimizer


def outlive_the_optimizer() -> None:
    ddp = DistributedDataParallel(mlp(8, 8))
    ShardedLion(ddp.parameters(), module=ddp).close()
    gc.collect()
    with pytest.raises(RuntimeError, match="gradients would stay on their ranks"):
        ddp(inputs(0))
    with torch.no_grad():
        ddp(inputs(0))
    opt = ShardedLion(ddp.parameters(), module=ddp)
    ddp(inputs(0)).sum().backward()
    opt.step()


def test_without_its_optimizer_it_does_not_train_in_silence(gloo):
    gloo.run(2, outlive_the_optimizer)


# ---- what is refused


def with_a_hook() -> DistributedDataParallel:
    ddp = DistributedDataParallel(mlp(8, 8))
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return ddp


def with_a_builtin_hook() -> DistributedDataParallel:
    ddp = DistributedDataParallel(mlp(8, 8))
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    return ddp


def with_ignored_parameters() -> DistributedDataParallel:
    model = mlp(8, 8, 8)
    model._ddp_params_and_buffers_to_ignore = ["0.bias"]
    return DistributedDataParallel(model)


def on_one_rank_each() -> DistributedDataParallel:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return DistributedDataParallel(mlp(8, 8), process_group=groups[dist.get_rank()])


class MoreThanDDP(DistributedDataParallel):
    """Does who knows what."""


REFUSED = {
    "comm hook": (with_a_hook, {}, "has a communication hook"),
    "builtin hook": (with_a_builtin_hook, {}, "has a communication hook"),
    "ignored": (with_ignored_parameters, {}, "parameters or buffers to ignore"),
    "other ranks": (on_one_rank_each, {"of": "world"}, "over 1 ranks, and ShardedLion over 2"),
    "subclass": (lambda: MoreThanDDP(mlp(8, 8)), {}, "wrapped in DistributedDataParallel"),
    "a part": (lambda: DistributedDataParallel(mlp(8, 8, 8)), {"params": 2}, "2 parameters .* '2.weight'"),
}


def refuse(case: str) -> None:
    make, settings, message = REFUSED[case]
    ddp = make()
    params = list(ddp.parameters())[: settings.get("params")]
    group = dist.group.WORLD if settings.get("of") == "world" else None
    with pytest.raises((ValueError, TypeError), match=message):
        ShardedLion(params, module=ddp, process_group=group)
    assert "reducer" in vars(ddp)
    ddp(inputs(0)).sum().backward()  # DDP is as it was
    assert ddp.module[0].weight.grad is not None


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_over_is_refused_by_name_and_ddp_stays_as_it_was(gloo, case):
    gloo.run(2, refuse, case)


def follow_its_ranks() -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    ddp = DistributedDataParallel(mlp(8, 8), process_group=groups[dist.get_rank()])
    opt = ShardedLion(ddp.parameters(), module=ddp)
    assert opt.groups.num_ranks == 1


def test_without_a_process_group_the_ranks_are_ddps(gloo):
    gloo.run(2, follow_its_ranks)
