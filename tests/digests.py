"""What every way of training arrives at, as a digest of parameters and optimizer state.

Gradients are small integers times a power of two, and every rank has an equal share of them. So sums over ranks,
micro-batches and squares are exact, in any order and on any processor: one digest holds for 1, 2 and 4 ranks and for
every machine. It changes only when the arithmetic of the optimizer does, and then the change has to say so.

    python -m tests.digests          # writes tests/digests.json anew
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig
from tests.shared_files import over_shared_files

FILE = Path(__file__).with_suffix(".json")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = ((33, 7), (5,), (), (130,), (0, 4), (64, 3))
SHARES = 4  # ranks times micro-batches divide it: every share of a gradient is exact in bf16
STEPS = 4


@dataclass(frozen=True)
class Case:
    name: str
    world_sizes: tuple[int, ...] = (1, 2, 4)
    dtype: torch.dtype = FP32
    micro_batches: int = 1
    no_sync: bool = False
    clip: float | None = None
    skipped_step: int | None = None  # one gradient of this step is infinite
    replicas: int = 1
    groups: bool = False
    peers: bool = False  # over memory that ranks map
    precision: PrecisionPolicy = field(default_factory=PrecisionPolicy)
    sharding: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


def _precisions() -> list[tuple[str, torch.dtype, PrecisionPolicy]]:
    def policy(main_params: str, momentum: torch.dtype, rounding: str = "nearest") -> PrecisionPolicy:
        return PrecisionPolicy(main_params=main_params, momentum_dtype=momentum, momentum_rounding=rounding, seed=7)

    return [
        ("fp32", FP32, PrecisionPolicy()),
        ("fp32-momentum16-stochastic", FP32, policy("auto", BF16, "stochastic")),
        ("bf16-split", BF16, PrecisionPolicy()),
        ("bf16-split-momentum32", BF16, policy("split", FP32)),
        ("bf16-fp32", BF16, policy("fp32", BF16)),
        ("bf16-none", BF16, policy("none", FP32)),
        ("bf16-none-stochastic", BF16, policy("none", BF16, "stochastic")),
        ("fp16", FP16, PrecisionPolicy()),
    ]


CASES = [
    *[
        Case(f"{name}-stage{stage}", dtype=dtype, precision=policy, sharding={"zero_stage": stage}, clip=0.5)
        for name, dtype, policy in _precisions()
        for stage in (1, 2)
    ],
    *[
        Case(
            f"{name}-accumulated-stage{stage}",
            (1, 2),
            dtype,
            2,
            no_sync=True,
            precision=policy,
            sharding={"zero_stage": stage},
        )
        for name, dtype, policy in _precisions()[::2]
        for stage in (1, 2)
    ],
    *[Case(f"{name}-skips", dtype=dtype, precision=policy, skipped_step=2) for name, dtype, policy in _precisions()],
    *[
        Case(f"{name}-coded", dtype=dtype, precision=policy, sharding={"param_sync": "coded"})
        for name, dtype, policy in _precisions()
        if dtype != FP16
    ],
    *[
        Case(f"{name}-in-backward", dtype=dtype, precision=policy, sharding={"update_in_backward": True})
        for name, dtype, policy in _precisions()[::2]
    ],
    *[
        Case(f"{name}-cautious", dtype=dtype, precision=policy, settings={"cautious": True})
        for name, dtype, policy in _precisions()[::2]
    ],
    *[
        Case(f"{name}-two-replicas", (4,), dtype, precision=policy, replicas=2, clip=0.5)
        for name, dtype, policy in _precisions()[::2]
    ],
    *[
        Case(f"{name}-peers", (2, 4), dtype, precision=policy, peers=True, clip=0.5)
        for name, dtype, policy in _precisions()[::2]
    ],
    Case("groups", groups=True, clip=0.5),
    Case("decoupled", settings={"decoupled_weight_decay": True}),
    Case("wire-fp32", dtype=BF16, sharding={"reduce_dtype": FP32}),
    Case("one-bucket", sharding={"bucket_numel": None}),
    Case("bucket-per-parameter", sharding={"bucket_numel": 1}),
]


def _integers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-15, 16, shape, generator=generator)


class Given(nn.Module):
    """Its loss has the gradients that it is given."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList((_integers(shape, generator) / 8).to(dtype) for shape in SHAPES)

    def forward(self, grads: list[Tensor]) -> Tensor:
        return torch.stack([_given(weight, grad) for weight, grad in zip(self.weights, grads, strict=True)]).sum()


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, _upstream: Tensor):
        return ctx.saved_tensors[0], None


