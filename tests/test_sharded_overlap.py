"""Communication beside computation: who waits for what, and that nobody reads parameters in flight.

While a gather is under way the doubles fill the parameters with NaN, so an early read cannot go unnoticed.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lion_dist import Lion, ShardedLion, ShardingConfig
from tests.collective_doubles import poisoned_gathers, recorded_reductions
from tests.models import make_batch, make_model, mlp
from tests.oracle import assert_same_params

WIDTHS = (8, 8, 8, 8, 8)  # four layers
PER_LAYER = ShardingConfig(bucket_numel=72)


def batch_of(step: int, rank: int, width: int = 8) -> Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(100 * step + rank))


def train_step(model: nn.Module, opt: ShardedLion, step: int) -> float:
    loss = model(batch_of(step, dist.get_rank())).square().mean()
    loss.backward()
    opt.step()
    return loss.item()


# ---- the order of things


def follow_one_forward() -> list:
    model = mlp(*WIDTHS)
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=PER_LAYER)
    events: list = []
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda *_, name=name: events.append(("forward", name)))
    with poisoned_gathers(events):
        train_step(model, opt, 0)
        del events[:]
        opt.step()  # a step without gradients gathers all the same
        events.append(("step returns", None))
        loss = model(batch_of(1, dist.get_rank())).square().mean()
    assert loss.isfinite()
    return [kind if number is None or kind.startswith("gather") else f"{kind} {number}" for kind, number in events]


def test_each_layer_waits_for_its_own_gather_only(gloo):
    layer = ["gather ends", "forward"]
    for events in gloo.run(2, follow_one_forward):
        start = events.index("step returns") - 4
        assert events[start : start + 4] == ["gather starts"] * 4
        assert "gather ends" not in events[start : start + 5], "step() waited for a gather"
        assert [e.split(" 0")[0] for e in events[start + 5 : start + 7]] == layer
        assert events[start + 5 :] == [
            *("gather ends", "forward 0", "gather ends", "forward 2"),
            *("gather ends", "forward 4", "gather ends", "forward 6"),
        ]


def step_without_module() -> list:
    model = mlp(*WIDTHS)
    opt = ShardedLion(model.parameters(), lr=1e-3, sharding=PER_LAYER)
    with poisoned_gathers() as events:
        train_step(model, opt, 0)
        assert all(p.isfinite().all() for p in model.parameters())
    return [kind for kind, _ in events]


def test_without_the_module_parameters_are_complete_when_step_returns(gloo):
    for events in gloo.run(2, step_without_module):
        assert events == ["gather starts"] * 4 + ["gather ends"] * 4


def hold_references(overlap: bool, in_backward: bool) -> list[bool]:
    """As an average of weights or a log of their norms does: a list of parameters, made once, read after each step."""
    model = mlp(*WIDTHS)
    sharding = ShardingConfig(bucket_numel=72, overlap_param_sync=overlap, update_in_backward=in_backward)
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=sharding)
    held = list(model.parameters())
    are_whole = []
    with poisoned_gathers():
        for step in range(3):
            train_step(model, opt, step)
            are_whole.append(all(bool(p.isfinite().all()) for p in held))
    return are_whole


@pytest.mark.parametrize("in_backward", [False, True])
def test_without_overlap_held_references_are_whole_after_every_step(gloo, in_backward):
    for are_whole in gloo.run(2, hold_references, False, in_backward):
        assert are_whole == [True] * 3
    for are_whole in gloo.run(2, hold_references, True, in_backward):
        assert are_whole == [False] * 3, "the double shows nothing"


def trained_params(overlap: bool) -> list[Tensor]:
    model = mlp(*WIDTHS)
    sharding = ShardingConfig(bucket_numel=72, overlap_param_sync=overlap)
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=sharding)
    for step in range(3):
        train_step(model, opt, step)
    return [p.detach().clone() for p in model.parameters()]


def test_overlap_changes_no_bit(gloo):
    with_overlap, without = gloo.run(2, trained_params, True)[0], gloo.run(2, trained_params, False)[0]
    assert all(map(torch.equal, with_overlap, without))


def follow_one_backward(bucket_numel: int) -> list:
    model = mlp(*WIDTHS)
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(bucket_numel=bucket_numel))
    events: list = []
    for name, param in model.named_parameters():
        param.register_hook(lambda _grad, name=name: events.append(("grad", name)))
    with recorded_reductions(events):
        model(batch_of(0, dist.get_rank())).square().mean().backward()
        events.append(("backward ends", ""))
        opt.step()
    return [f"{kind} {what}" if kind == "grad" else kind for kind, what in events]


def test_reductions_start_in_the_middle_of_backward(gloo):
    for events in gloo.run(2, follow_one_backward, 72):
        assert events.count("reduce") == 4
        assert events.index("reduce") < events.index("grad 4.weight") < events.index("grad 0.weight")
        assert "reduce" not in events[events.index("backward ends") :]
        assert events[-2] == "reduce"  # the first layer's, when its gradient is there


# ---- nobody reads parameters in flight


class FunctionalHead(nn.Module):
    """The head's weight is read without a forward of the head's."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(x)), self.head.weight)


