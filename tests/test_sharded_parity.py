"""N ranks arrive at the bits that one process does. The matrix is data: a new case is one line."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from tests.models import GivenGradients, make_batch, make_model
from tests.oracle import Oracle, assert_same_on_all_ranks, assert_same_params, assert_same_state

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STEPS = 4


@dataclass(frozen=True)
class Case:
    name: str
    stage: int = 2
    micro_batches: int = 1
    no_sync: bool = False
    clip: float | None = None
    param_groups: bool = False
    overlap: bool = True  # the optimizer is given the module
    dtype: torch.dtype = FP32
    reduce_dtype: torch.dtype | None = None
    bucket_numel: int | None = 300  # several buckets
    detour: str = "never"  # which batches use the detour: "never", "rank 0", "sometimes"
    decoupled: bool = False
    use_triton: bool | None = None  # through the interpreter where there is no GPU
    precision: PrecisionPolicy = field(default_factory=PrecisionPolicy)

    def takes_detour(self, step: int, micro_batch: int, rank: int) -> bool:
        chosen = {"never": False, "rank 0": rank == 0, "sometimes": (step + micro_batch + rank) % 3 == 0}
        return chosen[self.detour]


def precision(main_params: str, momentum: torch.dtype, rounding: str = "nearest") -> PrecisionPolicy:
    return PrecisionPolicy(main_params=main_params, momentum_dtype=momentum, momentum_rounding=rounding, seed=7)


CASES = [
    *[
        Case(
            f"stage{stage}-{micro_batches}x{'-no_sync' * no_sync}{'-clip' * bool(clip)}",
            stage,
            micro_batches,
            no_sync,
            clip,
        )
        for stage in (1, 2)
        for micro_batches, no_sync in ((1, False), (3, False), (3, True))
        for clip in (None, 0.3)
    ],
    *[
        Case(f"stage{stage}-{name}", stage, 2, True, 0.3, dtype=dtype, precision=policy)
        for stage in (1, 2)
        for name, dtype, policy in (
            ("bf16-auto", BF16, PrecisionPolicy()),
            ("bf16-split-momentum32", BF16, precision("split", FP32)),
            ("bf16-fp32-momentum16", BF16, precision("fp32", BF16)),
            ("bf16-none-stochastic", BF16, precision("none", BF16, "stochastic")),
            ("bf16-none-momentum32", BF16, precision("none", FP32)),
            ("fp32-momentum16-stochastic", FP32, precision("auto", BF16, "stochastic")),
            ("fp16-auto", FP16, PrecisionPolicy()),
        )
    ],
    Case("groups", param_groups=True, clip=0.3, micro_batches=2),
    Case("groups-stage1", 1, 2, True, param_groups=True),
    Case("groups-stochastic", param_groups=True, dtype=BF16, precision=precision("none", BF16, "stochastic")),
    Case("decoupled", param_groups=True, decoupled=True),
    Case("detour-on-rank-0", detour="rank 0", clip=0.3),
    Case("detour-on-rank-0-stage1", 1, 2, True, detour="rank 0"),
    Case("detour-sometimes", detour="sometimes", micro_batches=2, clip=0.3),
    Case("detour-sometimes-stage1", 1, 2, True, detour="sometimes"),
    Case("without-module", overlap=False, micro_batches=2),
    Case("one-bucket", bucket_numel=None),
    Case("bucket-per-parameter", bucket_numel=1, clip=0.3),
    Case("bucket-per-parameter-without-module", bucket_numel=1, overlap=False),
    Case("wire-fp32", dtype=BF16, reduce_dtype=FP32, micro_batches=2),
    Case("triton", use_triton=True, clip=0.3, detour="sometimes"),
    Case("triton-stochastic", use_triton=True, dtype=BF16, precision=precision("none", BF16, "stochastic")),
    Case("wire-bf16", reduce_dtype=BF16, micro_batches=2, clip=0.3),
]


def param_groups_of(model: nn.Module, case: Case) -> list[dict]:
    if not case.param_groups:
        return [{"params": list(model.parameters())}]
    flat = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.3},
        {"params": flat, "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.9)},
    ]


def train_beside_the_oracle(case: Case) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = make_model(case.dtype)
    expected = copy.deepcopy(model)
    settings = dict(lr=2e-3, weight_decay=0.1, decoupled_weight_decay=case.decoupled, precision=case.precision)
    sharding = ShardingConfig(zero_stage=case.stage, bucket_numel=case.bucket_numel, reduce_dtype=case.reduce_dtype)
    opt = ShardedLion(
        param_groups_of(model, case),
        module=model if case.overlap else None,
        sharding=sharding,
        use_triton=case.use_triton,
        **settings,
    )
    lion = Lion(param_groups_of(expected, case), **settings)
    oracle = Oracle(expected, lion, world_size, case.reduce_dtype)

    for step in range(STEPS):
        for i in range(case.micro_batches):
            batches = [make_batch(step, i, r, case.takes_detour(step, i, r)) for r in range(world_size)]
            without_sync = case.no_sync and i < case.micro_batches - 1
            with opt.no_sync() if without_sync else contextlib.nullcontext():
                batches[rank].loss(model).backward()
            oracle.backward([batch.loss for batch in batches], reduce=case.stage == 2 or not without_sync)
        norm = opt.grad_norm() if case.clip is None else opt.clip_grad_norm_(case.clip)
        assert all(p.grad is None for p in model.parameters())
        opt.step()
        expected_norm = oracle.step(clip=case.clip)
        assert torch.equal(norm, expected_norm), f"step {step}: norm {norm.item()!r}, not {expected_norm.item()!r}"

    opt.finish_param_sync()
    assert_same_params(model, expected)
    assert_same_state(opt, model, lion, expected)
    assert_same_on_all_ranks(model)
    assert opt.taken_steps() == STEPS and opt.skipped_steps() == 0


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_arrive_at_the_bits_of_a_single_process(gloo, case, world_size):
    gloo.run(world_size, train_beside_the_oracle, case)


@pytest.mark.parametrize("case", [CASES[1], CASES[9]], ids=lambda case: case.name)
def test_three_ranks_share_what_three_does_not_divide(gloo, case):
    gloo.run(3, train_beside_the_oracle, case)


def test_matrix_would_notice_one_rank_too_few(gloo):
    """The matrix can fail: an oracle that forgets the last rank's gradients does not agree."""
    with pytest.raises(AssertionError, match="differ from the expected"):
        gloo.run(2, train_beside_an_oracle_that_forgets_a_rank)


