"""``param_sync="coded"`` arrives at the bits of ``"gather"`` on every rank, always, by a fraction of the bytes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import lion_dist.checkpoint
from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.coded_sync.shard_codec import ShardCodec
from lion_dist.replica_check import ReplicaError
from lion_dist.sharding import collectives
from lion_dist.sharding.bucket import ParamState
from tests.gloo_workers import RankError
from tests.models import GivenGradients, make_batch, make_model
from tests.oracle import assert_same_on_all_ranks, assert_same_params
from train import Transformer, global_batch, read_corpus

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STEPS = 6


@dataclass(frozen=True)
class Case:
    name: str
    dtype: torch.dtype = BF16
    precision: PrecisionPolicy = field(default_factory=PrecisionPolicy)
    stage: int = 2
    micro_batches: int = 1
    clip: float | None = None
    cautious: bool = False
    cautious_wd: bool = False
    corrected_weight_decay: bool = False
    lr: float = 2e-3
    lr_on_device: bool = False
    weight_decay: float = 0.1
    overlap: bool = True
    bucket_numel: int | None = 300
    skipped_step: int | None = None  # whose gradients are not finite on the last rank
    use_triton: bool | None = None


def policy(main_params: str, momentum: torch.dtype = FP32, rounding: str = "nearest") -> PrecisionPolicy:
    return PrecisionPolicy(main_params=main_params, momentum_dtype=momentum, momentum_rounding=rounding, seed=7)


CASES = [
    Case("split"),
    Case("split-bf16-momentum", precision=policy("split", BF16, "stochastic"), clip=0.3),
    Case("fp32-main", precision=policy("fp32")),
    Case("none", precision=policy("none")),
    Case("none-bf16-momentum", precision=policy("none", BF16, "stochastic"), stage=1, micro_batches=2),
    Case("fp32", dtype=FP32),
    Case("fp32-bf16-momentum", dtype=FP32, precision=policy("auto", BF16, "stochastic")),
    Case("fp16", dtype=FP16),
    Case("stage1-accumulation", stage=1, micro_batches=3, clip=0.3),
    Case("stage2-accumulation", stage=2, micro_batches=3, clip=0.3),
    Case("cautious", cautious=True),
    Case("cautious-none", cautious=True, precision=policy("none")),
    Case("cautious-fp32", cautious=True, dtype=FP32),
    Case("cautious-decay", cautious_wd=True),
    Case("cautious-decay-none", cautious_wd=True, corrected_weight_decay=True, precision=policy("none")),
    Case("both-cautious-fp32", cautious=True, cautious_wd=True, dtype=FP32),
    Case("corrected-decay-lr-on-device", corrected_weight_decay=True, lr_on_device=True),
    Case("lr-on-device", lr_on_device=True),
    Case("lr-on-device-fp32", lr_on_device=True, dtype=FP32),
    Case("lr-1", lr=1.0, weight_decay=0.5),
    Case("lr-1e-7", lr=1e-7, weight_decay=0.0),
    Case("lr-0", lr=0.0),
    Case("heavy-decay", lr=0.1, weight_decay=3.0, precision=policy("none")),
    Case("skipped-step", skipped_step=2),
    Case("skipped-step-none", skipped_step=2, precision=policy("none")),
    Case("skipped-step-fp32", skipped_step=2, dtype=FP32),
    Case("without-module", overlap=False),
    Case("one-bucket", bucket_numel=None),
    Case("bucket-per-parameter", bucket_numel=1, precision=policy("none")),
]


def make_optimizer(model: nn.Module, case: Case, param_sync: str, **settings) -> ShardedLion:
    flat = [p for p in model.parameters() if p.ndim < 2]
    lr = torch.tensor(case.lr) if case.lr_on_device else case.lr
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": case.weight_decay, "lr": lr},
        {"params": flat, "weight_decay": 0.0, "lr": lr / 2, "betas": (0.8, 0.9)},
    ]
    return ShardedLion(
        groups,
        module=model if case.overlap else None,
        sharding=ShardingConfig(zero_stage=case.stage, bucket_numel=case.bucket_numel, param_sync=param_sync),
        precision=case.precision,
        cautious=case.cautious,
        cautious_wd=case.cautious_wd,
        corrected_weight_decay=case.corrected_weight_decay,
        maximize=case.cautious_wd,
        use_triton=case.use_triton,
        **settings,
    )


def train(model: nn.Module, opt: ShardedLion, case: Case, steps=range(STEPS), rank: int | None = None) -> None:
    rank = dist.get_rank() if rank is None else rank
    for step in steps:
        for group, lr in zip(opt.param_groups, (case.lr, case.lr / 2), strict=True):
            lr = lr * (1 - step / (2 * STEPS))
            group["lr"] = torch.tensor(lr) if case.lr_on_device else lr
        for i in range(case.micro_batches):
            batch = make_batch(step, i, rank, detour=(step + rank) % 3 == 0)
            loss = batch.loss(model)
            if step == case.skipped_step and rank == dist.get_world_size() - 1:
                loss = loss * float("nan")
            loss.backward()
        if case.clip is not None:
            opt.clip_grad_norm_(case.clip)
        opt.step()


def compare_strategies(case: Case) -> None:
    plain = make_model(case.dtype)
    coded = copy.deepcopy(plain)
    before = copy.deepcopy(plain)
    plain_opt, coded_opt = (make_optimizer(m, case, s) for m, s in ((plain, "gather"), (coded, "coded")))
    for step in range(STEPS):
        train(plain, plain_opt, case, [step])
        train(coded, coded_opt, case, [step])
        plain_opt.finish_param_sync()
        coded_opt.finish_param_sync()
        assert_same_params(coded, plain)
        assert_same_on_all_ranks(coded)
    assert coded_opt.skipped_steps() == plain_opt.skipped_steps() == (case.skipped_step is not None)
    moved = any(not torch.equal(p, q) for p, q in zip(coded.parameters(), before.parameters(), strict=True))
    assert moved or case.lr == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_codes_arrive_at_the_bits_of_a_gather(gloo, case):
    gloo.run(4 if "none" in case.name else 2, compare_strategies, case)


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=lambda case: case.name)
def test_codes_arrive_on_any_number_of_ranks(gloo, case, world_size):
    gloo.run(world_size, compare_strategies, case)


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [("split", BF16), ("none", BF16), ("auto", FP32), ("auto", FP16)])
def test_codes_of_the_fused_kernels_arrive_at_the_bits_of_a_gather(gloo, name, dtype):
    """Through Triton's interpreter where there is no GPU."""
    case = Case(f"triton-{name}", dtype, policy(name), use_triton=True, bucket_numel=None)
    gloo.run(2, compare_strategies, case)


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [("split", BF16), ("none", BF16), ("auto", FP32)])
def test_so_they_do_with_skipped_steps_clipping_unused_parameters_and_stochastic_momentum(gloo, name, dtype):
    precision = policy(name, BF16, "stochastic")
    case = Case(f"triton-{name}", dtype, precision, use_triton=True, bucket_numel=None, clip=0.3, skipped_step=2)
    gloo.run(2, compare_strategies, case)


