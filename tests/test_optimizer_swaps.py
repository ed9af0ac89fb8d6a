"""What a program puts in the place of parameters, gradients and state between two steps of ``Lion``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, PrecisionPolicy
from tests.models import mlp
from tests.test_optimizer import LR, gradient_like, param_of, run
from tests.test_optimizer_precision import POLICIES, POLICY, assert_equal, params_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# ---- parameters


def resized(opt: Lion, position: int, rows: int, seed: int) -> nn.Parameter:
    """Resize one parameter as a program does that resizes embeddings: a new one in the groups."""
    group = opt.param_groups[position]
    old = group["params"][0]
    new = param_of(rows, *old.shape[1:], dtype=old.dtype, seed=seed)
    group["params"][0] = new
    return new


def groups_of(policy: str, first_rows: int) -> Lion:
    dtype, precision = POLICIES[policy]
    shapes = ((first_rows, 3), (4, 5))
    params = [param_of(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return Lion([{"params": [p]} for p in params], 1e-3, weight_decay=0.1, precision=precision)


@POLICY
def test_parameter_swapped_in_a_group_is_trained_and_saved(policy):
    """From the swap on, everything is as for an optimizer that was made with the new parameter: also random bits."""
    opt = groups_of(policy, first_rows=6)
    run(opt, range(3))
    old = opt.param_groups[0]["params"][0]
    new = resized(opt, 0, rows=9, seed=5)
    other = groups_of(policy, first_rows=9)
    with torch.no_grad():
        for mine, theirs in zip(params_of(opt), params_of(other), strict=True):
            theirs.copy_(mine)
    saved = opt.state_dict()
    assert [*saved["state"]] == [1]  # of the parameter that is there; the new one has none yet
    other.load_state_dict(copy.deepcopy(saved))
    run(opt, range(3, 6)), run(other, range(3, 6))
    assert_equal(opt, other)
    assert not torch.equal(new, param_of(9, 3, dtype=new.dtype, seed=5))
    assert sorted(opt.state_dict()["state"]) == [0, 1]
    kept = opt.state[old]["exp_avg"].clone()

    opt.param_groups[0]["params"][0] = old  # and back: its state was kept
    assert torch.equal(opt.state_dict()["state"][0]["exp_avg"], kept)
    run(opt, range(6, 8))
    assert not torch.equal(opt.state[old]["exp_avg"], kept)


@pytest.mark.parametrize("policy", ["bf16-none-stochastic", "fp32"])
def test_swapped_parameter_without_a_gradient_moves_the_indices_behind_it(policy):
    opt, other = groups_of(policy, first_rows=6), groups_of(policy, first_rows=9)
    run(opt, range(2))
    resized(opt, 0, rows=9, seed=0)
    with torch.no_grad():
        for mine, theirs in zip(params_of(opt), params_of(other), strict=True):
            theirs.copy_(mine)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for step in range(3):
        for o in (opt, other):
            behind = params_of(o)[1]
            behind.grad = gradient_like(behind, step)
            o.step()
    assert torch.equal(params_of(opt)[1], params_of(other)[1])


@pytest.mark.parametrize("policy", ["fp32", "bf16-none-stochastic"])
def test_parameter_list_and_groups_replaced_by_hand(policy):
    opt = groups_of(policy, first_rows=6)
    run(opt, range(2))
    opt.param_groups = [dict(opt.param_groups[1]), dict(opt.param_groups[0])]
    run(opt, range(2, 4))
    opt.param_groups[0]["params"] = [*opt.param_groups[0]["params"], param_of(3, dtype=params_of(opt)[0].dtype)]
    before = [p.detach().clone() for p in params_of(opt)]
    run(opt, range(4, 6))
    assert all(not torch.equal(p, b) for p, b in zip(params_of(opt), before, strict=True))
    del opt.param_groups[0]
    assert len(opt.state_dict()["state"]) == 1
    run(opt, range(6, 8))


def test_model_loaded_by_assignment_is_trained_when_the_groups_follow():
    model = mlp(4, 4)
    opt = Lion(model.parameters(), lr=LR)
    run(opt, range(2))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    opt.param_groups[0]["params"][:] = model.parameters()
    before = [p.detach().clone() for p in model.parameters()]
    opt.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert len(opt.state_dict()["state"]) == 2


@pytest.mark.parametrize("after", [BF16, FP16, FP32])
@pytest.mark.parametrize("before", [BF16, FP16, FP32])
@pytest.mark.parametrize("how", ["data", "module"])
def test_parameters_that_change_dtype_take_their_momentum_along(before, after, how):
    """As when the state is loaded into an optimizer over parameters of the new dtype."""
    if before == after:
        pytest.skip("nothing changes")
    model = mlp(5, 3).to(before)
    opt = Lion(model.parameters(), 1e-2, weight_decay=0.1)
    run(opt, range(3))
    opt.zero_grad()
    state = copy.deepcopy(opt.state_dict())
    if how == "module":
        model.to(after)
    else:
        for param in model.parameters():
            param.data = param.data.to(after)
    twin = copy.deepcopy(model)
    other = Lion(twin.parameters(), 1e-2, weight_decay=0.1)
    if BF16 in (before, after):
        with pytest.warns(UserWarning, match="the loaded exp_avg is"):
            other.load_state_dict(state)
        with pytest.warns(UserWarning, match="the loaded exp_avg is"):
            run(opt, range(3, 4))
    else:
        other.load_state_dict(state)
        run(opt, range(3, 4))
    run(other, range(3, 4))
    run(opt, range(4, 6)), run(other, range(4, 6))
    assert_equal(opt, other)


def test_parameters_that_change_to_a_dtype_without_an_update_are_refused_and_nothing_is_changed():
    model = mlp(5, 3)
    opt = Lion(model.parameters(), LR)
    run(opt, range(2))
    opt.zero_grad()
    model.double()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match="float64"):
        run(opt, range(2, 3))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_parameter_of_another_shape_than_its_state_is_refused_and_nothing_is_changed():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    opt = Lion([first, second], lr=0.0)
    run(opt, range(1))
    second.data = torch.ones(6)
    opt.param_groups[0]["lr"] = LR
    first.grad, second.grad = torch.ones(3), torch.ones(6)
    with pytest.raises(ValueError, match=r"exp_avg has shape \(4,\), its parameter \(6,\).*delete optimizer.state"):
        opt.step()
    assert torch.equal(first, torch.ones(3)) and torch.equal(second, torch.ones(6))
    del opt.state[second]
    opt.step()
    assert torch.equal(second, torch.full((6,), 1 - LR))


# ---- state


def spoil_momentum(state: dict, how: str) -> None:
    old = state["exp_avg"]
    if how == "dtype":
        state["exp_avg"] = old.double()
    elif how == "strides":
        state["exp_avg"] = old.t().contiguous().t()
    elif how == "data":
        old.data = old.data.clone()
    elif how == "new":
        state["exp_avg"] = old.clone()


@POLICY
@pytest.mark.parametrize("how", ["dtype", "strides", "data", "new"])
def test_momentum_that_a_program_replaces_is_the_one_that_is_updated(policy, how):
    """Strided memory was updated in a copy, so that the momentum stood still for good."""
    dtype, precision = POLICIES[policy]
    opts = [Lion([param_of(4, 6, dtype=dtype)], 1e-3, precision=precision) for _ in range(2)]
    for opt in opts:
        run(opt, range(2))
    spoil_momentum(opts[0].state[params_of(opts[0])[0]], how)
    for step in range(2, 5):
        for opt in opts:
            run(opt, range(step, step + 1))
        assert_equal(*opts)


@pytest.mark.parametrize("policy", ["bf16-split", "bf16-fp32", "fp16"])
def test_main_params_that_a_program_replaces_are_the_ones_that_are_used(policy):
    opt, other = (Lion([param_of(4, 6, dtype=POLICIES[policy][0])], 1e-3, precision=POLICIES[policy][1]) for _ in "ab")
    run(opt, range(5)), run(other, range(5))
    (param,), (twin,) = params_of(opt), params_of(other)
    opt.state[param]["main_param"] = opt.state[param]["main_param"] + 1
    other.state[twin]["main_param"].add_(1)
    run(opt, range(5, 9)), run(other, range(5, 9))
    assert_equal(opt, other)


def test_step_count_that_a_program_replaces_is_the_one_that_counts():
    policy = PrecisionPolicy("none", seed=3)
    opt, other = (Lion([param_of(40, dtype=BF16)], 1e-3, precision=policy) for _ in "ab")
    run(opt, range(3)), run(other, range(3))
    opt.state[params_of(opt)[0]]["step"] = torch.tensor(17)
    other.state[params_of(other)[0]]["step"].fill_(17)
    run(opt, range(3, 5)), run(other, range(3, 5))
    assert_equal(opt, other)
    opt.state[params_of(opt)[0]]["step"] = 19  # an int, as other Lions count
    run(opt, range(5, 7)), run(other, range(5, 7))
    assert_equal(opt, other)


def test_main_params_that_a_program_removes_are_made_anew():
    opt = Lion([param_of(40, dtype=BF16)], 1e-3)
    run(opt, range(3))
    (param,) = params_of(opt)
    del opt.state[param]["main_param"]
    twin = Lion([nn.Parameter(param.detach().clone())], 1e-3)
    twin.state_of(params_of(twin)[0])["exp_avg"].copy_(opt.state[param]["exp_avg"])
    run(opt, range(3, 6)), run(twin, range(3, 6))
    assert_equal(opt, twin)


def test_state_moved_to_the_host_and_back_goes_on():
    """What programs do that offload the optimizer between steps."""
    opt, other = (Lion([param_of(4, 6, dtype=BF16)], 1e-3) for _ in "ab")
    for step in range(5):
        run(opt, range(step, step + 1)), run(other, range(step, step + 1))
        for state in opt.state.values():
            for key in state:
                state[key] = state[key].clone()
    assert_equal(opt, other)


# ---- gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_gradient_of_a_dtype_without_an_update_is_refused_and_nothing_is_changed(dtype, steps_before):
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    opt = Lion([{"params": [first]}, {"params": [second]}], lr=0.0)
    for _ in range(steps_before):
        run(opt, range(1))
    opt.param_groups[0]["lr"] = opt.param_groups[1]["lr"] = LR
    first.grad, second.grad = torch.ones(3), torch.ones(4)
    second.grad.data = torch.ones(4).to(dtype)
    with pytest.raises(TypeError, match=rf"a gradient has dtype {dtype}.*\(4,\).*Cast the gradient"):
        opt.step()
    assert torch.equal(first, torch.ones(3)) and torch.equal(second, torch.ones(4))


def test_zeroed_gradients_decay_as_lion_pytorchs_do():
    """zero_grad(set_to_none=False) leaves zeros, and a zero gradient is a gradient."""
    import lion_pytorch

    results = []
    for cls in (Lion, lion_pytorch.Lion):
        param = param_of(20)
        opt = cls([param], 1e-3, weight_decay=0.1)
        for step in range(4):
            opt.zero_grad(set_to_none=False)
            if step != 2:
                (param * gradient_like(param, step)).sum().backward()
            opt.step()
        results.append(param.detach())
    assert torch.equal(*results)


# ---- nothing, or the whole step


def test_closure_that_raises_leaves_everything_as_it_was():
    param = param_of(5)
    opt = Lion([param], lr=LR, metrics_every=1)
    run(opt, range(2))
    before, momentum = param.detach().clone(), opt.state[param]["exp_avg"].clone()

    def closure() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert torch.equal(param, before) and torch.equal(opt.state[param]["exp_avg"], momentum)
    run(opt, range(2, 4))
    assert opt.metrics()["step"] == 4


@pytest.mark.parametrize("bad", [{"lr": "1e-3"}, {"betas": None}, {"weight_decay": None}])
def test_unusable_setting_of_a_later_group_leaves_the_earlier_as_it_was(bad):
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    opt = Lion([{"params": [first]}, {"params": [second]}], lr=LR)
    opt.param_groups[1].update(bad)
    first.grad, second.grad = torch.ones(3), torch.ones(4)
    with pytest.raises((TypeError, ValueError)):
        opt.step()
    assert torch.equal(first, torch.ones(3)) and torch.equal(second, torch.ones(4))


# ---- torch.compile


@pytest.mark.parametrize("policy", ["fp32", "bf16-split", "bf16-none-stochastic"])
def test_compiled_step_is_the_step(policy):
    """Dynamo traces what it can and leaves the rest: schedules, new groups and new gradients are seen."""
    dtype, precision = POLICIES[policy]
    opts = [Lion([param_of(4, 6, dtype=dtype)], 1e-2, weight_decay=0.1, precision=precision) for _ in range(2)]
    steps = [torch.compile(opts[0].step, backend="eager"), opts[1].step]
    for step in range(5):
        for opt, take in zip(opts, steps, strict=True):
            if step == 3:
                opt.add_param_group({"params": [param_of(3, dtype=dtype)]})
            for group in opt.param_groups:
                group["lr"] = 1e-2 / (1 + step)
                for i, param in enumerate(group["params"]):
                    param.grad = gradient_like(param, 100 * i + step)
            take()
    assert_equal(*opts)
    torch._dynamo.reset()
