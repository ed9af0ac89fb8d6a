"""``Lion`` beside lion-pytorch's class and as a torch.optim.Optimizer: what a user of either expects."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import lion_pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lion_dist import Lion, PrecisionPolicy
from tests.models import make_batch, make_model, mlp

LR = 2**-7


def param_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradient_like(param: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    scale = 10 ** torch.empty(param.shape).uniform_(-6, 1, generator=generator)
    return (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def run(opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in opt.param_groups:
            for i, param in enumerate(group["params"]):
                param.grad = gradient_like(param, 100 * i + step)
        opt.step()


# ---- lion-pytorch


def momentum_of(opt: torch.optim.Optimizer) -> Tensor:
    return torch.cat([opt.state[p]["exp_avg"].flatten() for g in opt.param_groups for p in g["params"]])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"betas": (0.95, 0.98), "weight_decay": 1.0},
        {"weight_decay": 0.01, "decoupled_weight_decay": True},
    ],
    ids=str,
)
def test_parameters_equal_lion_pytorchs_step_for_step(settings):
    """50 steps of a language model's own gradients. The momentum may differ in its last bits; see the next test."""
    model, other_model = make_model(), make_model()
    opt = Lion(model.parameters(), 1e-3, **settings)
    other = lion_pytorch.Lion(other_model.parameters(), 1e-3, **settings)
    for step in range(50):
        for m, o in ((model, opt), (other_model, other)):
            o.zero_grad()
            make_batch(step, 0, 0, detour=step % 2 == 0).loss(m).backward()
            o.step()
        for (name, mine), theirs in zip(model.named_parameters(), other_model.parameters(), strict=True):
            assert torch.equal(mine, theirs), f"step {step}: {name}"
    for mine, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        if mine.numel() and mine in opt.state:
            a, b = opt.state[mine]["exp_avg"], other.state[theirs]["exp_avg"]
            assert (a - b).abs().max() <= 1e-6 * a.abs().max()


def test_share_of_momentum_elements_whose_last_bits_differ_from_lion_pytorchs():
    """The numbers that the README gives, measured.

    torch's ``add(alpha=)`` fuses multiply and add where the reference rounds twice. After the first step nothing
    differs, after the second a quarter of the elements do, after 50 two thirds: an error of about 1e-7 of the
    momentum's size, which decays as the momentum does. A sign is decided by it about once in 10^8 updates.
    """
    numel = 200_000
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(numel, generator=generator))
    other_param = nn.Parameter(param.detach().clone())
    opt, other = Lion([param], 1e-3), lion_pytorch.Lion([other_param], 1e-3)
    shares = []
    for _ in range(50):
        param.grad = torch.randn(numel, generator=generator)
        other_param.grad = param.grad.clone()
        opt.step(), other.step()
        mine, theirs = opt.state[param]["exp_avg"], other.state[other_param]["exp_avg"]
        shares.append((mine != theirs).float().mean().item())
    assert shares[0] == 0.0 and 0.2 < shares[1] < 0.4 and 0.6 < shares[-1] < 0.8
    assert (mine - theirs).abs().max() < 1e-6 * mine.abs().max()
    assert (param != other_param).float().mean().item() < 1e-5


def test_state_dict_loads_into_lion_pytorch_and_back():
    params = [param_of(7, 5), param_of(3, seed=1)]
    opt = Lion(params, 1e-3, (0.9, 0.98), 0.1)
    run(opt, range(3))
    other_params = [nn.Parameter(p.detach().clone()) for p in params]
    other = lion_pytorch.Lion(other_params, lr=1.0)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch's keeps the very tensors it is given
    assert torch.equal(momentum_of(other), momentum_of(opt))
    for key in ("lr", "betas", "weight_decay"):
        assert other.param_groups[0][key] == opt.param_groups[0][key]
    run(opt, range(3, 8)), run(other, range(3, 8))
    for mine, theirs in zip(params, other_params, strict=True):
        assert torch.equal(mine, theirs)

    back_params = [nn.Parameter(p.detach().clone()) for p in other_params]
    back = Lion(back_params, lr=1.0)
    back.load_state_dict(other.state_dict())
    assert torch.equal(momentum_of(back), momentum_of(other))
    run(back, range(8, 12)), run(other, range(8, 12))
    for mine, theirs in zip(back_params, other_params, strict=True):
        assert torch.equal(mine, theirs)