@pytest.mark.slow
def test_cautious_steps_are_encoded_after_the_update(gloo):
    gloo.run(2, compare_strategies, Case("triton-cautious", cautious=True, use_triton=True, bucket_numel=None))


def compare_with_a_codec_that_forgets_escapes(case: Case) -> None:
    ShardCodec._restore_escapes, original = (lambda *_: None), ShardCodec._restore_escapes
    try:
        compare_strategies(case)
    finally:
        ShardCodec._restore_escapes = original


def test_matrix_would_notice_an_escape_that_gets_lost(gloo):
    case = Case("a step as large as the weights", lr=0.02, bucket_numel=None)
    gloo.run(2, compare_strategies, case)
    with pytest.raises(RankError, match="differ from the expected"):
        gloo.run(2, compare_with_a_codec_that_forgets_escapes, case)


# ---- what is on the wire


@contextlib.contextmanager
def recorded_messages() -> Iterator[list[torch.Tensor]]:
    """What each rank hands to all-gathers, and to the small message before them."""
    sent, gather, maximum = [], collectives.all_gather, collectives.all_reduce_max

    def all_gather(flat, shard, group):
        sent.append(shard)
        return gather(flat, shard, group)

    def all_reduce_max(tensor, group):
        sent.append(tensor)
        maximum(tensor, group)

    with mock.patch.multiple(collectives, all_gather=all_gather, all_reduce_max=all_reduce_max):
        yield sent