class TiedFirstAndLast(nn.Module):
    """One weight, used by its owner at the end and functionally, through another name, at the beginning."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(F.linear(x, self.head.weight.t()))))


class TiedByAssignment(nn.Module):
    """One Parameter in two modules; both are its owners."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.body = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.body(self.first(x))))


class Attention(nn.Module):
    """nn.MultiheadAttention reads its out_proj's weight without calling it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0)
        return self.layer(self.inner(x, x, x, need_weights=False)[0]).squeeze(0)


class ParameterAtRoot(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)


class ListOfParameters(nn.Module):
    """nn.ParameterList has parameters and no forward."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(8), torch.full((8,), 0.5)])
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scales[0]) * self.scales[1]


class Alternating(nn.Module):
    """Which of two layers runs depends on the call; the other's weight is read functionally."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        first, second = (self.a, self.b) if self.calls % 2 else (self.b, self.a)
        return F.linear(torch.tanh(first(x)), second.weight)


class LinearWithAList(nn.Linear):
    """Reads its parameters from a list of its own: nothing but the hook before its forward can wait for them."""

    def __init__(self):
        super().__init__(8, 8)
        self.held = [self.weight, self.bias]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.held)


class ReadsFromLists(nn.Sequential):
    def __init__(self):
        super().__init__(LinearWithAList(), nn.Tanh(), LinearWithAList())


MODELS = [
    FunctionalHead,
    TiedByAssignment,
    Attention,
    ParameterAtRoot,
    ListOfParameters,
    TiedFirstAndLast,
    Alternating,
    ReadsFromLists,
]


def train_with_poison(make: type[nn.Module], bucket_numel: int) -> None:
    """The same as without overlap, and never a NaN."""
    torch.manual_seed(0)
    model = make()
    expected = copy.deepcopy(model)
    sharding = ShardingConfig(bucket_numel=bucket_numel)
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=sharding)
    plain = ShardedLion(expected.parameters(), lr=1e-3, sharding=sharding)
    with poisoned_gathers():
        losses = [(train_step(model, opt, step), train_step(expected, plain, step)) for step in range(4)]
        opt.finish_param_sync()
    for mine, theirs in losses:
        assert mine == theirs
    assert_same_params(model, expected)


@pytest.mark.parametrize("bucket_numel", [1, 100])
@pytest.mark.parametrize("make", MODELS)
def test_no_parameter_is_read_in_flight_by_a_training_forward(gloo, make, bucket_numel):
    gloo.run(2, train_with_poison, make, bucket_numel)


def read_right_after_step(read: str) -> None:
    """``read`` of the model directly after step() gives what it gives when everything has arrived."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "attention": Attention()})
    model.forward = lambda x: model["attention"](model["a"](x))
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=ShardingConfig(bucket_numel=1))
    x = batch_of(9, 0)
    reads = {
        "sub-module": lambda: model["a"](x),
        "encoder layer in its fast path": lambda: torch.no_grad()(model["attention"].layer.eval())(x.unsqueeze(0)),
        "layer": lambda: model["a"][1](x),
        "attention as a sub-module": lambda: model["attention"](x),
        "MultiheadAttention as a sub-module": lambda: model["attention"].inner(x, x, x)[0],
        "evaluation": lambda: torch.no_grad()(model)(x),
        "evaluation mode": lambda: model.eval()(x),
        "state_dict": lambda: torch.cat([v.flatten() for v in model.state_dict().values()]),
        "state_dict of a sub-module": lambda: torch.cat([v.flatten() for v in model["a"].state_dict().values()]),
        "deepcopy": lambda: copy.deepcopy(model["a"])(x),
        "attribute": lambda: model["a"][1].weight,
        "parameters()": lambda: torch.cat([p.flatten() for p in model.parameters()]),
        "get_parameter": lambda: model.get_parameter("attention.inner.out_proj.weight"),
        "state_dict of the optimizer, then the model": lambda: [opt.state_dict(), model(x)][1],
    }
    with poisoned_gathers():
        for step in range(3):  # from the second forward on the root does not wait for everything
            model(batch_of(step, dist.get_rank())).square().mean().backward()
            opt.step()
        early = reads[read]().detach().clone()
        opt.finish_param_sync()
        late = reads[read]().detach().clone()
    assert early.isfinite().all()
    assert torch.equal(early, late)


@pytest.mark.parametrize(
    "read",
    [
        "sub-module",
        "layer",
        "attention as a sub-module",
        "MultiheadAttention as a sub-module",
        "encoder layer in its fast path",
        "evaluation",
        "evaluation mode",
        "state_dict",
        "state_dict of a sub-module",
        "deepcopy",
        "attribute",
        "parameters()",
        "get_parameter",
        "state_dict of the optimizer, then the model",
    ],
)
def test_read_right_after_step_is_complete(gloo, read):
    gloo.run(2, read_right_after_step, read)


