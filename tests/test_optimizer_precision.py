"""``Lion``'s state: dtypes through save and load, main params, rounding, and tensors of odd shapes."""

from __future__ import annotations

import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

from lion_dist import Lion, PrecisionPolicy
from lion_dist.kernels.reference import join_main
from tests.test_optimizer import LR, gradient_like, param_of, run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

POLICIES = {
    "fp32": (FP32, PrecisionPolicy()),
    "fp32-momentum16": (FP32, PrecisionPolicy(momentum_dtype=BF16)),
    "fp32-momentum16-stochastic": (FP32, PrecisionPolicy(momentum_dtype=BF16, momentum_rounding="stochastic", seed=3)),
    "bf16-split": (BF16, PrecisionPolicy("split")),
    "bf16-split-momentum32": (BF16, PrecisionPolicy("split", FP32)),
    "bf16-fp32": (BF16, PrecisionPolicy("fp32")),
    "bf16-none": (BF16, PrecisionPolicy("none", seed=3)),
    "bf16-none-stochastic": (BF16, PrecisionPolicy("none", BF16, "stochastic", seed=3)),
    "fp16": (FP16, PrecisionPolicy()),
}
POLICY = pytest.mark.parametrize("policy", POLICIES)


def make(policy: str, *shapes: tuple[int, ...]) -> Lion:
    dtype, precision = POLICIES[policy]
    params = [param_of(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes or ((33, 5), (7,), ()))]
    return Lion(params, 1e-3, weight_decay=0.1, precision=precision)


def params_of(opt: Lion) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def assert_equal(opt: Lion, other: Lion) -> None:
    for mine, theirs in zip(params_of(opt), params_of(other), strict=True):
        assert torch.equal(mine, theirs)
        assert opt.state[mine].keys() == other.state[theirs].keys()
        for key, value in opt.state[mine].items():
            assert value.dtype == other.state[theirs][key].dtype
            assert torch.equal(value, other.state[theirs][key]), key


# ---- save and load


@POLICY
def test_resumed_training_is_the_same_to_the_bit(policy):
    opt = make(policy)
    run(opt, range(4))
    buffer = io.BytesIO()
    torch.save((opt.state_dict(), [p.detach() for p in params_of(opt)]), buffer)
    saved, values = torch.load(io.BytesIO(buffer.getvalue()))

    other = make(policy)
    with torch.no_grad():
        for param, value in zip(params_of(other), values, strict=True):
            param.copy_(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved)
    assert_equal(other, opt)
    run(opt, range(4, 8)), run(other, range(4, 8))
    assert_equal(other, opt)


@POLICY
def test_optimizer_may_be_loaded_before_the_model(policy):
    opt = make(policy)
    run(opt, range(4))
    other = make(policy)
    run(other, range(20, 22))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():
        for param, value in zip(params_of(other), params_of(opt), strict=True):
            param.copy_(value)
    run(opt, range(4, 6)), run(other, range(4, 6))
    assert_equal(other, opt)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("momentum", [FP32, BF16], ids=str)
def test_momentum_keeps_its_configured_dtype_through_load(dtype, momentum):
    """torch's own load_state_dict casts state to the parameter's dtype: a bf16 momentum over fp32 became fp32."""
    policy = PrecisionPolicy(momentum_dtype=momentum)
    params = [param_of(5, dtype=dtype)]
    opt = Lion(params, precision=policy)
    run(opt, range(2))
    assert opt.state[params[0]]["exp_avg"].dtype == momentum
    opt.load_state_dict(opt.state_dict())
    assert opt.state[params[0]]["exp_avg"].dtype == momentum


def test_momentum_of_another_dtype_is_recast_with_a_warning():
    source = Lion([param_of(5)])
    run(source, range(2))
    param = param_of(5)
    opt = Lion([param], precision=PrecisionPolicy(momentum_dtype=BF16))
    with pytest.warns(UserWarning, match="loaded exp_avg is torch.float32; it is kept as torch.bfloat16"):
        opt.load_state_dict(source.state_dict())
    theirs = source.state[source.param_groups[0]["params"][0]]["exp_avg"]
    assert torch.equal(opt.state[param]["exp_avg"], theirs.bfloat16())