def bytes_of_a_training_run(dtype: torch.dtype, precision: PrecisionPolicy, lr: float) -> list[float]:
    """Bytes per parameter that the ranks hand to collectives in each ``step()``; reductions end before it."""
    torch.manual_seed(0)
    model = Transformer(layers=4, dim=128, heads=4).to(dtype)
    text = read_corpus(None, 64)[0]
    sharding = ShardingConfig(param_sync="coded")
    opt = ShardedLion(model.parameters(), lr=lr, weight_decay=0.1, module=model, sharding=sharding, precision=precision)
    numel, result = sum(p.numel() for p in model.parameters()), []
    for step in range(12):
        windows = global_batch(text, 4, 64, seed=0, step=step)
        # In fp32, rounded to the parameters' dtype: CPUs take four times as long for products of bf16.
        widened = {name: param.float() for name, param in model.named_parameters()}
        torch.func.functional_call(model, widened, windows.chunk(dist.get_world_size())[dist.get_rank()]).backward()
        opt.clip_grad_norm_(1.0)
        with recorded_messages() as sent:
            opt.step()
        result.append(sum(tensor.nbytes for tensor in sent) * dist.get_world_size() / numel)
    return result


@pytest.mark.parametrize(
    "dtype, precision, lr, limit",
    [
        (BF16, policy("split"), 1e-4, 0.40),
        (BF16, policy("fp32"), 1e-4, 0.40),
        (BF16, policy("none"), 1e-3, 0.21),
        (FP32, policy("auto"), 1e-3, 0.21),
    ],
    ids=["split", "fp32-main", "none", "fp32"],
)
def test_bytes_on_the_wire(gloo, dtype, precision, lr, limit):
    for result in gloo.run(2, bytes_of_a_training_run, dtype, precision, lr):
        assert all(0.19 < bytes_per_parameter <= limit for bytes_per_parameter in result), result


def train_where_codes_do_not_fit() -> None:
    """Weights of zero jump by many ulps: the bucket is gathered, the one beside it is not."""
    model = GivenGradients((640,), (640,), dtype=BF16)
    model.weights[0].data.normal_(std=1e-6, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(model)
    opts = []
    for m, param_sync in ((model, "coded"), (expected, "gather")):
        sharding = ShardingConfig(bucket_numel=640, param_sync=param_sync)
        opts.append(ShardedLion(m.parameters(), lr=1e-4, module=m, sharding=sharding))
    grads = [torch.randn(640, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for step in range(3):
        for m in (model, expected):
            # Down to where they came from: from the step's size to a millionth of it.
            m.loss([grads[0] * (-100.0) ** step, grads[1]]).backward()
        with recorded_messages() as sent:
            opts[0].step()
        opts[1].step()
        plain = [tensor.numel() for tensor in sent if tensor.dtype == BF16]
        assert plain == ([320] if step == 1 else [])
        opts[0].finish_param_sync()
        opts[1].finish_param_sync()
        assert_same_params(model, expected)
        assert_same_on_all_ranks(model)


def test_a_bucket_whose_codes_do_not_fit_is_gathered(gloo):
    gloo.run(2, train_where_codes_do_not_fit)


def train_alone() -> None:
    model = make_model(BF16)
    opt = make_optimizer(model, CASES[0], "coded")
    with recorded_messages() as sent:
        train(model, opt, CASES[0])
    assert all(tensor.numel() == 0 or tensor.dtype == BF16 for tensor in sent)


def test_one_rank_makes_no_codes(gloo):
    gloo.run(1, train_alone)


# ---- overlap


def read_parameters_in_flight() -> None:
    model = make_model(BF16)
    opt = make_optimizer(model, CASES[0], "coded")
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, opt, CASES[0], [0])
    buckets = [bucket for bucket in opt.buckets if bucket.names != ["unused.weight"]]
    assert all(bucket.param_state is ParamState.GATHERING for bucket in buckets)
    assert not torch.equal(model.up.weight, before["up.weight"])
    waited = [bucket for bucket in buckets if bucket.param_state is ParamState.FULL]
    assert 0 < len(waited) < len(buckets)
    assert_same_on_all_ranks(model)


def test_a_parameter_is_replayed_when_it_is_first_used(gloo):
    gloo.run(2, read_parameters_in_flight)


# ---- parameters changed from outside


def write_from_outside(how: str, case: Case) -> None:
    """``on one rank``: only rank 0 writes; as after any gather, each owner's values are everybody's then."""
    models = [make_model(case.dtype) for _ in range(2)]
    opts = [make_optimizer(m, case, s) for m, s in zip(models, ("gather", "coded"), strict=True)]
    other = make_model(case.dtype, seed=5)
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, case, range(2))
        opt.finish_param_sync()
        with torch.no_grad():
            if how == "load_state_dict":
                model.load_state_dict(other.state_dict())
            elif how == "in place":
                model.up.weight.mul_(1.5)
            elif how == "in place on one rank" and dist.get_rank() == 0:
                model.up.weight.mul_(1.5)
            elif how == "data":
                model.up.weight.data.mul_(1.5)
                opt.refresh_main_params()
            elif how == "data on one rank":
                if dist.get_rank() == 0:
                    model.up.weight.data.mul_(1.5)
                opt.refresh_main_params()
                opt.resync_params()
        train(model, opt, case, range(2, 5))
        opt.finish_param_sync()
        assert_same_on_all_ranks(model)
    assert_same_params(models[1], models[0])


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3], CASES[5]], ids=lambda case: case.name)
@pytest.mark.parametrize("how", ["load_state_dict", "in place", "in place on one rank", "data", "data on one rank"])
def test_parameters_written_from_outside(gloo, how, case):
    gloo.run(2, write_from_outside, how, case)


