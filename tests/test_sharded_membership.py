"""What becomes of parameters that are replaced, moved, tied or shared around a ShardedLion: followed, or said."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lion_dist import Lion, ShardedLion, ShardingConfig, checkpoint
from lion_dist.sharding.bucket import ParamState
from tests.models import mlp
from tests.oracle import assert_same_on_all_ranks, assert_same_params

X = torch.linspace(-1, 1, 15).view(3, 5)


def step(model: nn.Module, opt) -> None:
    opt.zero_grad()
    model(X).square().sum().backward()
    opt.step()


def make() -> tuple[nn.Sequential, ShardedLion]:
    model = mlp(5, 5, 5)
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model)
    step(model, opt)
    return model, opt


# ---- replaced


def by_assign(model: nn.Module) -> None:
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)


def by_hand(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.ones(5, 5))


def by_layer(model: nn.Module) -> None:
    model[0] = nn.Linear(5, 5)


def by_old_weight_norm(model: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])


def by_weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(model[0])


def by_meta(model: nn.Module) -> None:
    model.to("meta")
    model.to_empty(device="cpu")
    for param in model.parameters():
        nn.init.ones_(param)


@pytest.mark.parametrize("replace", [by_assign, by_hand, by_layer, by_old_weight_norm, by_weight_norm, by_meta])
def test_a_parameter_replaced_in_the_module_is_refused_at_step(replace):
    """Its replacement has neither hooks nor a place in a bucket: it was never trained, without a word."""
    model, opt = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    replace(model)
    with pytest.raises(RuntimeError, match="the module no longer has '0.weight'.*construct the optimizer after"):
        step(model, opt)
    if replace is by_assign:
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_a_replaced_parameter_is_refused_in_every_mode(update_in_backward):
    model = mlp(5, 5)
    sharding = ShardingConfig(update_in_backward=update_in_backward)
    opt = ShardedLion(model.parameters(), module=model, sharding=sharding)
    by_assign(model)
    with pytest.raises(RuntimeError, match="the module no longer has"):
        step(model, opt)


def test_another_optimizer_trains_what_replaced_the_parameters():
    model, opt = make()
    by_assign(model)
    opt.close()
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model)
    before = model[0].weight.detach().clone()
    step(model, opt)
    assert not torch.equal(model[0].weight, before)


def test_a_replaced_parameter_can_be_added_as_a_group():
    model, opt = make()
    by_hand(model)
    opt.add_param_group({"params": [model[0].weight]})
    step(model, opt)
    opt.finish_param_sync()
    assert not torch.equal(model[0].weight, torch.ones(5, 5))


SWAPS = {
    "parameter": lambda opt: opt.param_groups[0]["params"].__setitem__(0, nn.Parameter(torch.ones(5, 5))),
    "list": lambda opt: opt.param_groups[0].update(params=[nn.Parameter(torch.ones(5, 5))]),
    "appended": lambda opt: opt.param_groups[0]["params"].append(nn.Parameter(torch.ones(3))),
    "removed": lambda opt: opt.param_groups[0]["params"].pop(),
}


@pytest.mark.parametrize("with_module", [False, True])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_parameter_swapped_in_the_groups_by_hand_is_refused_at_step(swap, with_module):
    model = mlp(5, 5, 5)
    opt = ShardedLion(model.parameters(), module=model if with_module else None)
    SWAPS[swap](opt)
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="param group 0 holds other parameters.*add_param_group"):
        step(model, opt)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("change", [lambda groups: groups.append(dict(groups[0])), lambda groups: groups.pop()])
def test_groups_that_come_and_go_by_hand_are_refused_at_step(change):
    model, opt = make()
    change(opt.param_groups)
    with pytest.raises(RuntimeError, match="other groups than ShardedLion was given.*add_param_group"):
        step(model, opt)


def test_settings_of_groups_may_change():
    model, opt = make()
    opt.param_groups[0]["lr"] = 0.0
    opt.param_groups[0]["my own"] = 1
    opt.load_state_dict(opt.state_dict())
    before = model[0].weight.detach().clone()
    step(model, opt)
    opt.finish_param_sync()
    assert torch.equal(model[0].weight, before)


# ---- moved within the module


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model[0], "weight", Doubled())


def pruned(model: nn.Module) -> None:
    prune.custom_from_mask(model[0], "weight", torch.eye(5))


def tied(model: nn.Module) -> None:
    model[2].weight = model[0].weight


def wrapped(model: nn.Module) -> None:
    model[0] = nn.Sequential(model[0], nn.Identity())


def taken_out(model: nn.Module) -> None:
    model[2].bias = None


def train_through(change) -> None:
    models = mlp(5, 5, 5), mlp(5, 5, 5)
    opt = ShardedLion(models[0].parameters(), lr=1e-2, module=models[0], sharding=ShardingConfig(bucket_numel=30))
    optimizers = opt, Lion(models[1].parameters(), lr=1e-2)
    for number in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            if number == 2:
                opt.finish_param_sync()
                change(model)
            step(model, optimizer)
    assert ParamState.GATHERING in [bucket.param_state for bucket in opt.buckets]
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):  # reading waits
        assert torch.equal(mine, other)
    opt.finish_param_sync()
    assert_same_params(*models)
    assert_same_on_all_ranks(models[0])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("change", [parametrized, pruned, tied, wrapped, taken_out])
def test_a_parameter_that_moves_within_the_module_is_trained_on(gloo, change, ranks):
    gloo.run(ranks, train_through, change)


def test_closing_unhooks_modules_that_came_later():
    model, opt = make()
    parametrized(model)
    step(model, opt)
    opt.close()
    for module in model.modules():
        assert type(module._parameters) is dict and not module._forward_pre_hooks and not module._forward_hooks
        assert not module._state_dict_pre_hooks and not module._load_state_dict_pre_hooks


# ---- memory


def test_converting_by_swapping_tensors_is_refused_by_torch():
    """It would take the hooks along: torch refuses it for parameters that something refers to weakly."""
    model, opt = make()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(RuntimeError, match="Couldn't swap Linear.weight"):
            model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    step(model, opt)


def test_to_empty_and_back_to_values_trains_on():
    model, opt = make()
    other = copy.deepcopy(model)
    lion = Lion(other.parameters(), lr=1e-2)
    opt = (opt.close(), ShardedLion(model.parameters(), lr=1e-2, module=model))[1]
    for each in (model, other):
        each.to_empty(device="cpu")
        for param in each.parameters():
            nn.init.constant_(param, 0.25)
    for _ in range(2):
        step(model, opt)
        step(other, lion)
    assert_same_params(model, other)


def test_meta_parameters_are_refused():
    """Materialized later, by to_empty(), they would be other parameters."""
    with torch.device("meta"):
        model = mlp(5, 5)
    with pytest.raises(ValueError, match="'0.weight' is on the meta device.*to_empty"):
        ShardedLion(model.parameters(), module=model)


def test_parameters_shared_with_other_processes_are_warned_of():
    """They are trained in the flat buffer: what others mapped stays as it was."""
    model = mlp(5, 5)
    model.share_memory()
    with pytest.warns(UserWarning, match="'0.weight', '0.bias' lie in memory that is shared with other processes"):
        ShardedLion(model.parameters(), module=model)


def test_parameters_shared_after_construction_are_trained_on_with_a_warning():
    models = mlp(5, 5), mlp(5, 5)
    optimizers = ShardedLion(models[0].parameters(), 0.1, module=models[0]), Lion(models[1].parameters(), 0.1)
    models[0].share_memory()
    with pytest.warns(UserWarning, match="shared with other processes"):
        step(models[0], optimizers[0])
    step(models[1], optimizers[1])
    for model, opt in zip(models, optimizers, strict=True):
        step(model, opt)
    assert_same_params(*models)
    assert not models[0][0].weight.is_shared()


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


def test_two_parameters_over_one_memory_are_refused():
    """They were untied without a word: each moved to a place of its own."""
    model = TwoHeads()
    model.b.weight = nn.Parameter(model.a.weight.data)
    pointer = model.a.weight.data_ptr()
    with pytest.raises(ValueError, match="'a.weight' and 'b.weight' are two tensors over the same memory"):
        ShardedLion(model.parameters(), module=model)
    with pytest.raises(ValueError, match="over the same memory"):
        ShardedLion([{"params": model.a.parameters()}, {"params": model.b.parameters()}], module=model)
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr() == pointer
    model.b.weight = model.a.weight
    ShardedLion(model.parameters(), module=model)


def test_parameters_that_overlap_in_part_are_refused():
    rows = torch.zeros(8, 4)
    model = nn.ParameterList([nn.Parameter(rows[:5]), nn.Parameter(rows[4:])])
    with pytest.raises(ValueError, match="'0' and '1' are two tensors over the same memory"):
        ShardedLion(model.parameters(), module=model)
    model = nn.ParameterList([nn.Parameter(rows[:4]), nn.Parameter(rows[4:])])
    ShardedLion(model.parameters(), module=model)


def test_a_buffer_over_a_parameters_memory_is_refused():
    model = nn.Linear(4, 4)
    model.register_buffer("row", model.weight.data[1])
    with pytest.raises(ValueError, match="'weight' and 'buffer row' are two tensors over the same memory"):
        ShardedLion(model.parameters(), module=model)


def test_frozen_parameters_stay_where_they_are_and_may_share():
    model = TwoHeads()
    model.b.weight = nn.Parameter(model.a.weight.data)
    for param in (model.a.weight, model.b.weight):
        param.requires_grad_(False)
    opt = ShardedLion(model.parameters(), module=model)
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
    model.a.weight.requires_grad_(True)
    for _ in range(2):  # as often as it is tried
        with pytest.raises(ValueError, match="over the same memory"):
            model.a(torch.ones(1, 4)).sum().backward()
            opt.step()


def test_a_parameter_given_the_memory_of_another_is_refused_at_step():
    model, opt = make()
    model[2].weight.data = model[0].weight.data
    with pytest.raises(RuntimeError, match="'2.weight' was given the memory of '0.weight'.*Tie the parameters"):
        step(model, opt)


def test_an_expanded_parameter_is_refused():
    param = nn.Parameter(torch.zeros(1, 3).expand(4, 3))
    with pytest.raises(ValueError, match="elements of parameter 'w' share memory.*expand"):
        ShardedLion([("w", param)])


def test_a_strided_slice_gets_memory_of_its_own_with_a_warning():
    whole = torch.ones(6, 8)
    params = nn.Parameter(whole[:, ::2]), nn.Parameter(torch.ones(6, 4))
    with pytest.warns(UserWarning, match="'w' are parts of larger tensors, with gaps"):
        opt = ShardedLion([("w", params[0])], lr=0.1)
    lion = Lion([params[1]], lr=0.1)
    for param, optimizer in zip(params, (opt, lion), strict=True):
        param.square().sum().backward()
        optimizer.step()
    assert torch.equal(*params) and params[0].is_contiguous() and (whole == 1).all()


# ---- buffers


def differ_in_statistics() -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    opt = ShardedLion(model.parameters(), module=model)
    for _ in range(2):
        opt.zero_grad()
        model(X * (1 + dist.get_rank())).square().sum().backward()
        opt.step()
    own = model[1].running_var.sum().item()
    opt.broadcast_buffers()
    return [own, model[1].running_var.sum().item(), model[1].num_batches_tracked.item()]


def test_broadcast_buffers_makes_them_the_first_ranks(gloo):
    first, second = gloo.run(2, differ_in_statistics)
    assert first[0] != second[0] and first[1:] == second[1:] == [first[0], 2]


def test_broadcast_buffers_needs_the_module():
    with pytest.raises(RuntimeError, match="module=model"):
        ShardedLion(mlp(5, 5).parameters()).broadcast_buffers()


def resume_with_statistics(path: str, resumed: bool) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    opt = ShardedLion(model.parameters(), module=model)
    if resumed:
        checkpoint.load(path, model=model, optimizer=opt)
    for number in range(2 if resumed else 0, 4):
        opt.zero_grad()
        model(X * (1 + dist.get_rank())).square().sum().backward()
        opt.step()
        if number == 1:
            opt.broadcast_buffers()
            checkpoint.save(path, model=model, optimizer=opt)
    return model[1].running_var.tolist()


def test_broadcast_before_a_save_a_resumed_run_has_every_ranks_buffers(gloo, tmp_path):
    path = str(tmp_path / "checkpoint")
    never_stopped = gloo.run(2, resume_with_statistics, path, False)
    assert gloo.run(2, resume_with_statistics, path, True) == never_stopped
    assert never_stopped[0] != never_stopped[1]
