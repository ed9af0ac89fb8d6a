"""Ranks that do not do the same after construction: said on every rank, naming what differs or whom it waits for."""

from __future__ import annotations

import contextlib
import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import GradScaler, ShardedLion, ShardingConfig
from lion_dist.guards.step_agreement import DisagreementError, hash_on_device
from lion_dist.sharding.collective_error import CollectiveError
from tests.models import mlp


def make(**settings) -> tuple[nn.Module, ShardedLion]:
    model = mlp(8, 8, 8)
    settings.setdefault("lr", 2**-7)
    return model, ShardedLion(model.parameters(), weight_decay=0.1, module=model, **settings)


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 8)).square().sum().backward()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def train(model: nn.Module, opt: ShardedLion, steps: int = 1) -> None:
    for _ in range(steps):
        opt.zero_grad()
        backward(model)
        opt.step()


# ---- what ranks multiply with


def set_group(key: str, value) -> None:
    def change(opt: ShardedLion) -> None:
        opt.param_groups[0][key] = value

    return change


FACTORS = {
    "lr": (set_group("lr", 1e-3), "lr of param group 0 is 0.001 on rank 1 and 0.0078125 on rank 0"),
    "a tensor": (set_group("lr", torch.tensor(0.5)), "lr of param group 0 is 0.5 on rank 1 and 0.0078125 on rank 0"),
    "weight decay": (set_group("weight_decay", 0.25), "weight_decay of param group 0 is 0.25 on rank 1 and 0.1 on"),
    "beta2": (set_group("betas", (0.9, 0.95)), "beta2 of param group 0 is 0.95 on rank 1 and 0.99 on rank 0"),
    "divisor": (lambda opt: opt.set_grad_divisor(3), "divisor .*is 3.0 on rank 1 and None on rank 0"),
    "divisor tensor": (lambda opt: opt.set_grad_divisor(torch.tensor(7)), "divisor .*is 7.0 on rank 1 and None"),
}
SETTINGS = {
    "stage 1": {"sharding": ShardingConfig(zero_stage=1)},
    "stage 2": {},
    "coded": {"sharding": ShardingConfig(param_sync="coded")},
    "in backward": {"sharding": ShardingConfig(update_in_backward=True)},
}


def change_on_the_last_rank(change: str, settings: str) -> None:
    model, opt = make(**SETTINGS[settings])
    train(model, opt, 2)
    opt.finish_param_sync()
    before = values(model)
    opt.zero_grad()
    if dist.get_rank() == dist.get_world_size() - 1:
        FACTORS[change][0](opt)
    backward(model)
    with pytest.raises(DisagreementError, match=FACTORS[change][1]):
        opt.step()
    if settings != "in backward":
        assert all(map(torch.equal, values(model), before))  # nothing has moved yet


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("change", FACTORS)
def test_a_factor_that_differs_is_named_on_every_rank(gloo, change, settings):
    gloo.run(2, change_on_the_last_rank, change, settings)


def clip_on_the_last_rank(late_lr: bool) -> None:
    model, opt = make()
    backward(model)
    opt.grad_norm()
    if dist.get_rank() == 1:
        if late_lr:
            opt.param_groups[0]["lr"] = 0.5
        else:
            opt.clip_grad_norm_(1.0)
    opt.step()  # the message has been sent: the next one tells
    if late_lr:
        opt.param_groups[0]["lr"] = 2**-7
    name = "lr of param group 0 in the step before" if late_lr else "max_norm of clip_grad_norm_ in the step before"
    with pytest.raises(DisagreementError, match=name):
        train(model, opt)


@pytest.mark.parametrize("late_lr", [False, True])
def test_what_is_set_after_the_message_is_found_by_the_next_step(gloo, late_lr):
    gloo.run(2, clip_on_the_last_rank, late_lr)


def scale_differently(unscales: bool) -> None:
    model, opt = make()
    scaler = GradScaler("cpu", init_scale=1024.0 if dist.get_rank() == 0 else 2048.0)
    scaler.scale(model(torch.ones(2, 8)).square().sum()).backward()
    with pytest.raises(DisagreementError, match="loss scale is"):
        if unscales:
            scaler.unscale_(opt)
        scaler.step(opt)


@pytest.mark.parametrize("unscales", [False, True])
def test_loss_scales_that_differ(gloo, unscales):
    gloo.run(2, scale_differently, unscales)


