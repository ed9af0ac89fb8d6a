"""DeepSpeed on GPUs over NCCL, on as many ranks as there are GPUs (one is enough): what a CPU cannot show, fp16 with
dynamic loss scaling, FusedLion beside this Lion, and a partition of more than 2^31 elements.

Ranks are started once; they run every check and send back what failed.
"""

import os
import pickle
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lion_dist.kernels.reference import round_half_up
from tests.integrations.deepspeed_ranks import (
    BF16,
    Slots,
    assert_same,
    drift,
    ds_config,
    exact_gradients,
    full_tensors,
    lion_alone,
    make_engine,
    states_of,
    take_exact_step,
)
from tests.launch.jobs import meeting_place

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

STEPS = 4
DTYPES = {"bf16": BF16, "bf16_acc": BF16, "fp16": torch.float16, "fp32": torch.float32}


def check_exact_steps(stage: int, precision: str) -> None:
    """Gradients whose sums are exact, so that NCCL's order does not matter: the bits of plain ``Lion``."""
    engine = make_engine(Slots(), ds_config(stage, precision, gradient_accumulation_steps=2))
    for step in range(STEPS):
        take_exact_step(engine, step)
    found = full_tensors(engine)
    if stage == 0:
        found.pop("exp_avg")  # in the order of the groups
    zero_steps = int(type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer")
    assert_same(found, lion_alone(STEPS, 2, dist.get_world_size(), DTYPES[precision], zero_steps))
    assert all(state["exp_avg"][0] == BF16 for state in states_of(engine))


def check_overflow(stage: int) -> None:
    """An fp16 gradient that overflows on the last rank: all ranks skip, and the scale halves."""
    engine = make_engine(Slots(), ds_config(stage, "fp16"))
    take_exact_step(engine, 0)
    before, scale = full_tensors(engine), engine.optimizer.loss_scale
    gradients = exact_gradients(1, 0, dist.get_rank())
    if dist.get_rank() == dist.get_world_size() - 1:
        gradients[0][0, 0] = torch.inf
    engine.backward(engine(gradients))
    engine.step()
    assert_same(full_tensors(engine), before)
    assert engine.optimizer.loss_scale == scale / 2 and engine.skipped_steps == 1
    take_exact_step(engine, 1)
    after = full_tensors(engine)
    assert any((a != b).any() for a, b in zip(after["fp32"], before["fp32"], strict=True))


def check_drift(stage: int) -> None:
    config = ds_config(stage, "bf16", {"lr": 0.01})
    moved, untouched, touched = drift(config)
    assert (moved, untouched) == (0.0, 0.0) and touched > 0.01


def check_fused_lion_drifts() -> None:
    """What this Lion is chosen for: DeepSpeed's own takes a step of +lr where the gradient is zero."""
    config = ds_config(1, "bf16", {"lr": 0.01})
    config["optimizer"]["params"].pop("momentum_dtype")
    moved, untouched, _ = drift(config, peer=True)
    assert moved > 0.05 and untouched > 0.05


class Wide(nn.Module):
    """One weight of 2^31 + 2^16 elements; the gradient of every row is ``x``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2**16, 2**15 + 1, device="cuda", dtype=BF16).fill_(0.5))

    def forward(self, x):
        return nn.functional.linear(x, self.weight).sum().float()


def check_more_elements_than_32_bits_count() -> None:
    lr = 2**-8
    engine = make_engine(Wide(), ds_config(1, "bf16", {"lr": lr}), peer=False)
    x = torch.randint(-1, 2, (1, 2**15 + 1), generator=torch.Generator().manual_seed(0)).to("cuda", BF16)
    engine.backward(engine(x))
    engine.step()
    expected = round_half_up(0.5 - lr * x.float())[0]
    for row in (0, 2**15, -1):
        assert torch.equal(engine.module.weight.detach()[row], expected), row
    (partition,) = engine.basic_optimizer.state
    assert partition.numel() * dist.get_world_size() >= 2**31 + 2**16
    if dist.get_world_size() == 1:
        assert partition.numel() > 2**31


CHECKS = {
    **{
        f"exact steps, stage {stage}, {precision}": (check_exact_steps, stage, precision)
        for stage, precision in [(0, "bf16"), (1, "bf16"), (1, "bf16_acc"), (2, "bf16"), (3, "bf16"), (3, "fp32")]
        + [(stage, "fp16") for stage in (1, 2, 3)]
    },
    **{f"overflow, stage {stage}": (check_overflow, stage) for stage in (1, 2, 3)},
    **{f"no drift, stage {stage}": (check_drift, stage) for stage in (1, 2, 3)},
    "FusedLion drifts": (check_fused_lion_drifts,),
    "2^31": (check_more_elements_than_32_bits_count,),
}


def _rank(rank: int, world_size: int, where: dict[str, str], path: Path) -> None:
    os.environ.update(where)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.cuda.set_device(rank)
    # For DeepSpeed's own ops, which are compiled here: it cannot read the 9.0a that some images have in this variable.
    os.environ["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, torch.cuda.get_device_capability(rank)))
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    failures = {}
    for name, (check, *arguments) in CHECKS.items():
        try:
            check(*arguments)
        except Exception:
            failures[name] = traceback.format_exc()
        torch.cuda.empty_cache()
    path.with_name(f"rank{rank}").write_bytes(pickle.dumps(failures))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    """{check: what went wrong on any rank}."""
    path = tmp_path_factory.mktemp("deepspeed") / "rank"
    store, where = meeting_place()
    ranks = torch.cuda.device_count()
    mp.spawn(_rank, args=(ranks, where, path), nprocs=ranks)
    del store  # until here: its port is the ranks'
    found = [pickle.loads(path.with_name(f"rank{rank}").read_bytes()) for rank in range(ranks)]
    return {name: text for by_name in found for name, text in by_name.items()}


@pytest.mark.parametrize("check", CHECKS)
def test_on_gpus(failures, check):
    assert check not in failures, failures[check]