@pytest.mark.parametrize(("saved", "present"), [("fp32", "split"), ("split", "fp32")])
def test_main_params_of_the_other_kind_are_converted(saved, present):
    source = Lion([param_of(9, dtype=BF16)], 1e-3, precision=PrecisionPolicy(saved))
    run(source, range(5))
    param = nn.Parameter(source.param_groups[0]["params"][0].detach().clone())
    opt = Lion([param], 1e-3, precision=PrecisionPolicy(present))
    opt.load_state_dict(source.state_dict())
    run(source, range(5, 12)), run(opt, range(5, 12))
    assert torch.equal(param, source.param_groups[0]["params"][0])


def test_missing_group_keys_are_filled_in():
    opt = Lion([param_of(5)], 1e-3, weight_decay=0.3)
    saved = opt.state_dict()
    del saved["param_groups"][0]["weight_decay"]
    saved["param_groups"][0]["lr"] = 5e-4
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["weight_decay"] == 0.3 and opt.param_groups[0]["lr"] == 5e-4


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda saved: saved["state"][0].pop("exp_avg"), r"no 'exp_avg': it is not a Lion's"),
        (
            lambda saved: saved["state"][0].update(exp_avg=torch.zeros(6)),
            r"saved exp_avg has shape \(6,\), its parameter \(5,\)",
        ),
        (lambda saved: saved["param_groups"].append(saved["param_groups"][0]), "different number of parameter groups"),
        (lambda saved: saved["param_groups"][0].update(params=[0, 1]), "size of optimizer's group"),
    ],
)
def test_state_of_another_optimizer_is_refused_and_nothing_is_changed(spoil, match):
    param = param_of(5)
    opt = Lion([param])
    run(opt, range(2))
    before = opt.state[param]["exp_avg"].clone()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["exp_avg"] += 1
    saved["param_groups"][0]["lr"] = 0.5
    spoil(saved)
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(saved)
    assert torch.equal(opt.state[param]["exp_avg"], before)
    assert opt.param_groups[0]["lr"] == 1e-4


# ---- main params


def test_split_main_params_are_bit_equal_to_fp32():
    split, full = make("bf16-split"), make("bf16-fp32")
    for step in range(60):
        run(split, range(step, step + 1)), run(full, range(step, step + 1))
    for mine, theirs in zip(params_of(split), params_of(full), strict=True):
        assert torch.equal(mine, theirs)
        state = split.state[mine]
        assert state["main_param"].dtype == torch.int16
        joined = join_main(mine.detach().flatten(), state["main_param"].flatten())
        assert torch.equal(joined, full.state[theirs]["main_param"].flatten())


@pytest.mark.parametrize("policy", ["bf16-split", "bf16-fp32", "fp16"])
def test_main_params_follow_a_parameter_that_was_changed_from_outside(policy):
    """What somebody wrote (load_state_dict, EMA) is where the next step starts; other parameters keep their bits."""
    opt, control = make(policy, (9,), (6,)), make(policy, (9,), (6,))
    run(opt, range(5)), run(control, range(5))
    changed, untouched = params_of(opt)
    with torch.no_grad():
        changed.copy_(torch.full((9,), 64.0))
    run(opt, range(5, 8)), run(control, range(5, 8))
    assert (changed.float() - 64.0).abs().max() < 1.0
    assert torch.equal(untouched, params_of(control)[1])


@pytest.mark.parametrize("policy", ["bf16-split", "bf16-fp32", "bf16-none"])
def test_weight_decay_survives_bf16(policy):
    """lion-pytorch in bf16 loses it entirely: ``p *= 1 - lr * wd`` rounds back to p."""
    param = nn.Parameter(torch.ones(2048, dtype=BF16))
    opt = Lion([param], lr=1e-3, weight_decay=0.1, precision=POLICIES[policy][1])
    for _ in range(500):
        param.grad = torch.zeros_like(param)
        opt.step()
    assert abs(param.float().mean().item() - (1 - 1e-4) ** 500) < 0.003


def test_stochastic_rounding_repeats_with_its_seed_and_differs_without():
    results = []
    for seed in (3, 3, 4):
        param = param_of(500, dtype=BF16)
        opt = Lion([param], 1e-3, precision=PrecisionPolicy("none", seed=seed))
        run(opt, range(3))
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# ---- gradients that are not finite


