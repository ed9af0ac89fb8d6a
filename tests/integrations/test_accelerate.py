"""``ShardedAccelerator`` on 2 gloo ranks, against Accelerate's DistributedDataParallel with ``Lion``."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from lion_dist import GradScaler, Lion, ShardedLion, ShardingConfig
from tests.integrations.huggingface_ranks import assert_ranks_agree, differing, launched, params_of
from tests.models import mlp

STAGE_1 = ShardingConfig(zero_stage=1)  # adds micro-batches up before it sends them, as DDP does


class Run:
    """A program of a user: four steps of two micro-batches, with clipping and a schedule."""

    def __init__(self, sharded: bool = True, init_scale: float | None = None, rates: float = 16, **options):
        from accelerate import Accelerator

        from lion_dist.integrations.accelerate import ShardedAccelerator

        kind = ShardedAccelerator if sharded else Accelerator
        options.setdefault("gradient_accumulation_steps", 2)
        self.accelerator = kind(cpu=True, **options)
        if init_scale is not None:  # Accelerate leaves it out on CPUs
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"
            self.accelerator.scaler = (GradScaler if sharded else torch.amp.GradScaler)("cpu", init_scale=init_scale)
        model = mlp(8, 16, 8, seed=dist.get_rank())  # they are made equal, as under DistributedDataParallel
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}]
        groups += [{"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
        optimizer = ShardedLion(groups, lr=1e-2, module=model, sharding=STAGE_1) if sharded else Lion(groups, lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rates)
        data = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
        loader = torch.utils.data.DataLoader(data, batch_size=2)
        prepared = self.accelerator.prepare(model, optimizer, loader, schedule)
        self.model, self.optimizer, self.loader, self.schedule = prepared
        self.norms: list[float] = []

    def train(self, first: int = 0, stop: int = 8, max_norm: float = 0.05) -> dict[str, torch.Tensor]:
        """From micro-batch ``first`` to ``stop``; returns the parameters."""
        accelerator = self.accelerator
        for batch in itertools.islice(self.loader, first, stop):
            with accelerator.accumulate(self.model), accelerator.autocast():
                loss = (self.model(batch) - batch).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    self.norms.append(float(accelerator.clip_grad_norm_(self.model.parameters(), max_norm)))
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        params = params_of(accelerator.unwrap_model(self.model, keep_torch_compile=False))
        assert_ranks_agree(params)
        return params


def compare_with_ddp(options: dict) -> None:
    with launched():
        run = Run(**options)
        assert type(run.model).__name__ == "Sequential" and type(run.optimizer.optimizer) is ShardedLion
        ours = run.train()
    with launched():
        reference = Run(sharded=False, **options)
        assert type(reference.model).__name__ == "DistributedDataParallel"
        theirs = reference.train()
    assert differing(ours, theirs) == [] and len(run.norms) == 8 // options.get("gradient_accumulation_steps", 2)
    assert torch.allclose(torch.tensor(run.norms), torch.tensor(reference.norms), rtol=1e-5)
    assert run.schedule.get_last_lr() == reference.schedule.get_last_lr() != [1e-2, 1e-2]


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 1}, {"mixed_precision": "bf16"}, {"init_scale": 2.0**10}],
    ids=["accumulate", "every batch", "bf16", "loss scaler"],
)
def test_bits_of_ddp_and_lion(gloo, options):
    gloo.run(2, compare_with_ddp, options)


def train_compiled() -> None:
    """Compiled by Accelerate, and not: in eager operations of the same order, so the same bits."""
    for sharded in (True, False):
        with launched():
            run = Run(sharded, dynamo_backend="aot_eager")
            assert type(run.model).__name__ == "OptimizedModule"
            compiled = run.train()
        with launched():
            assert differing(compiled, Run(sharded).train()) == []


def test_a_compiled_model_has_the_bits_of_one_that_is_not(gloo):
    gloo.run(2, train_compiled)


def overflow() -> None:
    with launched():
        run = Run(init_scale=2.0**60)
        run.train()
        assert run.accelerator.optimizer_step_was_skipped and run.optimizer.optimizer.skipped_steps() == 4
        assert run.schedule.get_last_lr() == [1e-2, 1e-2]


def test_a_schedule_stands_still_in_steps_that_overflow(gloo):
    gloo.run(2, overflow)


def accumulate_sends_nothing() -> None:
    with launched():
        run = Run()
        inside = []
        run.model.register_forward_hook(lambda *_: inside.append(run.optimizer.optimizer.grad_scheduler.in_no_sync))
        run.train()
        assert inside == [True, False] * 4


def test_accumulate_keeps_gradients_on_their_rank(gloo):
    gloo.run(2, accumulate_sends_nothing)


# ---- saving


def go_on(folder: str, first: dict, then: dict) -> None:
    with launched():
        run = Run(**first)
        run.train(stop=4)
        run.accelerator.save_state(folder)
        whole = run.train(4)
        run.accelerator.save_model(run.model, f"{folder}/saved")
        dist.barrier()
        saved = load_file(f"{folder}/saved/model.safetensors")
        assert differing({name: saved[name] for name in whole}, whole) == [] and len(saved) == len(whole)
    with launched():
        run = Run(**then)
        run.accelerator.load_state(folder)
        assert differing(run.train(4), whole) == []


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param({}, {}, id="sharded"),
        pytest.param({"sharded": False}, {}, id="from DDP"),
        pytest.param({}, {"sharded": False}, id="to DDP"),
        pytest.param({"init_scale": 2.0**10}, {"init_scale": 2.0**14}, id="loss scaler"),
    ],
)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(gloo, tmp_path, first, then):
    gloo.run(2, go_on, str(tmp_path), first, then)


def save_in_the_middle(folder: str, sharded: bool) -> dict[str, torch.Tensor]:
    with launched():
        run = Run(sharded, gradient_accumulation_steps=1, rates=math.inf)
        run.train(stop=2, max_norm=1e6)
        run.accelerator.save_state(folder)
        return run.train(2, 4, max_norm=1e6)


def load_alone(folder: str, sharded: bool) -> dict[str, torch.Tensor]:
    """One rank takes both ranks' batches, one after the other: sums of two have one order."""
    with launched():
        run = Run(sharded, gradient_accumulation_steps=2, rates=math.inf)
        run.accelerator.load_state(folder)
        return run.train(4, 8, max_norm=1e6)


