"""Bad input to ShardedLion gets an error that says what to do, and nothing is changed."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig
from tests.models import GivenGradients, make_batch, make_model, mlp
from tests.oracle import assert_same_on_all_ranks


class Snapshot:
    """What a refused call must leave as it was."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.params = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}
        self.hooks = self._hooks()

    def _hooks(self) -> int:
        modules = sum(len(m._forward_pre_hooks) + len(m._state_dict_pre_hooks) for m in self.model.modules())
        return modules + sum(len(p._post_accumulate_grad_hooks or ()) for p in self.model.parameters())

    def assert_unchanged(self) -> None:
        for name, p in self.model.named_parameters():
            param, pointer, value = self.params[name]
            assert p is param and p.data_ptr() == pointer, f"{name} was moved"
            assert torch.equal(p, value), f"{name} was changed"
        for name, buffer in self.model.named_buffers():
            assert torch.equal(buffer, self.buffers[name]), f"buffer {name} was changed"
        assert self._hooks() == self.hooks, "hooks were left behind"


@contextlib.contextmanager
def refused(error: type[Exception], match: str, model: nn.Module):
    before = Snapshot(model)
    with pytest.raises(error, match=match):
        yield
    before.assert_unchanged()


# ---- in one process


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": -1e-3}, "lr must be finite and at least 0, got -0.001"),
        ({"lr": float("nan")}, "lr must be finite.*nan"),
        ({"lr": float("inf")}, "lr must be finite.*inf"),
        ({"lr": torch.tensor([1e-3, 1e-3])}, "lr as a tensor must hold one element"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, "betas must be two numbers"),
        ({"betas": (0.9, float("nan"))}, "betas must be two numbers"),
        ({"betas": (0.9, 0.95, 0.99)}, "Lion has no third"),
    ],
)
def test_unusable_hyperparameters_are_refused(settings, match):
    model = mlp(4, 4)
    with refused(ValueError, match, model):
        ShardedLion(model.parameters(), module=model, **settings)
    with refused(ValueError, match, model):
        ShardedLion([{"params": model.parameters(), **settings}], module=model)


def test_decoupled_weight_decay_needs_a_learning_rate_to_divide_by():
    with refused(ValueError, "divides by the initial lr, which must be above 0", model := mlp(4, 4)):
        ShardedLion(model.parameters(), 0.0, module=model, decoupled_weight_decay=True)


def test_zero_stage_3_says_what_to_use():
    with pytest.raises(ValueError, match="fully_shard and use lion_dist.Lion"):
        ShardingConfig(zero_stage=3)


@pytest.mark.parametrize(
    "params", [[], [{"params": []}], [{"params": []}, {"params": []}]], ids=["none", "group", "groups"]
)
def test_no_parameters_are_refused(params):
    with pytest.raises(ValueError, match="empty parameter list|no parameters"):
        ShardedLion(params)


def test_an_empty_group_beside_others_is_allowed():
    model = mlp(4, 4)
    opt = ShardedLion([{"params": []}, {"params": model.parameters()}])
    model(torch.ones(2, 4)).sum().backward()
    before = model[0].weight.detach().clone()
    opt.step()
    assert not torch.equal(model[0].weight, before)


def test_parameter_in_two_groups_is_refused():
    model = mlp(4, 4)
    with refused(ValueError, "more than one parameter group", model):
        ShardedLion([{"params": model.parameters()}, {"params": [model[0].bias]}], module=model)
    with refused(ValueError, "parameter more than once", model), pytest.warns(UserWarning, match="duplicate"):
        ShardedLion([model[0].bias, model[0].bias])


def test_parameters_on_two_devices_are_refused():
    model = mlp(4, 4, 4)
    model[2].to("meta")
    with pytest.raises(
        ValueError, match="expects parameters on one device, got cpu and meta .*'2.weight'.*Move the model"
    ):
        ShardedLion(model.parameters(), module=model)
    assert model[0].weight.untyped_storage().nbytes() == 64  # not in a bucket


def test_integer_parameters_are_refused():
    model = mlp(4, 4)
    model.register_parameter("table", nn.Parameter(torch.arange(4), requires_grad=False))
    with refused(TypeError, "'table' has dtype torch.int64; Lion updates torch.float32", model):
        ShardedLion(model.parameters(), module=model)


