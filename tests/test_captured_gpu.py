"""A whole step in one CUDA graph arrives at the bits of eager steps, whatever comes between replays."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import lion_dist.checkpoint
from lion_dist import CapturedStep, PrecisionPolicy, ShardedLion, ShardingConfig
from tests.test_sharded_gpu import on_all_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

STEPS = 9


class Net(nn.Module):
    """Layers, of which the last reads the first one's weight, as tied weights do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 96), nn.GELU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.linear(x, self.first.weight.t())


CASES = {
    "split": (torch.bfloat16, PrecisionPolicy(), {}),
    "split, NCCL": (torch.bfloat16, PrecisionPolicy(), {"peer_memory": False}),
    "split, stage 1": (torch.bfloat16, PrecisionPolicy(), {"zero_stage": 1}),
    "fp32": (torch.float32, PrecisionPolicy(), {}),
    "fp32 main params": (torch.bfloat16, PrecisionPolicy(main_params="fp32"), {}),
    "stochastic": (torch.bfloat16, PrecisionPolicy(main_params="none", momentum_rounding="stochastic"), {}),
    "average": (torch.bfloat16, PrecisionPolicy(main_params="none", ema_dtype=torch.bfloat16), {}),
}


class Training:
    def __init__(self, device: torch.device, case: str, micro_batches: int = 1, tensor_lr: bool = True):
        torch.manual_seed(0)
        dtype, precision, sharding = CASES[case]
        self.model, self.micro_batches = Net().to(device, dtype), micro_batches
        lr = torch.tensor(1e-2, device=device) if tensor_lr else 1e-2
        self.opt = ShardedLion(
            self.model.parameters(),
            lr=lr,
            weight_decay=0.1,
            module=self.model,
            precision=precision,
            sharding=ShardingConfig(bucket_numel=8000, **sharding),
            ema_decay=None if precision.ema_dtype is None else 0.9,
        )
        self.schedule = LambdaLR(self.opt, lambda step: 1 / (1 + step))
        self.losses: list[float] = []

    def step(self, x: Tensor) -> Tensor:
        for i, part in enumerate(x.chunk(self.micro_batches)):
            if i < self.micro_batches - 1:
                with self.opt.no_sync():
                    loss = self.model(part).float().square().mean()
                    loss.backward()
            else:
                loss = self.model(part).float().square().mean()
                loss.backward()
        self.opt.clip_grad_norm_(0.5)
        self.opt.step()
        self.opt.zero_grad()
        return loss.detach()

    def run(self, call, between=None) -> dict:
        device, dtype = next(self.model.parameters()).device, next(self.model.parameters()).dtype
        for step in range(STEPS):
            generator = torch.Generator(device).manual_seed(100 * step + dist.get_rank())
            x = torch.randn(8, 64, generator=generator, device=device).to(dtype)
            if step == 6 and dist.get_rank() == 0:
                x[0, 0] = torch.nan
            self.losses.append(call(x).item())
            self.schedule.step()
            if between is not None:
                between(self, step)
        self.opt.finish_param_sync()
        state = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for i, shard in enumerate(self.opt.shards):
            state |= {f"exp_avg {i}": shard.exp_avg.clone(), f"main {i}": shard.main_param}
            state[f"average {i}"] = shard.weight_avg
        assert self.opt.skipped_steps() == 1 and self.opt.taken_steps() == STEPS - 1
        return state


def assert_same(found: dict, expected: dict) -> None:
    for name, tensor in expected.items():
        if tensor is not None:
            assert torch.equal(found[name], tensor), name


def capture_beside_eager(device: torch.device, case: str, micro_batches: int) -> None:
    eager, captured = (Training(device, case, micro_batches) for _ in range(2))
    expected = eager.run(eager.step)
    step = CapturedStep(captured.step, captured.opt)
    found = captured.run(step)
    assert step._graph is not None
    assert_same(found, expected)
    for mine, theirs in zip(captured.losses, eager.losses, strict=True):
        assert mine == theirs or math.isnan(mine) and math.isnan(theirs)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_replays_arrive_at_the_bits_of_eager_steps(case, micro_batches):
    """Under a schedule, with clipping, and one step that is skipped because a rank's gradient is not finite."""
    on_all_gpus(capture_beside_eager, case, micro_batches)


def evaluate(training: Training, step: int) -> None:
    with torch.no_grad():
        training.losses.append(training.model(torch.ones(2, 64, device="cuda").bfloat16()).sum().item())


def take_an_eager_step(training: Training, step: int) -> None:
    if step % 3 == 2:
        training.step(torch.ones(8, 64, device="cuda").bfloat16() * (step + 1) / (1 + dist.get_rank()))


