"""A learning rate, weight decay or betas that cannot be used never become a step, whenever and however they come.

A number is refused, at the latest by ``step()``, which has changed nothing then. A tensor on the device is not looked
at by the host: it skips the step, as a gradient that is not finite does.
"""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lion_dist
from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig, checkpoint
from lion_dist.kernels.reference import StepScalars, skip_unusable
from lion_dist.kernels.update import lion_update_
from tests.kernels.cases import BF16, FP32, STORAGES, Case, assert_same

NAN, INF = float("nan"), float("inf")
UNUSABLE = {
    "lr": [NAN, INF, -1e-3, 1e300, True, None, "1e-3", 10**400, torch.tensor([1e-3, 1e-3]), torch.tensor(True)],
    "weight_decay": [NAN, INF, -0.1, 1e300, False, None, "0.1", torch.tensor(1j)],
    "betas": [0.9, None, "ab", (0.9,), (0.9, "0.99"), (0.9, 1.0), (0.9, NAN), (True, 0.5), torch.tensor([0.9]), {0.5}],
}
CASES = [(name, value) for name, values in UNUSABLE.items() for value in values]


def one_of(case: tuple) -> str:
    return f"{case[0]}={case[1]!r}"[:40] if isinstance(case, tuple) else ""


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def backward(model: nn.Module, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(4, 5, generator=generator)).square().sum().backward()


def params_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


MAKERS = {
    "Lion": lambda model, **more: Lion(model.parameters(), **more),
    "ShardedLion": lambda model, **more: ShardedLion(model.parameters(), module=model, **more),
    "in backward": lambda model, **more: ShardedLion(
        model.parameters(), module=model, sharding=ShardingConfig(update_in_backward=True), **more
    ),
}


# ---- numbers


@pytest.mark.parametrize("make", ["Lion", "ShardedLion"])
@pytest.mark.parametrize("case", CASES, ids=one_of)
def test_the_constructor_and_a_group_refuse_it_by_name(make, case):
    name, value = case
    model = make_model()
    with pytest.raises(ValueError, match=rf"{name}( as a tensor)? must .*\. .+"):
        MAKERS[make](model, **{name: value})
    opt = MAKERS[make](model)
    with pytest.raises(ValueError, match=f"{name} .*must"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], name: value})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("case", CASES, ids=one_of)
def test_step_refuses_what_was_put_into_a_group_and_goes_on_when_it_is_right_again(make, case):
    name, value = case
    model, spared = make_model(), make_model()
    opt, other = (MAKERS[make](m, lr=1e-3, weight_decay=0.1) for m in (model, spared))
    backward(model)
    opt.step()
    opt.zero_grad()
    before, usable = params_of(model), opt.param_groups[0][name]
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} .*must"):
        backward(model, 1)
        opt.step()
    assert equal(params_of(model), before)
    opt.param_groups[0][name] = usable
    opt.zero_grad()
    for step in (0, 2):
        backward(spared, step)
        other.step()
        other.zero_grad()
    backward(model, 2)
    opt.step()
    assert equal(params_of(model), params_of(spared))


@pytest.mark.parametrize("make", MAKERS)
def test_a_group_that_has_lost_its_learning_rate_is_refused(make):
    model = make_model()
    opt = MAKERS[make](model)
    del opt.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="a param group has no lr. Put it back"):
        backward(model)
        opt.step()


@pytest.mark.parametrize("make", MAKERS)
def test_betas_that_change_in_place_are_noticed(make):
    model = make_model()
    opt = MAKERS[make](model, betas=[0.9, 0.99])
    backward(model)
    opt.step()
    opt.zero_grad()
    opt.param_groups[0]["betas"][1] = 99.0
    with pytest.raises(ValueError, match="betas must be two numbers"):
        backward(model, 1)
        opt.step()


@pytest.mark.parametrize("make", ["Lion", "ShardedLion"])
def test_a_decay_beyond_fp32_is_refused(make):
    with pytest.raises(ValueError, match=r"weight_decay=1e\+30 with lr=1e\+30 is a decay of 1.0e\+60 a step"):
        MAKERS[make](make_model(), lr=1e30, weight_decay=1e30)
    model = make_model()
    opt = MAKERS[make](model, lr=1e-30, weight_decay=0.1, decoupled_weight_decay=True)
    opt.param_groups[0]["lr"] = 1e20
    backward(model)
    with pytest.raises(ValueError, match="weight_decay=0.1 with lr=1e\\+20 is a decay of"):
        opt.step()


