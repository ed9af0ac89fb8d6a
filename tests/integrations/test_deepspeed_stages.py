"""ZeRO stages 0 to 3 on two gloo ranks: the weights and momenta of plain ``Lion``, by the bit."""

import pytest
import torch
import torch.distributed as dist

from lion_dist import Lion, PrecisionPolicy
from tests.integrations.deepspeed_ranks import (
    BF16,
    FROZEN,
    Slots,
    Words,
    assert_same,
    drift,
    ds_config,
    full_tensors,
    lion_alone,
    make_engine,
    states_of,
    take_exact_step,
    words,
)

pytest.importorskip("deepspeed")

ENGINES = [  # stage, precision, the class that wraps the optimizer
    (0, "fp32", "DeepSpeedLion"),
    (0, "bf16", "FP16_UnfusedOptimizer"),
    (1, "fp32", "DeepSpeedZeroOptimizer"),
    (1, "bf16", "DeepSpeedZeroOptimizer"),
    (1, "bf16_acc", "BF16_Optimizer"),
    (2, "bf16", "DeepSpeedZeroOptimizer"),
    (2, "bf16_acc", "DeepSpeedZeroOptimizer"),
    (3, "fp32", "DeepSpeedZeroOptimizer_Stage3"),
    (3, "bf16", "DeepSpeedZeroOptimizer_Stage3"),
]
engines = pytest.mark.parametrize(("stage", "precision", "wrapper"), ENGINES, ids=lambda value: str(value))
STEPS, MICRO_BATCHES = 4, 2


def train_on_exact_gradients(stage: int, precision: str, params: dict):
    engine = make_engine(Slots(), ds_config(stage, precision, params, gradient_accumulation_steps=MICRO_BATCHES))
    for step in range(STEPS):
        take_exact_step(engine, step)
    return type(engine.optimizer).__name__, full_tensors(engine), states_of(engine)


@engines
def test_accumulated_steps_equal_those_of_lion(gloo, stage, precision, wrapper):
    """Two param groups, one frozen and one unused parameter, two micro-batches a step."""
    dtype = torch.float32 if precision == "fp32" else BF16
    zero_steps = int(wrapper == "FP16_UnfusedOptimizer")
    expected = lion_alone(STEPS, MICRO_BATCHES, ranks=2, dtype=dtype, zero_steps=zero_steps)
    start = Slots()
    for name, found, states in gloo.run(2, train_on_exact_gradients, stage, precision, {}):
        assert name == wrapper
        if stage == 0:  # its state is by parameter, in the order of the groups
            found.pop("exp_avg")
        assert_same(found, expected)
        assert torch.equal(found["params"][FROZEN], start.slots[FROZEN].weight.to(dtype))
        assert all(state.keys() == {"exp_avg"} and state["exp_avg"][0] == BF16 for state in states)
        numel = sum(p.numel() for p in start.parameters() if p.requires_grad)
        padding = 16  # elements by which two groups may be rounded up on a rank
        own = numel if stage == 0 else numel / 2
        assert own <= sum(state["exp_avg"][1] for state in states) <= own + padding
        assert all(state["exp_avg"][2] == 2 * state["exp_avg"][1] for state in states)


def compare_each_step_with_lion(stage: int, precision: str, params: dict):
    """Trains ``Words`` with clipping. At each step of the inner optimizer a plain ``Lion`` with the same settings gets
    copies of this rank's partitions and of the gradients that DeepSpeed reduced and clipped for them."""
    config = ds_config(stage, precision, params, gradient_clipping=0.5, gradient_accumulation_steps=MICRO_BATCHES)
    engine = make_engine(Words(), config)
    inner = engine.basic_optimizer
    seed = {"seed": params["seed"]} if "seed" in params else {}
    policy = PrecisionPolicy(momentum_dtype=BF16, momentum_rounding=params.get("momentum_rounding", "nearest"), **seed)
    twins: dict[int, tuple[torch.Tensor, Lion]] = {}
    squares, differing = torch.zeros(1, dtype=torch.float64), 0

    def before(*_):
        for param in [p for group in inner.param_groups for p in group["params"] if p.grad is not None]:
            if id(param) not in twins:
                twin = param.detach().clone()
                twins[id(param)] = twin, Lion([twin], lr=2**-8, weight_decay=0.5, precision=policy)
            twins[id(param)][0].grad = param.grad.detach().clone()
            squares.add_(param.grad.double().pow(2).sum())

    def after(*_):
        nonlocal differing
        for param in [p for group in inner.param_groups for p in group["params"] if p.grad is not None]:
            twin, lion = twins[id(param)]
            lion.step()
            state, twin_state = inner.state[param], lion.state[twin]
            differing += (twin != param).sum().item() + (state["exp_avg"] != twin_state["exp_avg"]).sum().item()

    inner.register_step_pre_hook(before)
    inner.register_step_post_hook(after)
    losses, norms = [], []
    for step in range(12):
        squares.zero_()
        for micro_batch in range(MICRO_BATCHES):
            loss = engine(words(2 * step + micro_batch, dist.get_rank()))
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
        if stage > 0:
            dist.all_reduce(squares)
        norms.append(squares.sqrt().item())
    return losses, norms, differing, len(twins)


STOCHASTIC = [engine for engine in ENGINES if engine[0] > 0 and engine[1] != "fp32"]


@pytest.mark.parametrize(
    ("stage", "precision", "wrapper", "rounding"),
    [(*engine, "nearest") for engine in ENGINES] + [(*engine, "stochastic") for engine in STOCHASTIC],
    ids=lambda value: str(value),
)
def test_clipped_steps_equal_lion_fed_the_reduced_gradients(gloo, stage, precision, wrapper, rounding):
    params = {"weight_decay": 0.5, "momentum_rounding": rounding, "seed": 5}
    for losses, norms, differing, partitions in gloo.run(2, compare_each_step_with_lion, stage, precision, params):
        assert differing == 0 and partitions > 0
        assert losses[-1] < losses[0] - 0.3
        assert max(norms) <= 0.5 * (1 + 2**-7), "the gradients that reach the optimizer are clipped"
        assert norms[0] == pytest.approx(0.5, rel=2**-7)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16_acc"), (2, "bf16"), (3, "bf16")])
def test_zero_gradients_move_nothing(gloo, stage, precision):
    """DeepSpeed's FusedLion takes a step of +lr where the gradient is zero, and DeepSpeedCPULion one of -lr."""
    config = ds_config(stage, precision, {"lr": 0.01})
    for moved, untouched_moved, touched_moved in gloo.run(2, drift, config):
        assert moved == 0.0, "ten steps of zero gradients"
        assert untouched_moved == 0.0, "embedding rows that no batch touches"
        assert touched_moved > 0.01


def decay_of_momentum(stage: int):
    engine = make_engine(Slots(frozen=None), ds_config(stage, params={"lr": 1e-4}))
    ones = [torch.ones_like(slot.weight) for slot in Slots().slots]
    largest = []
    for scale in [1.0] + [0.0] * 400:
        engine.backward(engine(ones) * scale)
        engine.step()
        largest.append(max(state["exp_avg"].abs().max().item() for state in engine.basic_optimizer.state.values()))
    return largest[0], largest[-1]


def test_bf16_momentum_decays(gloo):
    """With DeepSpeed's default beta2 of 0.999, rounded to nearest, it would stay for ever: hence the default here."""
    for first, last in gloo.run(2, decay_of_momentum, 2):
        assert first == pytest.approx(0.01, rel=2**-7) and last < first / 10