def test_positional_arguments_are_lion_pytorchs():
    mine = list(inspect.signature(Lion.__init__).parameters.values())
    theirs = list(inspect.signature(lion_pytorch.Lion.__init__).parameters.values())
    assert [p.name for p in mine[: len(theirs)]] == [p.name for p in theirs]
    for a, b in zip(mine, theirs, strict=False):
        if a.name != "use_triton":  # None chooses here; lion-pytorch's False forbids
            assert a.default == b.default
    param, other = param_of(5), param_of(5)
    arguments = (1e-3, (0.8, 0.9), 0.2, False, True)
    opt, other_opt = Lion([param], *arguments), lion_pytorch.Lion([other], *arguments)
    run(opt, range(5)), run(other_opt, range(5))
    assert torch.equal(param, other)


def test_decoupled_weight_decay_follows_the_schedule_as_lion_pytorchs():
    """The decay is divided by the constructor's lr and multiplied by the present one."""
    param, other = param_of(50), param_of(50)
    opts = [Lion([param], 1e-2, weight_decay=0.1, decoupled_weight_decay=True)]
    opts.append(lion_pytorch.Lion([other], 1e-2, weight_decay=0.1, decoupled_weight_decay=True))
    for opt in opts:
        run(opt, range(2))
        opt.param_groups[0]["lr"] = 5e-3
        run(opt, range(2, 4))
    assert torch.equal(param, other)


# ---- as a torch.optim.Optimizer


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-4, 1e-2, step_size_up=2),  # cycles beta1 too
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=9),  # likewise
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 1e-4),
}


def test_every_scheduler_of_torch_is_in_the_table():
    public = {name for name in lr_scheduler.__all__ if name not in ("LRScheduler",)}
    assert public <= SCHEDULERS.keys()


@pytest.mark.filterwarnings("ignore:.*verbose.*", "ignore:The epoch parameter.*")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_steps_it(name):
    """The same parameters as lion-pytorch under the same scheduler, whose rates really changed."""
    results, rates = [], set()
    for cls in (Lion, lion_pytorch.Lion):
        param = param_of(20)
        opt = cls([param], 1e-3, weight_decay=0.1)
        scheduler = SCHEDULERS[name](opt)
        for step in range(8):
            run(opt, range(step, step + 1))
            rates.add(opt.param_groups[0]["lr"])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        results.append(param.detach())
    assert torch.equal(*results)
    assert len(rates) > 1


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    param = nn.Parameter(torch.tensor([2.0]))
    opt = Lion([param], lr=LR)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 4.0
    assert param.item() == 2.0 - LR
    assert opt.step() is None


def test_param_groups_have_their_own_settings():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = Lion([{"params": [a], "lr": LR}, {"params": [b], "weight_decay": 0.5}], lr=2 * LR)
    a.grad, b.grad = torch.ones(3), torch.zeros(3)
    opt.step()
    assert torch.equal(a, torch.full((3,), 1 - LR))
    assert torch.equal(b, torch.full((3,), 1 - LR))  # 2 * LR * 0.5, decay alone


def test_group_added_in_the_middle_is_trained():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
    opt = Lion([a], lr=LR)
    a.grad = torch.ones(3)
    opt.step()
    opt.add_param_group({"params": [b], "lr": 3 * LR})
    a.grad, b.grad = torch.ones(3), -torch.ones(5)
    opt.step()
    assert torch.equal(a, torch.full((3,), 1 - 2 * LR)) and torch.equal(b, torch.full((5,), 1 + 3 * LR))


def test_named_parameters_are_taken():
    model = mlp(4, 4)
    opt = Lion(model.named_parameters(), lr=LR)
    assert opt.param_groups[0]["param_names"] == ["0.weight", "0.bias"]
    model(torch.ones(1, 4)).sum().backward()
    opt.step()