def test_an_unchanged_group_is_not_checked_again(monkeypatch):
    model = make_model()
    opt = Lion(model.parameters(), lr=1e-3)
    calls = []
    monkeypatch.setattr("lion_dist.hyperparameters.check_hyperparameters", lambda group, _: calls.append(group["lr"]))
    for step in range(4):
        backward(model, step)
        opt.step()
        if step == 1:
            opt.param_groups[0]["lr"] = 2e-3
    assert calls == [1e-3, 2e-3]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": np.float32(2**-10), "weight_decay": np.float64(0.5), "betas": (np.float32(0.5), np.float64(0.75))},
        {"lr": np.array(2**-10), "weight_decay": np.int64(0), "betas": np.array([0.5, 0.75])},
        {"lr": torch.tensor(2**-10), "weight_decay": torch.tensor([0.5]), "betas": [torch.tensor(0.5), 0.75]},
        {"lr": Fraction(1, 1024), "weight_decay": torch.tensor(0.5), "betas": (Fraction(1, 2), 0.75)},
        {"lr": 1, "weight_decay": 0, "betas": (0, 0)},
    ],
    ids=["numpy scalars", "numpy arrays", "tensors", "fractions", "ints"],
)
def test_numbers_of_numpy_and_tensors_train_as_floats_do(make, settings, tmp_path):
    floats = {k: tuple(map(float, v)) if k == "betas" else float(v) for k, v in settings.items()}
    model, other = make_model(), make_model()
    opts = [MAKERS[make](model, **settings), MAKERS[make](other, **floats)]
    for step in range(3):
        for m, opt in zip((model, other), opts, strict=True):
            backward(m, step)
            opt.step()
            opt.zero_grad()
    assert equal(params_of(model), params_of(other))
    checkpoint.save(tmp_path / "a", model=model, optimizer=opts[0])
    checkpoint.load(tmp_path / "a", model=model, optimizer=opts[0])
    assert float(opts[0].param_groups[0]["lr"]) == floats["lr"]


@pytest.mark.parametrize("make", ["Lion", "ShardedLion"])
@pytest.mark.parametrize("case", [case for case in CASES if not isinstance(case[1], Tensor)], ids=one_of)
def test_a_state_dict_that_holds_it_is_refused_and_changes_nothing(make, case):
    name, value = case
    model = make_model()
    opt = MAKERS[make](model)
    backward(model)
    opt.step()
    saved = opt.state_dict()
    saved["param_groups"] = copy.deepcopy(saved["param_groups"])
    saved["param_groups"][0][name] = value
    kept = dict(opt.param_groups[0])
    with pytest.raises(ValueError, match=f"{name} .*must"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == kept["lr"] and opt.param_groups[0]["betas"] == kept["betas"]


@pytest.mark.parametrize("make", ["Lion", "ShardedLion"])
def test_a_checkpoint_that_holds_it_is_refused_before_anything_is_changed(make, tmp_path, monkeypatch):
    model = make_model()
    opt = MAKERS[make](model)
    backward(model)
    opt.step()
    with monkeypatch.context() as patch:  # as a version that did not refuse it
        patch.setattr("lion_dist.checkpoint.sharded_state._plain", lambda value: -1.0 if value == 1e-4 else value)
        checkpoint.save(tmp_path / "a", model=model, optimizer=opt)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    before = params_of(model)
    with pytest.raises(checkpoint.CheckpointError, match="lr must be finite and at least 0, got -1.0"):
        checkpoint.load(tmp_path / "a", model=model, optimizer=opt)
    assert equal(params_of(model), before) and opt.param_groups[0]["lr"] == 1e-4


# ---- tensors on the device

ON_DEVICE = [("lr", NAN), ("lr", INF), ("lr", -1e-3), ("lr", 1e300), ("weight_decay", NAN), ("weight_decay", INF)]
ON_DEVICE += [("weight_decay", -0.1), ("weight_decay", 1e300)]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "cpu_native", "chunked_reference", "triton"])
@pytest.mark.parametrize("case", [("lr", NAN), ("weight_decay", INF)], ids=one_of)
def test_every_backend_leaves_everything_as_it_was(backend, storage, case):
    rates = {"lr": torch.tensor(1e-3), "weight_decay": 0.1} | {case[0]: torch.tensor(case[1], dtype=torch.float64)}
    scalars = StepScalars.from_group(rates["lr"], (0.9, 0.99), rates["weight_decay"])
    case = Case.make(storage, storage.param, [100, 0, 7], step=3, seed=7)
    before, after = case.tensors(), case.tensors()
    lion_update_(after, case.grads, scalars, skip=skip_unusable(None, [scalars]), seed=7, backend=backend)
    assert_same(after, before)


@pytest.mark.parametrize(("lr", "weight_decay"), list(itertools.product([0.0, 1e-45, 1e-3, 3e38], [0, 1e-3, 1])))
def test_what_can_be_used_on_the_device_is_not_skipped(lr, weight_decay):
    rates = torch.tensor(lr, dtype=torch.float64), torch.tensor(weight_decay, dtype=torch.float64)
    assert skip_unusable(None, [StepScalars.from_group(rates[0], (0.9, 0.99), rates[1])]).item() == 0
    assert skip_unusable(torch.ones(1), [StepScalars.from_group(rates[0], (0.9, 0.99), rates[1])]).item() == 1