_given = _Given.apply


def _shares(case: Case, step: int, world_size: int) -> list[Tensor]:
    """This rank's gradients in one micro-batch of ``step``."""
    generator = torch.Generator().manual_seed(100 + step)
    parts = world_size * case.micro_batches
    grads = [(_integers(shape, generator) / (32 * parts)).to(case.dtype) for shape in SHAPES]
    if step == case.skipped_step and dist.get_rank() == world_size - 1:
        grads[0][0, 0] = torch.inf
    return grads


def _param_groups(model: Given, case: Case) -> list[dict]:
    weights = list(model.weights)
    if not case.groups:
        return [{"params": weights}]
    return [{"params": weights[:2]}, {"params": weights[2:], "lr": 0.03125, "weight_decay": 0.0, "betas": (0.75, 0.5)}]


def train(case: Case) -> dict[str, dict[str, list]]:
    """Returns this rank's part: {parameter: {kind: [(offsets, bytes)]}}."""
    if case.peers:
        return over_shared_files(_train, case)
    return _train(case)


def _train(case: Case) -> dict[str, dict[str, list]]:
    world_size, model, mesh = dist.get_world_size(), Given(case.dtype), None
    if case.replicas > 1:
        mesh = dist.init_device_mesh("cpu", (case.replicas, world_size // case.replicas))
    opt = ShardedLion(
        _param_groups(model, case),
        lr=0.0078125,
        weight_decay=0.125,
        module=model,
        process_group=mesh,
        sharding=ShardingConfig(**{"bucket_numel": 200, "average": False} | case.sharding),
        precision=case.precision,
        **case.settings,
    )
    for step in range(STEPS):
        for i in range(case.micro_batches):
            last = i == case.micro_batches - 1
            with contextlib.nullcontext() if last or not case.no_sync else opt.no_sync():
                model(_shares(case, step, world_size)).backward()
        if case.clip is not None:
            opt.clip_grad_norm_(case.clip)
        opt.step()
    opt.finish_param_sync()
    assert opt.taken_steps() == STEPS - (case.skipped_step is not None)
    result = {name: {"param": [((0,), _bytes(p))]} for name, p in model.named_parameters()}
    by_param = {param: name for name, param in model.named_parameters()}
    names = [by_param[param] for group in opt.param_groups for param in group["params"]]
    for i, kinds in opt.state_dict()["state"].items():
        name = names[i]
        for kind in ("exp_avg", "main_param", "step"):
            if kind not in kinds or not kinds["exp_avg"].numel():  # of no elements there is nothing to digest
                continue
            value = kinds[kind]
            boxes = value.boxes if hasattr(value, "boxes") else {None: value}
            result[name][kind] = [(box.offsets if box else (0,), _bytes(local)) for box, local in boxes.items()]
    return result


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def digest(ranks: list[dict[str, dict[str, list]]]) -> str:
    """Of all ranks' parts together; what several of them hold must be the same."""
    total = hashlib.sha256()
    for name in sorted(ranks[0]):
        for kind in sorted({kind for rank in ranks for kind in rank[name]}):
            pieces: dict[tuple, bytes] = {}
            for offsets, content in (piece for rank in ranks for piece in rank[name].get(kind, [])):
                if pieces.setdefault(offsets, content) != content:
                    raise AssertionError(f"{kind} of {name} differs between ranks")
            total.update(f"{name} {kind} ".encode())
            total.update(b"".join(pieces[offsets] for offsets in sorted(pieces)))
    return total.hexdigest()[:16]


def main() -> None:
    import os

    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests.gloo_workers import GlooPool

    pool, found = GlooPool(), {}
    for case in CASES:
        digests = {n: digest(pool.run(n, train, case)) for n in case.world_sizes}
        if len(set(digests.values())) > 1:
            raise SystemExit(f"{case.name}: the digest depends on the number of ranks: {digests}")
        found[case.name] = digests[case.world_sizes[0]]
    pool.stop()
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