def test_parameter_without_a_gradient_is_left_alone():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = Lion([used, unused], lr=LR, weight_decay=0.5)
    used.grad = torch.ones(3)
    opt.step()
    assert torch.equal(unused, torch.ones(3)) and unused not in opt.state


def test_zero_gradient_moves_nothing_but_decays():
    """DeepSpeed's FusedLion takes sign(0) for -1: ten such steps moved a weight by ten learning rates."""
    still, decaying = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = Lion([{"params": [still]}, {"params": [decaying], "weight_decay": 0.5}], lr=LR)
    for _ in range(10):
        still.grad, decaying.grad = torch.zeros(3), torch.zeros(3)
        opt.step()
    assert torch.equal(still, torch.ones(3))
    assert torch.allclose(decaying, torch.tensor((1 - LR / 2) ** 10))


def test_learning_rate_may_be_a_tensor():
    lr = torch.tensor(1e-3)
    a, b = param_of(40), param_of(40)
    opt, plain = Lion([a], lr=lr, weight_decay=0.1), Lion([b], lr=lr.item(), weight_decay=0.1)
    run(opt, range(3)), run(plain, range(3))
    lr.mul_(0.5)  # the next step reads it
    plain.param_groups[0]["lr"] = lr.item()
    run(opt, range(3, 6)), run(plain, range(3, 6))
    assert torch.equal(a, b)


def test_step_hooks_of_torch_run():
    param = nn.Parameter(torch.ones(3))
    opt = Lion([param], lr=LR)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    run(opt, range(1))
    assert seen == ["pre", "post"]


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_optimizer_survives_being_copied(how):
    """The copy is trained on with its own parameters, policy and momentum."""
    param = param_of(30, dtype=torch.bfloat16)
    policy = PrecisionPolicy("none", momentum_rounding="stochastic", seed=5)
    opt = Lion([param], 1e-3, weight_decay=0.1, use_triton=False, precision=policy)
    run(opt, range(3))
    if how == "pickle":
        other = pickle.loads(pickle.dumps(opt))
    elif how == "deepcopy":
        other = copy.deepcopy(opt)
    else:
        buffer = io.BytesIO()
        torch.save(opt, buffer)
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    (copied,) = other.param_groups[0]["params"]
    assert copied is not param and torch.equal(copied, param)
    run(opt, range(3, 6)), run(other, range(3, 6))
    assert torch.equal(copied, param)
    assert torch.equal(momentum_of(other), momentum_of(opt))
    assert other.precision == policy


def test_deepcopied_model_and_new_optimizer_train_on_their_own():
    model = mlp(4, 4)
    opt = Lion(model.parameters(), lr=LR)
    run(opt, range(2))
    ema = copy.deepcopy(model)
    kept = [p.detach().clone() for p in ema.parameters()]
    run(opt, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(ema.parameters(), kept, strict=True))


def test_state_may_be_cleared_or_replaced():
    """A user who starts the momentum afresh, or puts another in its place, is heard."""
    param = nn.Parameter(torch.zeros(3))
    opt = Lion([param], lr=LR, betas=(1 - 2**-20, 0.5))
    param.grad = torch.ones(3)
    opt.step()
    opt.state.clear()
    param.grad = -torch.ones(3)
    opt.step()
    assert torch.equal(param, torch.zeros(3)), "the old momentum was used"
    opt.state[param]["exp_avg"] = torch.ones(3)
    opt.step()
    assert torch.equal(param, torch.full((3,), -LR)), "the new momentum was not used"


# ---- GradScaler


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_skips_overflow_and_scales_back(unscale):
    param, other = param_of(20), param_of(20)
    opt, plain = Lion([param], lr=1e-3), Lion([other], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    scales = []
    for step in range(5):
        direction = gradient_like(param, step)
        loss = (param * direction).sum() * (float("inf") if step == 2 else 1.0)
        opt.zero_grad()
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        if step != 2:
            other.grad = direction
            plain.step()
    assert scales == [8.0, 16.0, 8.0, 8.0, 16.0]
    assert torch.equal(param, other)
    assert torch.equal(opt.state[param]["exp_avg"], plain.state[other]["exp_avg"])


# ---- refused


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": -1.0}, "lr must be finite and at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, "betas must be two numbers"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0"),
        ({"lr": 0.0, "decoupled_weight_decay": True}, "divides by the initial lr"),
    ],
)
def test_unusable_hyperparameters_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Lion([param_of(3)], **settings)