def test_numbers_cost_the_device_nothing():
    skip = torch.zeros(())
    scalars = [StepScalars.from_group(1e-3, (0.9, 0.99), 0.1)]
    assert skip_unusable(None, scalars) is None and skip_unusable(skip, scalars) is skip


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("case", ON_DEVICE, ids=one_of)
def test_a_step_by_it_is_skipped_as_a_whole_and_counted(make, case):
    """Also the parameters of other groups, whose rates are fine."""
    name, value = case
    trained = []
    for spoils in (True, False):
        model = make_model()
        rates = {"lr": torch.tensor(1e-3, dtype=torch.float64), "weight_decay": torch.tensor(0.1, dtype=torch.float64)}
        opt = MAKERS[make](model[0], lr=2e-3, precision=PrecisionPolicy(momentum_dtype=BF16))
        opt.add_param_group({"params": list(model[1].parameters()), **rates})
        usable = rates[name].clone()
        for step in range(3):
            if step == 1 and not spoils:
                continue
            rates[name].fill_(value if step == 1 else usable)
            before = params_of(model)
            backward(model, step)
            opt.step()
            opt.zero_grad()
            assert equal(params_of(model), before) == (step == 1)
        trained.append(params_of(model))
        if make != "Lion":
            opt.finish_param_sync()
            assert (opt.taken_steps(), opt.skipped_steps()) == (2, int(spoils))
    assert equal(*trained)


def test_a_skipped_step_of_lion_is_in_its_metrics():
    model = make_model()
    opt = Lion(model.parameters(), lr=torch.tensor(1e-3), metrics_every=1)
    for step, lr in enumerate((1e-3, NAN, 1e-3)):
        opt.param_groups[0]["lr"].fill_(lr)
        backward(model, step)
        opt.step()
    assert opt.metrics()["skipped_steps"] == 1


@pytest.mark.parametrize("make", ["Lion", "ShardedLion"])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("use_triton", [None, True])
def test_cautious_steps_and_kernels_skip_it_too(make, cautious, use_triton):
    model = make_model().to(BF16)
    policy = PrecisionPolicy("none", momentum_rounding="stochastic")
    opt = MAKERS[make](model, lr=torch.tensor(1e-2), cautious=cautious, precision=policy, use_triton=use_triton)
    before = params_of(model)
    opt.param_groups[0]["lr"].fill_(NAN)
    model(torch.randn(4, 5, dtype=BF16)).sum().backward()
    opt.step()
    opt.zero_grad()
    assert equal(params_of(model), before)
    opt.param_groups[0]["lr"].fill_(1e-2)
    model(torch.randn(4, 5, dtype=BF16)).sum().backward()
    opt.step()
    assert not equal(params_of(model), before) and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", ["Lion", "ShardedLion"])
def test_grad_scalers_verdict_and_the_rates_are_one(make):
    """Either skips the step."""
    model = make_model()
    opt = MAKERS[make](model, lr=torch.tensor(1e-3))
    scaler = lion_dist.GradScaler("cpu", init_scale=4.0)
    moved = []
    for step, (lr, loss) in enumerate([(1e-3, 1.0), (NAN, 1.0), (1e-3, INF), (NAN, INF), (1e-3, 1.0)]):
        opt.param_groups[0]["lr"].fill_(lr)
        before = params_of(model)
        generator = torch.Generator().manual_seed(step)
        scaler.scale(model(torch.randn(4, 5, generator=generator)).sum() * loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        moved.append(not equal(params_of(model), before))
    assert moved == [True, False, False, False, True]


@pytest.mark.parametrize("divisor", [NAN, INF, 0.0, -2.0])
def test_a_divisor_on_the_device_that_cannot_divide_skips_the_step(divisor):
    model = make_model()
    opt = ShardedLion(model.parameters(), module=model, weight_decay=0.1)
    before = params_of(model)
    backward(model)
    opt.set_grad_divisor(torch.tensor(divisor))
    opt.step()
    opt.zero_grad()
    assert equal(params_of(model), before) and opt.skipped_steps() == 1
    backward(model)
    opt.set_grad_divisor(torch.tensor(3.0))
    opt.step()
    assert not equal(params_of(model), before) and opt.taken_steps() == 1


def _ranks_skip(settings: dict, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    opt = ShardedLion(
        model.parameters(), lr=torch.tensor(1e-3), module=model, sharding=ShardingConfig(**settings), weight_decay=0.1
    )
    for step, lr in enumerate((1e-3, NAN, 1e-3)):
        before = params_of(model)
        opt.param_groups[0]["lr"].fill_(lr)
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        model(torch.randn(4, 5, generator=generator).to(dtype)).float().square().sum().backward()
        opt.step()
        opt.zero_grad()
        opt.finish_param_sync()
        assert equal(params_of(model), before) == (step == 1), step
    assert (opt.taken_steps(), opt.skipped_steps()) == (2, 1)
    opt.check_replicas()


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"zero_stage": 1}, FP32),
        ({"zero_stage": 2}, BF16),
        ({"param_sync": "coded"}, BF16),
        ({"param_sync": "coded"}, FP32),
        ({"update_in_backward": True}, FP32),
    ],
    ids=str,
)
def test_two_ranks_skip_it_together(gloo, settings, dtype):
    gloo.run(2, _ranks_skip, settings, dtype)