def write_parameters(training: Training, step: int) -> None:
    training.opt.finish_param_sync()
    with torch.no_grad():
        training.model.first.weight.mul_(0.5)


BETWEEN = {"an evaluation": evaluate, "an eager step": take_an_eager_step, "a write": write_parameters}


def capture_with_something_between(device: torch.device, what: str) -> None:
    case = "fp32 main params" if what == "a write" else "split"
    eager, captured = (Training(device, case) for _ in range(2))
    counts = STEPS + (3 if what == "an eager step" else 0)
    taken = lambda opt: opt.taken_steps() + opt.skipped_steps()  # noqa: E731
    results = []
    for training, call in ((eager, eager.step), (captured, CapturedStep(captured.step, captured.opt))):
        try:
            results.append(training.run(call, BETWEEN[what]))
        except AssertionError:
            assert taken(training.opt) == counts
            training.opt.finish_param_sync()
            results.append({name: p.detach().clone() for name, p in training.model.named_parameters()})
    assert_same(results[1], results[0])
    for mine, theirs in zip(captured.losses, eager.losses, strict=True):
        assert mine == theirs or math.isnan(mine) and math.isnan(theirs)


@pytest.mark.parametrize("what", BETWEEN)
def test_what_comes_between_replays_sees_and_leaves_what_it_would_between_eager_steps(what):
    on_all_gpus(capture_with_something_between, what)


def save_between_replays(device: torch.device, folder: str) -> None:
    captured = Training(device, "split")
    step = CapturedStep(captured.step, captured.opt)
    x = torch.ones(8, 64, device=device).bfloat16()
    for _ in range(6):
        step(x)
    lion_dist.checkpoint.save(f"{folder}/saved", model=captured.model, optimizer=captured.opt)
    resumed = Training(device, "split")
    lion_dist.checkpoint.load(f"{folder}/saved", model=resumed.model, optimizer=resumed.opt)
    for _ in range(3):
        step(x)
        resumed.step(x)
    for training in (captured, resumed):
        training.opt.finish_param_sync()
    for mine, theirs in zip(captured.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_checkpoint_between_replays_holds_the_step(tmp_path):
    on_all_gpus(save_between_replays, str(tmp_path))


def load_between_replays(device: torch.device) -> None:
    captured = Training(device, "split")
    step = CapturedStep(captured.step, captured.opt)
    x = torch.ones(8, 64, device=device).bfloat16()
    start = copy.deepcopy(captured.model.state_dict())
    for _ in range(5):
        step(x)
    captured.model.load_state_dict(start)
    step(x)
    captured.opt.finish_param_sync()
    change = max((p - start[name]).abs().max().item() for name, p in captured.model.named_parameters())
    assert 0 < change < 0.05  # one step from where it was loaded, not from where training was


def test_loaded_parameters_are_trained_on(tmp_path):
    on_all_gpus(load_between_replays)


def refuse_what_is_constant(device: torch.device) -> None:
    captured = Training(device, "split", tensor_lr=False)
    step = CapturedStep(captured.step, captured.opt, warm_up=1)
    x = torch.ones(8, 64, device=device).bfloat16()
    step(x), step(x), step(x)
    with pytest.raises(ValueError, match=r"captured over inputs .* got .*\(4, 64\)"):
        step(x[:4])
    captured.opt.param_groups[0]["lr"] = 5e-3
    with pytest.raises(RuntimeError, match="lr of param group 0 = 0.01 as a constant, and it is 0.005 now"):
        step(x)


def test_changed_constants_and_shapes_are_refused():
    on_all_gpus(refuse_what_is_constant)


def fail_in_the_capture(device: torch.device) -> None:
    training = Training(device, "split")
    x = torch.ones(8, 64, device=device).bfloat16()

    def waits(x: Tensor) -> Tensor:
        loss = training.model(x).float().square().mean()
        loss.backward()
        loss.item()
        training.opt.step()

    step = CapturedStep(waits, training.opt, warm_up=1)
    step(x)
    outer = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        step(x)
    assert torch.cuda.current_stream() == outer
    torch.cuda.empty_cache()  # raises where the allocator still records
    training.opt.zero_grad()
    training.step(x)
    assert training.opt.taken_steps() == 2
    with pytest.raises(RuntimeError, match="lion_dist.CapturedStep"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        training.opt.step()


def test_a_step_that_waits_for_the_device_fails_in_the_capture_and_leaves_a_usable_optimizer():
    on_all_gpus(fail_in_the_capture)