def train_beside_an_oracle_that_forgets_a_rank() -> None:
    model = make_model()
    expected = copy.deepcopy(model)
    opt = ShardedLion(model.parameters(), lr=2e-3, module=model)
    oracle = Oracle(expected, Lion(expected.parameters(), lr=2e-3), world_size=1)
    make_batch(0, 0, dist.get_rank()).loss(model).backward()
    oracle.backward([make_batch(0, 0, 0).loss])
    opt.step()
    oracle.step()
    opt.finish_param_sync()
    assert_same_params(model, expected)


# ---- stochastic rounding does not depend on the number of ranks


SHAPES = ((33, 7), (5,), (), (130,))


def train_on_given_sums(stage: int) -> list[torch.Tensor]:
    """Every rank's gradient is 1/N of the same bf16 sum: exact for 1, 2 and 4 ranks."""
    model = GivenGradients(*SHAPES, dtype=BF16)
    policy = PrecisionPolicy(main_params="none", momentum_rounding="stochastic", seed=3)
    sharding = ShardingConfig(zero_stage=stage, bucket_numel=64, average=False)
    opt = ShardedLion(model.parameters(), lr=1e-3, weight_decay=0.1, precision=policy, sharding=sharding)
    for grads in given_sums():
        model.loss([grad / dist.get_world_size() for grad in grads]).backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


def given_sums() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES] for _ in range(5)]


@pytest.mark.parametrize("stage", [1, 2])
def test_stochastic_rounding_draws_the_same_bits_on_any_number_of_ranks(gloo, stage):
    model = GivenGradients(*SHAPES, dtype=BF16)
    before = [p.detach().clone() for p in model.parameters()]
    policy = PrecisionPolicy(main_params="none", momentum_rounding="stochastic", seed=3)
    lion = Lion(model.parameters(), lr=1e-3, weight_decay=0.1, precision=policy)
    for grads in given_sums():
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = grad
        lion.step()
    assert not torch.equal(model.weights[0], before[0])
    for world_size in (1, 2, 4):
        for params in gloo.run(world_size, train_on_given_sums, stage):
            for mine, alone in zip(params, model.parameters(), strict=True):
                assert torch.equal(mine, alone)