def forget_to_resync() -> None:
    model = make_model(BF16)
    opt = make_optimizer(model, CASES[0], "coded")
    train(model, opt, CASES[0], [0])
    opt.finish_param_sync()
    if dist.get_rank() == 0:
        model.up.weight.data.mul_(1.5)
    train(model, opt, CASES[0], [1])
    opt.finish_param_sync()
    with pytest.raises(ReplicaError, match="up.weight"):
        opt.check_replicas()


def test_the_checksum_catches_who_forgot_to_resync(gloo):
    gloo.run(2, forget_to_resync)


# ---- checkpoints


def save_after_two_steps(path: Path, case: Case, param_sync: str) -> None:
    model = make_model(case.dtype)
    opt = make_optimizer(model, case, param_sync)
    train(model, opt, case, range(2), rank=0)
    lion_dist.checkpoint.save(path, model=model, optimizer=opt)


def go_on(path: Path, case: Case) -> None:
    models = [make_model(case.dtype, seed=9) for _ in range(2)]
    for model, param_sync in zip(models, ("gather", "coded"), strict=True):
        opt = make_optimizer(model, case, param_sync)
        train(model, opt, case, [0])
        lion_dist.checkpoint.load(path, model=model, optimizer=opt)
        train(model, opt, case, range(2, 5))
        opt.finish_param_sync()
        assert_same_on_all_ranks(model)
    assert_same_params(models[1], models[0])


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=lambda case: case.name)
def test_training_goes_on_on_other_numbers_of_ranks(gloo, tmp_path, case):
    gloo.run(2, save_after_two_steps, tmp_path / "saved", case, "coded")
    gloo.run(4, go_on, tmp_path / "saved", case)


# ---- which ranks share what


def train_on_a_mesh() -> None:
    """2 x 2 (replicate, shard)."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    models = [make_model(BF16) for _ in range(2)]
    for model, param_sync in zip(models, ("gather", "coded"), strict=True):
        opt = make_optimizer(model, CASES[3], param_sync, process_group=mesh)
        train(model, opt, CASES[3])
        opt.finish_param_sync()
        assert_same_on_all_ranks(model)
    assert_same_params(models[1], models[0])


def test_a_replicate_axis(gloo):
    gloo.run(4, train_on_a_mesh)


def train_experts() -> None:
    """Dense parameters on 4 ranks, an expert on every second rank."""
    rank = dist.get_rank()
    experts = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    models = [GivenGradients((300,), (200,), dtype=BF16) for _ in range(2)]
    for model, param_sync in zip(models, ("gather", "coded"), strict=True):
        model.weights[1].data.add_(rank % 2)
        groups = [{"params": [model.weights[0]]}, {"params": [model.weights[1]], "process_group": experts}]
        opt = ShardedLion(groups, lr=1e-3, sharding=ShardingConfig(param_sync=param_sync))
        generator = torch.Generator().manual_seed(rank)
        for _ in range(3):
            model.loss([torch.randn(n, generator=generator) for n in (300, 200)]).backward()
            opt.step()
    assert_same_params(models[1], models[0])


def test_experts(gloo):
    gloo.run(4, train_experts)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="param_sync must be one of .*'gather', 'coded'.* got 'sparse'"):
        ShardingConfig(param_sync="sparse")