@pytest.mark.parametrize("sharded", [True, False], ids=["ShardedLion", "Lion"])
def test_a_state_loads_on_another_number_of_ranks(gloo, tmp_path, sharded):
    expected = gloo.run(2, save_in_the_middle, str(tmp_path), sharded)[0]
    assert differing(gloo.run(1, load_alone, str(tmp_path), sharded)[0], expected) == []


def save_with_buffers(folder: str) -> float:
    with launched():
        run = Run()
        run.model.register_buffer("mark", torch.tensor(float(dist.get_rank())))
        run.accelerator.save_state(folder)
        return float(run.model.mark)


def test_buffers_are_the_first_ranks_when_a_state_is_saved(gloo, tmp_path):
    assert gloo.run(2, save_with_buffers, str(tmp_path)) == [0.0, 0.0]


# ---- refused


def refuse(what: str) -> str:
    from accelerate import Accelerator
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, ProjectConfiguration

    from lion_dist.integrations.accelerate import ShardedAccelerator

    options: dict = {}
    if what == "comm_hook":
        options["kwargs_handlers"] = [DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)]
    if what == "save_on_each_node":
        options["project_config"] = ProjectConfiguration(save_on_each_node=True)
    with launched():
        accelerator = ShardedAccelerator(cpu=what != "alone", **options)
        model = mlp(8, 16, 8)
        trained = model[0].parameters() if what == "a part" else model.parameters()
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True) if what == "other ranks" else None
        optimizer = ShardedLion(trained, module=None if what == "no module" else model, process_group=group)
        with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
            if what == "apart":
                _wrapped = accelerator.prepare(model)
                accelerator.prepare(optimizer)
            if what == "adopt":
                ShardedAccelerator.adopt(type("Mine", (Accelerator,), {})(cpu=True))
            accelerator.prepare(model, optimizer)
            call(accelerator, model, what)
        return str(raised.value)


def call(accelerator, model: nn.Module, what: str) -> None:
    model(torch.ones(2, 8)).sum().backward()
    params = list(model.parameters())
    if what == "value":
        accelerator.clip_grad_value_(params, 1.0)
    if what == "norm_type":
        accelerator.clip_grad_norm_(params, 1.0, norm_type=1)
    if what == "some":
        accelerator.clip_grad_norm_(params[:1], 1.0)
    if what == "join":
        accelerator.join_uneven_inputs([model])
    if what == "micro-batch":
        accelerator.gradient_state._set_sync_gradients(False)
        accelerator.clip_grad_norm_(params, 1.0)


REFUSED = {
    "comm_hook": "comm_hook=fp16 belongs to DistributedDataParallel",
    "save_on_each_node": "save_on_each_node=True",
    "a part": "parameter '2.weight' requires a gradient and no ShardedLion trains it",
    "other ranks": "trains over 1 ranks and the Accelerator gives batches to 2",
    "alone": "Pass cpu=True to ShardedAccelerator, use_cpu=True to TrainingArguments",
    "no module": "Construct it with module=model",
    "apart": "wrapped in DistributedDataParallel, before its ShardedLion was known",
    "adopt": "the accelerator is a Mine",
    "value": "clip_grad_value_() would find no gradients",
    "norm_type": "takes norm_type=2, got 1",
    "some": "clip_grad_norm_() of 1 parameters",
    "join": "join_uneven_inputs() knows DistributedDataParallel only",
    "micro-batch": "if accelerator.sync_gradients",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused(gloo, what):
    for message in gloo.run(2, refuse, what):
        assert REFUSED[what] in message


def prepare_another_model() -> None:
    """Beside a sharded one, a model with another optimizer is Accelerate's as ever."""
    with launched():
        run = Run()
        other = mlp(4, 4)
        adam = torch.optim.AdamW(other.parameters())
        other, adam = run.accelerator.prepare(other, adam)
        assert type(other).__name__ == "DistributedDataParallel"
        other(torch.ones(2, 4)).sum().backward()
        assert float(run.accelerator.clip_grad_norm_(other.parameters(), 1.0)) > 0
        with run.accelerator.no_sync(other):
            assert not other.require_backward_grad_sync


def test_a_model_of_another_optimizer_is_left_to_accelerate(gloo):
    gloo.run(2, prepare_another_model)