@POLICY
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_element_with_a_bad_gradient_stays_and_others_move(policy, value):
    opt = make(policy, (40,))
    run(opt, range(2))
    (param,) = params_of(opt)
    old, state = param.detach().clone(), {k: v.clone() for k, v in opt.state[param].items()}
    param.grad = torch.ones_like(param)
    param.grad[7] = value
    opt.step()
    others = torch.arange(40) != 7
    for key, new, before in [("param", param.detach(), old)] + [(k, opt.state[param][k], v) for k, v in state.items()]:
        assert new.isfinite().all()
        if key != "step":
            assert torch.equal(new[7], before[7])
    assert not torch.equal(opt.state[param]["exp_avg"][others], state["exp_avg"][others])
    run(opt, range(2, 4))
    assert not torch.equal(opt.state[param]["exp_avg"][7], state["exp_avg"][7])  # nothing sticks


# ---- shapes and layouts


@POLICY
def test_empty_and_zero_dimensional_parameters(policy):
    opt = make(policy, (0, 3), (), (1,))
    old = [p.detach().clone() for p in params_of(opt)]
    run(opt, range(3))
    for param, before in zip(params_of(opt), old, strict=True):
        assert param.shape == before.shape
        assert torch.equal(opt.state[param]["exp_avg"], opt.state[param]["exp_avg"].view(before.shape))
    assert not torch.equal(params_of(opt)[1], old[1]) or POLICIES[policy][0] != FP32


def test_only_an_empty_parameter():
    opt = make("fp32", (0,))
    run(opt, range(2))


@POLICY
def test_layout_in_memory_changes_nothing(policy):
    """Transposed and channels_last parameters, and gradients laid out otherwise than their parameters."""
    opt, other = make(policy, (6, 4), (2, 3, 4, 5)), make(policy, (6, 4), (2, 3, 4, 5))
    transposed, image = params_of(other)
    transposed.data = transposed.data.t().contiguous().t()
    image.data = image.data.to(memory_format=torch.channels_last)
    assert not transposed.is_contiguous() and not image.is_contiguous()
    for step in range(4):
        for i, (param, odd) in enumerate(zip(params_of(opt), params_of(other), strict=True)):
            grad = gradient_like(param, 10 * i + step)
            param.grad, odd.grad = grad, grad.clone()
            if step % 2:
                param.grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
        opt.step(), other.step()
    assert not transposed.is_contiguous()
    assert_equal(other, opt)


def test_views_of_one_tensor_are_updated_in_place():
    """Flat parameters (FSDP1, DeepSpeed) are views: memory beside them stays as it was."""
    flat = torch.ones(100)
    params = [nn.Parameter(flat[10:30]), nn.Parameter(flat[31:50])]
    opt = Lion(params, lr=LR)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    expected = torch.ones(100)
    expected[10:30] -= LR
    expected[31:50] -= LR
    assert torch.equal(flat, expected)


def test_parameter_that_moves_in_memory_is_followed():
    """``.data`` swapped for another tensor (model.to, FSDP unshard): the same parameter and momentum."""
    param, other = param_of(20), param_of(20)
    opt, plain = Lion([param], 1e-3), Lion([other], 1e-3)
    for step in range(6):
        run(opt, range(step, step + 1)), run(plain, range(step, step + 1))
        if step % 2:
            param.data = param.data.clone()
    assert torch.equal(param, other)


def test_gradients_of_another_dtype_are_taken():
    """fp32 gradients of bf16 parameters (``grad_dtype``) are not rounded on the way."""
    param = nn.Parameter(torch.zeros(3, dtype=BF16))
    param.grad_dtype = FP32
    opt = Lion([param], betas=(0.0, 0.0), precision=PrecisionPolicy(momentum_dtype=FP32))
    param.grad = torch.tensor([1 + 2**-20, 1.0, -1.0])
    opt.step()
    assert opt.state[param]["exp_avg"][0].item() == 1 + 2**-20