@pytest.mark.parametrize("main_params", ["split", "none"])
def test_fp16_parameters_with_bf16_main_params_are_refused(main_params):
    model = mlp(4, 4).half()
    with refused(ValueError, "is for bf16 parameters.*Use main_params='fp32'", model):
        ShardedLion(model.parameters(), module=model, precision=PrecisionPolicy(main_params=main_params))


def test_refused_param_group_leaves_the_optimizer_as_it_was():
    model = mlp(4, 4)
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model)
    for bad in (
        {"params": [nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False)]},
        {"params": [nn.Parameter(torch.zeros(3, device="meta"))]},
        {"params": [nn.Parameter(torch.zeros(3))], "betas": (0.9, 1.5)},
        {"params": [model[0].weight]},
        {"params": [nn.Parameter(torch.zeros(3))], "process_group": "world"},
    ):
        with pytest.raises((ValueError, TypeError)):
            opt.add_param_group(bad)
    assert len(opt.param_groups) == 1 and len(opt.buckets) == 1
    extra = nn.Parameter(torch.zeros(3))
    opt.add_param_group({"params": [extra]})
    (model(torch.ones(2, 4)).sum() + extra.sum()).backward()
    opt.step()
    assert torch.equal(extra, torch.full((3,), -1e-2))


def test_unusable_limits_and_divisors_are_refused():
    model = mlp(4, 4)
    opt = ShardedLion(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be above 0"):
            opt.clip_grad_norm_(limit)
    for count in (0, -3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="divisor must be finite and above 0"):
            opt.set_grad_divisor(count)
    opt.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="set_grad_divisor.. comes before clip_grad_norm_"):
        opt.set_grad_divisor(4)
    with pytest.raises(ValueError, match="keeps no full gradients to zero"):
        opt.zero_grad(set_to_none=False)


@pytest.mark.parametrize("stage", [1, 2])
def test_step_and_norm_inside_no_sync_are_refused(stage):
    model = mlp(4, 4)
    opt = ShardedLion(model.parameters(), lr=1e-2, sharding=ShardingConfig(zero_stage=stage))
    before = model[0].weight.detach().clone()
    with opt.no_sync():
        model(torch.ones(2, 4)).sum().backward()
        for call in (opt.step, opt.grad_norm, lambda: opt.clip_grad_norm_(1.0)):
            with pytest.raises(RuntimeError, match="inside no_sync.*Leave the no_sync"):
                call()
    assert torch.equal(model[0].weight, before)
    opt.step()  # nothing was lost
    assert torch.equal(model[0].weight, before - 1e-2)


def test_gradient_of_another_shape_is_refused():
    """Only ``.grad.data`` can smuggle one in; a shape that broadcasts must not be spread over the parameter."""
    for shape in ((1,), (3, 4), (20,)):
        model = mlp(4, 4)
        opt = ShardedLion(model.parameters(), sharding=ShardingConfig(zero_stage=1))
        before = [p.detach().clone() for p in model.parameters()]
        with opt.no_sync():
            model(torch.ones(2, 4)).sum().backward()
        model[0].weight.grad.data = torch.ones(shape)
        with pytest.raises(ValueError, match=r"shape.*\(4, 4\)"):
            opt.step()
        for param, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(param, value)


def test_policy_and_sharding_are_checked_where_they_are_written():
    for settings in ({"zero_stage": 0}, {"bucket_numel": 0}, {"reduce_dtype": torch.float16}):
        with pytest.raises(ValueError, match="must be"):
            ShardingConfig(**settings)