def differ_among_replicas(where: str) -> None:
    """2 x 2 (replicate, shard); one rank of four has another learning rate."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    rank = dist.get_rank()
    model = mlp(8, 8, 8)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    if where == "experts":
        halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        groups[1]["process_group"] = halves[rank % 2]
    opt = ShardedLion(groups, lr=1e-3, module=model, process_group=mesh if where == "replicas" else None)
    train(model, opt)
    if rank == 2:
        opt.param_groups[1]["lr"] = 2e-3
    with pytest.raises(DisagreementError, match="lr of param group 1 is 0.002 on rank 2 and 0.001 on rank 0"):
        train(model, opt)


@pytest.mark.parametrize("where", ["replicas", "experts"])
def test_one_rank_of_four_differs(gloo, where):
    gloo.run(4, differ_among_replicas, where)


def keep_to_one_schedule(settings: str) -> None:
    """Everything that may change does, alike on all ranks."""
    model, opt = make(**SETTINGS[settings])
    for step in range(6):
        opt.zero_grad()
        opt.param_groups[0]["lr"] = torch.tensor(1e-3 / (step + 1)) if step % 2 else 1e-3 / (step + 1)
        if dist.get_rank() or step % 3:  # a rank without a batch
            backward(model)
        opt.set_grad_divisor(step + 1)
        if step == 3 and settings != "in backward":
            opt.clip_grad_norm_(0.5)
        opt.step()


@pytest.mark.parametrize("settings", SETTINGS)
def test_equal_schedules_are_no_difference(gloo, settings):
    gloo.run(2, keep_to_one_schedule, settings)


@pytest.mark.parametrize("ranks", [2, 3, 1000, 8192])
def test_hashes_of_numbers_on_the_device_add_up_exactly(ranks):
    bits = min(40, 52 - ranks.bit_length())
    values = [torch.tensor(x) for x in (0.1, 0.2)]
    own = hash_on_device(values, 5, bits, torch.device("cpu"))
    assert own.dtype == torch.float64 and 0 <= own.item() < 2**bits and own.item() == int(own.item())
    assert sum([own.item()] * ranks) == ranks * own.item() < 2**53
    others = [(values[::-1], 5), (values, 6), ([values[0], torch.tensor(0.3)], 5), ([torch.tensor(0.15)] * 2, 5)]
    assert all(hash_on_device(*other, bits, torch.device("cpu")).item() != own.item() for other in others)


# ---- what ranks train


def unfreeze(on_ranks: list[list[int]], settings: str, all_frozen: bool) -> None:
    """Rank r unfreezes the layers ``on_ranks[r]``."""
    model = mlp(8, 8, 16, 8)
    for i in (0, 2, 4) if all_frozen else (0, 2):
        model[i].requires_grad_(False)
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model, **SETTINGS[settings])
    x = torch.ones(2, 8, requires_grad=True)
    for step in range(4):
        if step == 2:
            for layer in on_ranks[dist.get_rank()]:
                model[layer].requires_grad_(True)
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()


UNFROZEN = "parameters that take gradients from now on"


@pytest.mark.parametrize("settings", ["stage 2", "in backward"])
@pytest.mark.parametrize("on_ranks", [[[0], [2]], [[0], []], [[], [0]], [[0, 2], [0]]])
@pytest.mark.parametrize("all_frozen", [False, True])
def test_layers_that_some_ranks_unfreeze_are_named_on_every_rank(gloo, on_ranks, settings, all_frozen):
    with pytest.raises(AssertionError) as error:
        gloo.run(2, unfreeze, on_ranks, settings, all_frozen)
    names = ["0.weight", "2.weight"]
    assert len(error.value.errors) == 2
    for text in error.value.errors.values():
        last = text.strip().splitlines()[-1]
        assert "DisagreementError" in last and UNFROZEN in last
        for layer in (0, 2):
            assert (f"'{layer}.weight'" in last) == any(layer in layers for layers in on_ranks), names


@pytest.mark.parametrize("settings", ["stage 1", "stage 2", "in backward"])
def test_layers_that_all_ranks_unfreeze_are_trained(gloo, settings):
    gloo.run(2, unfreeze, [[0], [0]], settings, False)


def freeze_on_one_rank(settings: str) -> None:
    model, opt = make(**SETTINGS[settings])
    train(model, opt)
    if dist.get_rank() == 1:
        model[2].requires_grad_(False)
    message = r"take no gradients any more \(requires_grad\) is \['2.weight', '2.bias'\] on rank 1 and \[\] on rank 0"
    with pytest.raises(DisagreementError, match=message):
        train(model, opt)


@pytest.mark.parametrize("settings", ["stage 2", "in backward"])
def test_a_layer_that_one_rank_freezes(gloo, settings):
    gloo.run(2, freeze_on_one_rank, settings)


def freeze_before_step_without_a_batch_on_rank_1() -> None:
    model, opt = make()
    train(model, opt)
    opt.zero_grad()
    if dist.get_rank() == 0:
        backward(model)
    model[2].requires_grad_(False)  # alike on all ranks, whatever gradients they have
    opt.step()


def test_a_layer_that_all_ranks_freeze_is_no_difference(gloo):
    gloo.run(2, freeze_before_step_without_a_batch_on_rank_1)


def construct_with_another_torch() -> None:
    kept, model = torch.__version__, mlp(8, 8)
    torch.__version__ = "2.12.0" if dist.get_rank() else kept
    try:
        with pytest.raises(ValueError, match="'torch' = 2.12.0 there"):
            ShardedLion(model.parameters())
    finally:
        torch.__version__ = kept


def test_ranks_with_different_torch_releases_are_refused(gloo):
    gloo.run(2, construct_with_another_torch)


# ---- calls that ranks make differently often


def call_on_rank_0_only(call: str) -> str:
    group = dist.new_group(timeout=timedelta(seconds=3))
    model = mlp(8, 8, 8)
    sharding = ShardingConfig(zero_stage=1, bucket_numel=100)
    opt = ShardedLion(model.parameters(), module=model, process_group=group, sharding=sharding, metrics_every=1)
    train(model, opt, 2)
    opt.zero_grad()
    try:
        if dist.get_rank() == 0:
            with opt.no_sync() if call == "no_sync" else contextlib.nullcontext():
                backward(model)
            if call == "add_param_group":
                opt.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
            elif call != "no_sync":
                getattr(opt, call)(*[1.0] * (call == "clip_grad_norm_"))
            backward(model)
            opt.step()
        else:
            backward(model)
            backward(model)
            opt.step()
        opt.step()
    except CollectiveError as error:
        assert isinstance(error.__cause__, RuntimeError)
        return str(error)
    return "nothing"


SAYS = {
    "grad_norm": r"judging the gradients .* in step 3, grad_norm\(\)",
    "clip_grad_norm_": r"judging the gradients .* in step 3, clip_grad_norm_\(\)",
    "metrics": r"metrics\(\) in step 3",
    "check_replicas": r"check_replicas\(\) in step 3",
    "resync_params": r"resync_params\(\) in step 3",
    "add_param_group": r"add_param_group\(\) in step 3",
    "no_sync": "judging the gradients|reducing the gradients",
}


@pytest.mark.parametrize("call", SAYS)
def test_a_call_that_other_ranks_do_not_make_ends_with_its_name(gloo, call):
    first, second = gloo.run(2, call_on_rank_0_only, call)
    for rank, text, says in ((0, first, SAYS[call]), (1, second, "reducing the gradients of '.*' in step 3")):
        assert f"rank {rank} of 2 waited in vain for other ranks (the group's time-out is 3 s)" in text
        assert re.search(says, text), text


def die_in_backward() -> str:
    group = dist.new_group(timeout=timedelta(seconds=3))
    model = mlp(8, 8, 8)
    opt = ShardedLion(model.parameters(), module=model, process_group=group)
    train(model, opt)
    if dist.get_rank() == 1:
        return "an error of its own"
    with pytest.raises(CollectiveError) as error:
        train(model, opt)
    return str(error.value)


def test_a_rank_that_has_left_is_said_to_be_missing_from_a_bucket_in_a_step(gloo):
    text, _ = gloo.run(2, die_in_backward)
    assert "reducing the gradients of '0.weight' to '2.bias' in step 2, step()" in text
    assert "The backend says:" in text


def count_steps_differently() -> str:
    group = dist.new_group(timeout=timedelta(seconds=3))
    model = mlp(8, 8, 8)
    opt = ShardedLion(model.parameters(), module=model, process_group=group)
    train(model, opt, 2)
    try:
        if dist.get_rank() == 1:
            opt.step()  # once more than rank 0
    except CollectiveError as error:
        return str(error)
    finally:
        dist.barrier()  # rank 0 stays until the time is out
    return ""


def test_a_step_that_other_ranks_do_not_take_names_itself(gloo):
    _, text = gloo.run(2, count_steps_differently)
    assert "rank 1 of 2 waited in vain" in text and "'0.weight' to '2.bias' in step 3, step()" in text
