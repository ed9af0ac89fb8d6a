"""``Lion.metrics()``: on one process, and over the shards of FSDP2, HSDP and tensor parallel."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lion_dist import Lion, PrecisionPolicy
from lion_dist.metrics import phase_clock
from tests.metrics.metrics_oracle import NORMS, SHARES, MeasuredLion, assert_same_metrics
from tests.models import mlp

BF16, FP32 = torch.bfloat16, torch.float32
SETTINGS = dict(lr=2e-3, weight_decay=0.1)
WIDTHS = (8, 5, 8, 3)  # rows that two ranks do not share evenly, and that leave the third of three without any
UNROUNDED = ("update_norm", "update_ratio")  # of the step before it is rounded stochastically
KEYS = {"step", *NORMS, *SHARES, "skipped_steps", "ms_by_phase", "bytes_by_phase", "rank_ms", "slowest_rank"}


def backward(model: nn.Module, step: int) -> None:
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, model[0].in_features, generator=torch.Generator().manual_seed(step)).to(dtype)
    model(x).float().square().mean().backward()


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_metrics_are_those_of_the_step_that_was_taken(dtype, cautious):
    model = mlp(*WIDTHS).to(dtype)
    expected = copy.deepcopy(model)
    opt = Lion(model.parameters(), metrics_every=1, cautious=cautious, **SETTINGS)
    oracle = MeasuredLion(expected.parameters(), cautious=cautious, **SETTINGS)
    for step in range(4):
        for m, o in ((model, opt), (expected, oracle)):
            o.zero_grad()
            backward(m, step)
            o.step()
        result = opt.metrics()
        assert result.keys() == KEYS and result["step"] == step + 1
        assert_same_metrics(result, oracle.expected)
    assert 0 < result["flipped_share"] < result["agreement_share"] < 1


def test_only_every_kth_step_is_measured_and_the_last_one_is_told():
    model = mlp(4, 4)
    opt = Lion(model.parameters(), metrics_every=3)
    seen = []
    for step in range(7):
        backward(model, step)
        opt.step()
        seen.append(opt.metrics()["step"])
    assert seen == [0, 0, 3, 3, 3, 6, 6]


def test_before_the_first_measured_step_there_is_nothing_to_tell():
    model = mlp(4, 4)
    opt = Lion(model.parameters(), metrics_every=2)
    result = opt.metrics()
    assert result.keys() == KEYS and result["step"] == 0 and result["skipped_steps"] == 0
    assert all(math.isnan(result[name]) for name in (*NORMS, *SHARES))


def test_metrics_of_an_optimizer_that_does_not_measure_are_refused():
    with pytest.raises(RuntimeError, match="metrics_every=K"):
        Lion(mlp(4, 4).parameters()).metrics()


def test_a_first_group_without_parameters_is_no_obstacle():
    param = nn.Parameter(torch.ones(3))
    opt = Lion([{"params": []}, {"params": [param]}], metrics_every=1)
    param.grad = torch.ones(3)
    opt.step()
    assert opt.metrics()["grad_norm"] == pytest.approx(3**0.5)


@pytest.mark.parametrize("every", [-1, 1.5, True])
def test_an_interval_that_is_no_number_of_steps_is_refused(every):
    with pytest.raises(ValueError, match="metrics_every must be a whole number of steps"):
        Lion(mlp(4, 4).parameters(), metrics_every=every)


def test_a_skipped_step_is_counted_and_leaves_the_last_metrics():
    model = mlp(4, 4)
    opt = Lion(model.parameters(), metrics_every=1)
    backward(model, 0)
    opt.step()
    first = opt.metrics()
    opt.found_inf = torch.tensor(1.0)  # as GradScaler says it
    backward(model, 1)
    opt.step()
    second = opt.metrics()
    assert second["skipped_steps"] == 1
    assert {key: second[key] for key in ("step", *NORMS, *SHARES)} == {
        key: first[key] for key in ("step", *NORMS, *SHARES)
    }
    opt.found_inf = torch.tensor(0.0)
    backward(model, 2)
    opt.step()
    assert opt.metrics()["step"] == 3 and opt.metrics()["skipped_steps"] == 1


def test_a_parameter_without_a_gradient_is_not_counted():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((100,), 1e6))
    opt = Lion([used, unused], metrics_every=1)
    used.grad = torch.ones(3)
    opt.step()
    result = opt.metrics()
    assert result["param_norm"] == math.sqrt(3) and result["agreement_share"] == 1.0
    used.grad, unused.grad = None, torch.ones(100)
    opt.step()
    assert opt.metrics()["param_norm"] == 1e7


def test_groups_with_their_own_settings_and_dtypes_are_added_up():
    params = [nn.Parameter(torch.full((4,), 3.0)), nn.Parameter(torch.full((9,), 4.0, dtype=BF16))]
    groups = [{"params": params[:1], "lr": 1e-2}, {"params": params[1:], "lr": 0.0}]
    opt = Lion(groups, metrics_every=1)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    result = opt.metrics()
    assert result["param_norm"] == math.sqrt(4 * 9 + 9 * 16) and result["lost_share"] == 9 / 13
    assert result["update_norm"] == pytest.approx(2e-2, rel=1e-4)


class CountWaits(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaler", [False, True])
def test_measuring_reads_nothing_on_the_host(scaler):
    counts = []
    for every in (0, 1):
        model = mlp(*WIDTHS)
        opt = Lion(model.parameters(), metrics_every=every, **SETTINGS)
        backward(model, 0)
        if scaler:
            opt.found_inf, opt.grad_scale = torch.tensor(0.0), torch.tensor(2.0)
        with CountWaits() as waits:
            opt.step()
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_times_are_those_of_the_step_and_what_lies_before_it(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(phase_clock.time, "perf_counter", lambda: float(next(clock)))
    model = mlp(4, 4)
    opt = Lion(model.parameters(), metrics_every=1)
    for step in range(2):
        backward(model, step)
        opt.step()
    # Marks a second apart: step 1 ends, update, measure, update, elsewhere, step 2 ends.
    assert opt.metrics()["ms_by_phase"] == {"update": 2000.0, "measure": 1000.0, "elsewhere": 2000.0}


def test_copies_and_pickles_measure_too():
    model = mlp(4, 4)
    opt = Lion(model.parameters(), metrics_every=1)
    backward(model, 0)
    opt.step()
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        for param in twin.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        twin.step()
        assert twin.metrics()["step"] == 1
    opt.load_state_dict(opt.state_dict())
    assert opt.metrics()["step"] == 1


# ---- over shards


def measure_fully_sharded(dtype: torch.dtype, policy: PrecisionPolicy, widths: tuple, mesh_shape: tuple | None) -> None:
    """Every rank has the same batch: the averaged gradient is exactly the full one."""
    model = mlp(*widths).to(dtype)
    expected = copy.deepcopy(model)
    mesh = None
    if mesh_shape is not None:
        mesh = dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    opt = Lion(model.parameters(), precision=policy, metrics_every=1, **SETTINGS)
    oracle = MeasuredLion(expected.parameters(), precision=policy, **SETTINGS)
    for step in range(3):
        for m, o in ((model, opt), (expected, oracle)):
            o.zero_grad()
            backward(m, step)
            o.step()
        result = opt.metrics()
        assert_same_metrics(result, oracle.expected, but=UNROUNDED if policy.main_params == "none" else ())
        everybody: list = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, {key: result[key] for key in (*NORMS, *SHARES)})
        assert all(theirs == everybody[0] for theirs in everybody)


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [(FP32, PrecisionPolicy()), (BF16, PrecisionPolicy("split")), (BF16, PrecisionPolicy("none", seed=5))],
    ids=["fp32", "split", "none"],
)
def test_fsdp2_on_two_ranks(gloo, dtype, policy):
    gloo.run(2, measure_fully_sharded, dtype, policy, WIDTHS, None)


def test_fsdp2_with_ranks_that_own_nothing_of_a_parameter(gloo):
    gloo.run(4, measure_fully_sharded, FP32, PrecisionPolicy(), (4, 2, 4, 1), None)


def test_replicas_of_a_shard_are_counted_once(gloo):
    gloo.run(4, measure_fully_sharded, FP32, PrecisionPolicy(), WIDTHS, (2, 2))


def measure_placements() -> None:
    """Tensor parallel: parameters cut along either dim beside replicated and plain ones."""
    mesh = dist.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    values = [torch.randn(6, 4), torch.randn(3, 5), torch.randn(5), torch.randn(7)]
    placements = [[Shard(0)], [Shard(1)], [Replicate()], None]
    cut = [v.clone() if p is None else distribute_tensor(v, mesh, p) for v, p in zip(values, placements, strict=True)]
    params, whole = [nn.Parameter(t) for t in cut], [nn.Parameter(v.clone()) for v in values]
    opt, oracle = Lion(params, metrics_every=1, **SETTINGS), MeasuredLion(whole, **SETTINGS)
    for _ in range(3):
        for param, theirs, place in zip(params, whole, placements, strict=True):
            theirs.grad = torch.randn(theirs.shape)
            param.grad = theirs.grad.clone() if place is None else distribute_tensor(theirs.grad, mesh, place)
        opt.step(), oracle.step()
        assert_same_metrics(opt.metrics(), oracle.expected)


def test_tensor_parallel_beside_replicated_and_plain_parameters(gloo):
    gloo.run(2, measure_placements)


def measure_flat_partitions() -> dict:
    """As FSDP1 and DeepSpeed do: each rank's optimizer sees a plain tensor that is a part of something."""
    values = torch.arange(1.0, 11.0).split(5)[dist.get_rank()]
    param = nn.Parameter(values.clone())
    opt = Lion([param], metrics_every=1)
    param.grad = torch.ones(5)
    opt.step()
    mine, all_ranks = opt.metrics(), opt.metrics(process_group=dist.group.WORLD)
    assert mine["param_norm"] == values.double().norm().item()
    return all_ranks


def test_parts_that_look_like_plain_tensors_are_summed_over_the_group_that_one_names(gloo):
    for result in gloo.run(2, measure_flat_partitions):
        assert result["param_norm"] == math.sqrt(sum(i * i for i in range(1, 11)))
        assert result["grad_norm"] == math.sqrt(10)


def measure_fsdp1(use_orig_params: bool) -> None:
    """A flat parameter is padded to what the ranks share evenly; 6 * 4 + 4 elements are even."""
    model = mlp(6, 4)
    expected = copy.deepcopy(model)
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    opt = Lion(model.parameters(), metrics_every=1, **SETTINGS)
    oracle = MeasuredLion(expected.parameters(), **SETTINGS)
    for step in range(3):
        for m, o in ((model, opt), (expected, oracle)):
            o.zero_grad()
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            m(x).square().mean().backward()
            o.step()
        assert_same_metrics(opt.metrics(process_group=dist.group.WORLD), oracle.expected)


@pytest.mark.filterwarnings("ignore:.*FSDP.*:FutureWarning")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1(gloo, use_orig_params):
    gloo.run(2, measure_fsdp1, use_orig_params)