@pytest.mark.parametrize("copy_it", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_copying_the_optimizer_is_refused(copy_it):
    """Its parameters are views of buckets that belong to process groups: half a copy would train the wrong tensors."""
    with pytest.raises(TypeError, match="cannot be copied or pickled.*state_dict"):
        copy_it(ShardedLion(mlp(4, 4).parameters()))


def test_step_with_nothing_to_train_does_nothing():
    model = mlp(4, 4).requires_grad_(False)
    before = model[0].weight.detach().clone()
    opt = ShardedLion(model.parameters(), module=model)
    opt.step()
    assert opt.grad_norm().item() == 0.0
    assert torch.equal(model[0].weight, before)


# ---- on several ranks


def build_models_that_differ(difference: str) -> str:
    rank = dist.get_rank()
    model = make_model()
    odd = rank == dist.get_world_size() - 1
    settings: dict = {"lr": 1e-3}
    if odd and difference == "shape":
        model.tiny = nn.Parameter(torch.zeros(4))
    if odd and difference == "dtype":
        model.detour.weight.data = model.detour.weight.data.bfloat16()
    if odd and difference == "frozen":
        model.up.bias.requires_grad_(False)
    if odd and difference == "extra":
        model.zzz = nn.Parameter(torch.zeros(4))
    if odd and difference == "missing":
        del model.unused.bias
    if odd and difference == "lr":
        settings["lr"] = 2e-3
    if odd and difference == "betas":
        settings["betas"] = (0.9, 0.98)
    if odd and difference == "stage":
        settings["sharding"] = ShardingConfig(zero_stage=1)
    if odd and difference == "precision":
        settings["precision"] = PrecisionPolicy(seed=1)
    params = list(model.parameters())
    if odd and difference == "order":
        params[1], params[2] = params[2], params[1]
    before = Snapshot(model)
    try:
        ShardedLion(params, module=model, **settings)
    except ValueError as error:
        before.assert_unchanged()
        return str(error)
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("difference", "fragments"),
    [
        ("shape", ["rank 2 differs from rank 0", "'tiny'", "(4,)", "(3,)"]),
        ("dtype", ["rank 2", "'detour.weight'", "torch.bfloat16", "torch.float32"]),
        ("frozen", ["rank 2", "'up.bias'", "True", "False"]),
        ("extra", ["rank 2", "'zzz'"]),
        ("missing", ["rank 2", "'unused.bias'"]),
        ("order", ["rank 2", "'gain'", "'empty'"]),
        ("lr", ["rank 2", "lr", "0.002", "0.001"]),
        ("betas", ["rank 2", "betas", "(0.9, 0.98)", "(0.9, 0.99)"]),
        ("stage", ["rank 2", "zero_stage=1", "zero_stage=2"]),
        ("precision", ["rank 2", "seed=1", "seed=0"]),
    ],
)
def test_ranks_that_differ_are_named_at_construction(gloo, difference, fragments):
    messages = gloo.run(3, build_models_that_differ, difference)
    assert len(set(messages)) == 1
    for fragment in fragments + ["on every rank"]:
        assert fragment in messages[0]


def add_groups_that_differ() -> str:
    model = mlp(4, 4)
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model)
    try:
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2 + dist.get_rank()))]})
    except ValueError as error:
        assert len(opt.param_groups) == 1
        extra = nn.Parameter(torch.zeros(5))
        opt.add_param_group({"params": [extra]})
        (model(torch.ones(2, 4)).sum() + extra.sum()).backward()
        opt.step()
        assert torch.equal(extra, torch.full((5,), -1e-2))  # complete: the module's forward would not wait for it
        return str(error)
    raise AssertionError("no error")


def test_added_groups_that_differ_are_named_and_not_added(gloo):
    for message in gloo.run(2, add_groups_that_differ):
        assert "rank 1 differs from rank 0" in message and "(3,)" in message


def pass_a_group_of_others() -> None:
    others = dist.new_group([0])
    if dist.get_rank() == 1:
        model = mlp(4, 4)
        with refused(ValueError, "this rank .global rank 1. belongs to", model):
            ShardedLion(model.parameters(), module=model, process_group=others)


def test_process_group_without_this_rank_is_refused(gloo):
    gloo.run(2, pass_a_group_of_others)


def pass_a_mesh_of_three_axes() -> None:
    mesh = dist.init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("pp", "dp", "tp"))
    with pytest.raises(ValueError, match="3 axes.*pp.*Pass the sub-mesh"):
        ShardedLion(mlp(4, 4).parameters(), process_group=mesh)


def test_mesh_of_three_axes_is_refused(gloo):
    gloo.run(2, pass_a_mesh_of_three_axes)


def pass_a_bad_group_for_one_param_group() -> None:
    model = mlp(4, 4, 4)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "process_group": "experts"}]
    with refused(ValueError, "process_group must be a ProcessGroup.*'experts'", model):
        ShardedLion(groups, module=model)


def test_unusable_process_group_of_a_param_group_changes_nothing(gloo):
    gloo.run(2, pass_a_bad_group_for_one_param_group)


def pass_dtensors() -> None:
    from torch.distributed.fsdp import fully_shard

    model = mlp(4, 4)
    fully_shard(model)
    with pytest.raises(TypeError, match="'0.weight' is a DTensor.*Use lion_dist.Lion"):
        ShardedLion(model.parameters(), module=model)


def test_dtensors_are_refused(gloo):
    gloo.run(2, pass_dtensors)