@pytest.mark.parametrize("main_params", ["split", "fp32"])
@pytest.mark.parametrize("use_triton", [True, False])
def test_a_pruning_mask_between_steps_leaves_zeros_that_train_on(main_params, use_triton):
    """Half of the remainders are negative, and a zero minus something in the integers is a NaN."""
    param = param_of(64, dtype=BF16)
    opt = Lion([param], 1e-3, precision=PrecisionPolicy(main_params), use_triton=use_triton)
    for step in range(4):
        param.grad = gradient_like(param, step)
        opt.step()
        with torch.no_grad():
            param.mul_(torch.arange(64) % 2)
    assert param.isfinite().all() and (param[::2] == 0).all()
    param.grad = gradient_like(param, 5)
    opt.step()
    assert (param[::2].abs().float() - 1e-3).abs().max() < 1e-5


def test_fp32_main_params_follow_a_parameter_that_is_given_other_memory():
    """``param.data = ...`` moves no version counter; the main param would bring the old value back."""
    param = nn.Parameter(torch.ones(3, dtype=BF16))
    opt = Lion([param], 2**-10, precision=PrecisionPolicy("fp32"))
    for value in (1.0, 5.0):
        param.data = torch.full((3,), value, dtype=BF16)
        param.grad = torch.ones(3, dtype=BF16)
        opt.step()
        assert (opt.state[param]["main_param"] - value).abs().max() < 2**-6  # the 16 bits below the parameter's stay


def test_fp32_main_params_follow_once_and_only_what_was_changed():
    """Also when other parameters get gradients than in the step before, and when one gets none while it is changed.

    Main params get values of their own before each step. The step, of lr 0, stores them in the parameters, unless they
    follow what was written there first.
    """
    params = [nn.Parameter(torch.zeros(1, dtype=BF16)) for _ in range(3)]
    opt = Lion(params, 0.0, precision=PrecisionPolicy("fp32"))
    values = itertools.count(16)

    def followed_in_a_step(*with_gradient: int) -> list[float]:
        mains = {i: float(next(values)) for i in with_gradient if params[i] in opt.state}
        for i, value in mains.items():
            opt.state[params[i]]["main_param"].fill_(value)
        for i, param in enumerate(params):
            param.grad = torch.ones_like(param) if i in with_gradient else None
        opt.step()
        return [params[i].item() for i, value in mains.items() if params[i].item() != value]

    for with_gradient in ((0, 1, 2), (0, 1, 2), (0, 1), (1, 2), (0,), (0, 1, 2)):
        assert followed_in_a_step(*with_gradient) == []
    with torch.no_grad():
        params[1].fill_(1.0)
    params[2].data = torch.full((1,), 2.0, dtype=BF16)
    assert followed_in_a_step(0) == []
    assert followed_in_a_step(0, 1, 2) == [1.0, 2.0]
    assert followed_in_a_step(0, 1, 2) == []


def test_parameters_of_several_dtypes_in_one_group():
    params = [param_of(5), param_of(5, dtype=BF16), param_of(5, dtype=FP16)]
    opt = Lion(params, 1e-2)
    old = [p.detach().clone() for p in params]
    run(opt, range(2))
    assert [opt.state[p]["exp_avg"].dtype for p in params] == [FP32, BF16, FP32]
    assert all((p != q).any() for p, q in zip(params, old, strict=True))


def test_gradients_that_come_and_go():
    """Which parameters have a gradient changes from step to step; each counts its own steps of momentum."""
    a, b = param_of(30, dtype=BF16), param_of(40, dtype=BF16)
    c, d = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())
    policy = PrecisionPolicy("none", momentum_rounding="stochastic")
    together = Lion([a, b], 1e-3, precision=policy)
    apart = Lion([{"params": [c]}, {"params": [d]}], 1e-3, precision=policy)
    for step in range(12):
        for i, (param, twin) in enumerate(((a, c), (b, d))):
            has = (step + i) % 3 != 0
            param.grad = gradient_like(param, step) if has else None
            twin.grad = None if param.grad is None else param.grad.clone()
        together.step(), apart.step()
    assert torch.equal(a, c) and torch.equal(b, d)
    assert together.state[a]["step"].item() == 8 and together.state[b]["step"].item() == 8


# ---- the Triton kernel


@POLICY
def test_triton_kernel_equals_the_cpu_path(policy):
    opts = [make(policy, (70, 3), (5,), (), (0, 2)) for _ in range(2)]
    opts[0].use_triton, opts[1].use_triton = True, False
    for opt in opts:
        run(opt, range(3))
    assert_equal(*opts)