def train_parameters_that_are_not_the_modules(when: str) -> None:
    """A loss with weights of its own beside the module: no forward of the module's waits for them."""
    torch.manual_seed(0)
    model, head = mlp(8, 8, 8), nn.Linear(8, 1)
    late = when == "added in the middle of the run"
    opt = ShardedLion(
        [*model.parameters()] if late else [*model.parameters(), *head.parameters()],
        lr=1e-3,
        module=model,
        sharding=PER_LAYER,
    )
    losses = []
    with poisoned_gathers():
        for step in range(4):
            loss = head(model(batch_of(step, dist.get_rank()))).square().mean()
            loss.backward()
            losses.append(loss)
            opt.step()
            assert all(p.isfinite().all() for p in head.parameters())
            if late and step == 0:
                head.zero_grad()
                opt.add_param_group({"params": list(head.parameters())})
    assert all(loss.isfinite() for loss in losses)
    assert opt.skipped_steps() == 0


@pytest.mark.parametrize("when", ["from the beginning", "added in the middle of the run"])
def test_parameters_outside_the_module_are_complete_when_step_returns(gloo, when):
    gloo.run(2, train_parameters_that_are_not_the_modules, when)


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x) if hasattr(self, "head") else x


def add_a_layer_in_the_middle() -> None:
    """A layer that the module got after construction has no hook: the root waits for it."""
    torch.manual_seed(0)
    model = Growing()
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model)
    with poisoned_gathers():
        train_step(model, opt, 0)
        model.head = nn.Linear(8, 8)
        opt.add_param_group({"params": list(model.head.parameters())})
        losses = [train_step(model, opt, step) for step in range(1, 5)]
    assert all(loss == loss for loss in losses) and opt.skipped_steps() == 0


def test_layer_that_the_module_gets_later(gloo):
    gloo.run(2, add_a_layer_in_the_middle)


def load_right_after_step() -> None:
    """What load_state_dict writes is not overwritten by a gather that comes in later."""
    model = mlp(*WIDTHS)
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=PER_LAYER)
    wanted = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    with poisoned_gathers():
        for step in range(2):
            train_step(model, opt, step)
        model.load_state_dict(wanted)
        opt.finish_param_sync()
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name])


def test_load_state_dict_right_after_step_holds(gloo):
    gloo.run(2, load_right_after_step)


def step_twice_without_a_forward() -> None:
    model, expected = mlp(*WIDTHS), mlp(*WIDTHS)
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=PER_LAYER)
    plain = ShardedLion(expected.parameters(), lr=1e-3, sharding=PER_LAYER)
    with poisoned_gathers():
        for m, o in ((model, opt), (expected, plain)):
            train_step(m, o, 0)
            o.step()
            o.step()
            train_step(m, o, 1)
            o.finish_param_sync()
    assert_same_params(model, expected)


def test_steps_without_a_forward_between_them(gloo):
    gloo.run(2, step_twice_without_a_forward)


def run_forward_with_an_exception() -> None:
    """A forward that breaks off leaves gathers behind; the next one waits for them."""
    model = mlp(*WIDTHS)
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=PER_LAYER)
    with poisoned_gathers():
        for step in range(2):
            train_step(model, opt, step)
        with pytest.raises(RuntimeError):
            model(torch.ones(3, 9))  # of the wrong width: the first layer raises
        assert model(batch_of(3, 0)).isfinite().all()
        assert all(p.isfinite().all() for p in model.parameters())


def test_forward_that_raises_leaves_nothing_unfinished(gloo):
    gloo.run(2, run_forward_with_an_exception)


# ---- copies


def copy_the_model(how: str) -> None:
    """A copy (EMA) has the weights, none of our hooks' effects, and no ties to the original's buckets."""
    model = make_model()
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model)
    rank = dist.get_rank()
    make_batch(0, 0, rank).loss(model).backward()
    opt.step()
    opt.finish_param_sync()
    if how == "deepcopy":
        ema = copy.deepcopy(model)
    elif how == "AveragedModel":
        ema = torch.optim.swa_utils.AveragedModel(model).module
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        ema = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert_same_params(ema, model)
    kept = {name: p.detach().clone() for name, p in ema.named_parameters()}
    make_batch(1, 0, rank).loss(model).backward()
    opt.step()
    with poisoned_gathers() as events:
        make_batch(2, 0, 0).loss(ema).backward()  # a training pass of the copy reduces nothing and waits for nothing
        assert not events
    opt.finish_param_sync()
    assert ema.up.weight.grad is not None and model.up.weight.grad is None
    for name, param in ema.named_parameters():
        assert torch.equal(param, kept[name]), f"training the original changed {name} of the copy"
    Lion(ema.parameters()).step()


@pytest.mark.parametrize("how", ["deepcopy", "AveragedModel", "torch.save"])
def test_copy_of_the_model_is_on_its_own(gloo, how):
    gloo.run(2, copy_the_model, how)