# ---- gradients that are not finite


def skip_a_step_with_a_bad_gradient(value: float, where: str, stage: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = GivenGradients((40, 3), (5,), (70,))
    sharding = ShardingConfig(zero_stage=stage, bucket_numel=64)
    opt = ShardedLion(model.parameters(), lr=1e-2, weight_decay=0.1, sharding=sharding)
    good = [torch.ones_like(p) for p in model.weights]
    model.loss(good).backward()
    opt.step()
    params = [p.detach().clone() for p in model.weights]
    momenta = [shard.exp_avg.clone() for shard in opt.shards]

    bad = [g.clone() for g in good]
    if rank == world_size - 1 or where == "every rank":
        bad[0][39, 2] = value
    model.loss(bad).backward()
    norm = opt.clip_grad_norm_(1.0)
    assert not norm.isfinite()
    opt.step()
    for param, old in zip(model.weights, params, strict=True):
        assert torch.equal(param, old)
    for shard, old in zip(opt.shards, momenta, strict=True):
        assert torch.equal(shard.exp_avg, old)
    assert (opt.taken_steps(), opt.skipped_steps()) == (1, 1)

    model.loss(good).backward()
    opt.step()
    for param, old in zip(model.weights, params, strict=True):
        assert torch.allclose(param, old * (1 - 1e-3) - 1e-2, rtol=0, atol=1e-6)
    assert (opt.taken_steps(), opt.skipped_steps()) == (2, 1)
    assert_same_on_all_ranks(model)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("where", ["last rank", "every rank"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(gloo, value, where, stage):
    gloo.run(4, skip_a_step_with_a_bad_gradient, value, where, stage)


def overflow_only_in_the_sum() -> None:
    """Each rank's gradient is finite; their sum is not."""
    model = GivenGradients((5,))
    opt = ShardedLion(model.parameters(), lr=1e-2)
    before = model.weights[0].detach().clone()
    model.loss([torch.full((5,), 3e38)]).backward()
    opt.step()
    assert torch.equal(model.weights[0], before) and opt.skipped_steps() == 1


def test_a_sum_that_overflows_skips_the_step(gloo):
    gloo.run(2, overflow_only_in_the_sum)


def take_a_step_with_huge_gradients() -> None:
    """The squares overflow fp32, the gradients do not: the step is taken."""
    model = GivenGradients((5,))
    opt = ShardedLion(model.parameters(), lr=1e-2)
    before = model.weights[0].detach().clone()
    model.loss([torch.full((5,), 1e38)]).backward()
    opt.clip_grad_norm_(1.0)
    opt.step()
    assert torch.equal(model.weights[0], before - 1e-2) and opt.skipped_steps() == 0


def test_huge_finite_gradients_are_clipped_and_not_skipped(gloo):
    gloo.run(2, take_a_step_with_huge_gradients)


def fail_in_backward(stage: int) -> None:
    """An exception in the middle of backward on all ranks; after zero_grad() training goes on as if nothing was."""
    model = make_model()
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model, sharding=ShardingConfig(stage, bucket_numel=100))
    clean_model = make_model()
    clean = ShardedLion(
        clean_model.parameters(), lr=1e-2, module=clean_model, sharding=ShardingConfig(stage, bucket_numel=100)
    )

    def explode(_grad):
        raise FloatingPointError("in the middle of backward")

    for step in range(3):
        batch = make_batch(step, 0, dist.get_rank())
        if step == 1:
            handle = model.up.weight.register_hook(explode)
            with pytest.raises(FloatingPointError):
                batch.loss(model).backward()
            handle.remove()
            opt.zero_grad()
        batch.loss(model).backward()
        opt.step()
        batch.loss(clean_model).backward()
        clean.step()
    opt.finish_param_sync(), clean.finish_param_sync()
    for mine, theirs in zip(model.parameters(), clean_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("stage", [1, 2])
def test_training_goes_on_after_an_exception_in_backward(gloo, stage):
    gloo.run(2, fail_in_backward, stage)


def sparse_gradient() -> str:
    model = nn.Embedding(5, 3, sparse=True)
    opt = ShardedLion(model.parameters())
    with pytest.raises(TypeError) as raised:
        model(torch.tensor([1])).sum().backward()
        opt.step()
    return str(raised.value)


def test_sparse_gradient_is_refused_with_the_remedy(gloo):
    assert "the gradient of 'param.0' is sparse" in gloo.run(1, sparse_gradient)[0]