def test_unusable_group_is_refused_and_not_added():
    opt = Lion([param_of(3)])
    for bad, error in (
        ({"params": [param_of(3)], "lr": -1.0}, ValueError),
        ({"params": [param_of(3)], "betas": (0.9, 2.0)}, ValueError),
        ({"params": [nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)]}, TypeError),
        ({"params": [nn.Parameter(torch.zeros(3, dtype=torch.complex64))]}, TypeError),
        ({"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]}, TypeError),
        ({"params": opt.param_groups[0]["params"]}, ValueError),
    ):
        with pytest.raises(error):
            opt.add_param_group(bad)
        assert len(opt.param_groups) == 1


def test_no_parameters_are_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        Lion([])


def test_integer_parameters_are_refused_by_name():
    with pytest.raises(TypeError, match="table has dtype torch.int32; Lion updates torch.float32.*buffer"):
        Lion([("table", nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False))])


def test_parameter_in_two_groups_is_refused():
    param = param_of(3)
    with pytest.raises(ValueError, match="more than one parameter group"):
        Lion([{"params": [param]}, {"params": [param]}])


def test_sparse_gradient_is_refused_and_nothing_is_changed():
    table, other = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(3))
    before = table.weight.detach().clone()
    opt = Lion([other, table.weight], lr=LR)
    (table(torch.tensor([1, 2])).sum() + other.sum()).backward()
    with pytest.raises(RuntimeError, match=r"no sparse update.*\(5, 3\).*Use nn.Embedding\(sparse=False\)"):
        opt.step()
    assert torch.equal(table.weight, before) and torch.equal(other, torch.ones(3))


@pytest.mark.parametrize("shape", [(5, 3), (1, 1)])
def test_sparse_gradient_after_a_dense_one_is_refused(shape):
    param = param_of(*shape)
    param.grad = torch.ones(shape)
    opt = Lion([param], lr=LR)
    opt.step()
    before = param.detach().clone()
    param.grad = torch.ones(shape).to_sparse()
    with pytest.raises(RuntimeError, match="no sparse update"):
        opt.step()
    assert torch.equal(param, before)


def test_gradient_that_is_given_another_dtype_or_order_between_steps():
    param, twin = param_of(4, 6), param_of(4, 6)
    opt, plain = Lion([param], lr=LR), Lion([twin], lr=LR)
    for step in range(8):
        param.grad, twin.grad = gradient_like(param, step), gradient_like(param, step).bfloat16().float()
        param.grad.data = param.grad.bfloat16()
        if step % 2:
            param.grad.data = param.grad.t().contiguous().t()
        if step % 4 > 1:
            param.grad.data = param.grad.float()
        opt.step(), plain.step()
    assert torch.equal(param, twin)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_gradient_of_another_shape_is_refused_and_nothing_is_changed(steps_before):
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 2))
    opt = Lion([first, second], lr=LR if steps_before == 0 else 0.0)
    for _ in range(steps_before):
        first.grad, second.grad = torch.ones(3), torch.ones(4, 2)
        opt.step()
    first.grad, second.grad = torch.ones(3), torch.ones(4, 2)
    for shape in ((1,), (4,), (2, 4)):
        second.grad.data = torch.ones(shape)
        with pytest.raises(ValueError, match=r"gradient.*shape.*\(4, 2\)"):
            opt.step()
        assert torch.equal(first, torch.ones(3)) and torch.equal(second, torch.ones(4, 2))


def test_triton_without_gpu_or_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    param = param_of(3)
    opt = Lion([param], use_triton=True)
    before = param.detach().clone()
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="use_triton=True, but the parameters are on cpu.*TRITON_INTERPRET=1"):
        opt.step()
    assert torch.equal(param, before)
