"""``ShardedTrainer`` on 2 gloo ranks, against the Trainer's own DistributedDataParallel with ``Lion``."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lion_dist import GradScaler, Lion, ShardedLion, ShardingConfig
from tests.integrations.huggingface_ranks import (
    assert_ranks_agree,
    differing,
    launched,
    params_of,
    sequences,
    tiny_llama,
    tiny_lora,
    tokenizer,
)

ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}
STAGE_1 = {"sharding": ShardingConfig(zero_stage=1)}  # adds micro-batches up before it sends them, as DDP does


class LossScaling:
    """Stands before a trainer: fp16 autocast and a loss scaler, which Accelerate leaves out on CPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale)


def trainer_class(sharded: bool, base: str, init_scale: float | None) -> type:
    from transformers import Trainer

    from lion_dist.integrations.transformers import ShardedTrainer, ShardedTraining

    if base == "SFTTrainer":
        from trl import SFTTrainer as Trainer  # noqa: N811
    elif sharded and init_scale is None:
        return ShardedTrainer
    bases = (Trainer,) if init_scale is None else (LossScaling, Trainer)
    return type("Chosen", (ShardedTraining, *bases) if sharded else bases, {"init_scale": init_scale})


def make_trainer(folder, sharded=True, base="Trainer", model=None, options=None, init_scale=None, **arguments):
    """Each rank has a model of its own: they are made equal, as under DistributedDataParallel.

    Args:
        options: of ShardedLion.
        init_scale: of a loss scaler; None: there is none.
    """
    from transformers import TrainingArguments

    arguments = ARGUMENTS | arguments
    data = {"train_dataset": sequences(), "eval_dataset": sequences(8)}
    if base == "SFTTrainer":
        from datasets import Dataset
        from trl import SFTConfig

        args = SFTConfig(output_dir=folder, **({"bf16": False} | arguments))
        data = {
            name: Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows]).add_column(
                "labels", [row["input_ids"].tolist() for row in rows]
            )
            for name, rows in data.items()
        }
        data["processing_class"] = tokenizer()
    else:
        args = TrainingArguments(output_dir=folder, **arguments)
    kind, options = (ShardedLion, options or {}) if sharded else (Lion, {"lr": args.learning_rate})
    model = tiny_llama(dist.get_rank()) if model is None else model
    cls = trainer_class(sharded, base, init_scale)
    return cls(model=model, args=args, optimizer_cls_and_kwargs=(kind, options), **data)


def train(folder: str, resume: str | None = None, **options):
    """Returns the trainer after training, and its parameters."""
    trainer = make_trainer(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    params = params_of(trainer.model)
    assert_ranks_agree(params)
    return trainer, params


def logged(trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


# ---- the same bits as DistributedDataParallel with Lion


def compare_with_ddp(folder: str, arguments: dict, lora: bool = False, **options) -> None:
    make = tiny_lora if lora else tiny_llama
    rank = dist.get_rank()
    with launched():
        trainer, ours = train(folder, model=make(rank), options=STAGE_1, **options, **arguments)
        assert "DistributedDataParallel" not in type(trainer.model_wrapped).__name__
        assert type(trainer.optimizer.optimizer) is ShardedLion
    with launched():
        reference, theirs = train(folder, sharded=False, model=make(rank), **options, **arguments)
        assert type(reference.model_wrapped).__name__ == "DistributedDataParallel"
    assert differing(ours, theirs) == []
    assert differing(ours, params_of(make(0))) != []  # it has trained
    for key in ("loss", "learning_rate", "eval_loss"):
        assert logged(trainer, key) == logged(reference, key), key
    norms = torch.tensor([logged(trainer, "grad_norm"), logged(reference, "grad_norm")])
    assert norms.shape == (2, 4) and torch.allclose(norms[0], norms[1], rtol=1e-5)
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays == [group["weight_decay"] for group in reference.optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
        {"max_grad_norm": 0.0},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=lambda arguments: ",".join(arguments) or "plain",
)
def test_bits_of_ddp_and_lion(gloo, tmp_path, arguments):
    gloo.run(2, compare_with_ddp, str(tmp_path), arguments)


def test_bits_of_ddp_and_lion_with_lora(gloo, tmp_path):
    gloo.run(2, compare_with_ddp, str(tmp_path), {}, True)


def compare_sft(folder: str, lora: bool, bf16: bool) -> None:
    compare_with_ddp(folder, {"gradient_accumulation_steps": 2, "bf16": bf16}, lora, base="SFTTrainer")


@pytest.mark.parametrize(("lora", "bf16"), [(False, False), (True, True)], ids=["", "LoRA, bf16"])
def test_bits_of_ddp_and_lion_in_sft(gloo, tmp_path, lora, bf16):
    gloo.run(2, compare_sft, str(tmp_path), lora, bf16)


def train_compiled(folder: str, backend: str, how: str) -> None:
    compile = {"torch_compile": True, "torch_compile_backend": backend}
    options = {"max_steps": 2, "sharded": how != "Lion", "base": "SFTTrainer" if "SFT" in how else "Trainer"}
    make = tiny_lora if "LoRA" in how else tiny_llama
    with launched():
        trainer, compiled = train(folder, model=make(dist.get_rank()), **options, **compile)
        assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    with launched():
        _, eager = train(folder, model=make(dist.get_rank()), **options)
    changed = sum(int((compiled[name] != eager[name]).sum()) for name in eager)
    assert changed <= 0.01 * sum(map(torch.numel, eager.values()))  # signs of sums in another order


@pytest.mark.parametrize("how", ["ShardedLion", "Lion", pytest.param("LoRA in SFT", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile(gloo, tmp_path, backend, how):
    gloo.run(2, train_compiled, str(tmp_path), backend, how)


# ---- fp16


def train_scaled(folder: str) -> None:
    scaled = {"init_scale": 2.0**10, "lr_scheduler_type": "constant"}
    with launched():
        trainer, ours = train(folder, **scaled)
        assert type(trainer.accelerator.scaler) is GradScaler
        norm = logged(trainer, "grad_norm")[0]
    with launched():
        plain, _ = train(folder, bf16=True)
    assert math.isclose(norm, logged(plain, "grad_norm")[0], rel_tol=0.05)  # unscaled
    with launched():
        assert differing(ours, train(folder, sharded=False, **scaled)[1]) == []


def test_bits_of_ddp_and_lion_with_a_loss_scaler(gloo, tmp_path):
    gloo.run(2, train_scaled, str(tmp_path))


def train_scaled_lora_in_sft(folder: str) -> None:
    found = []
    for sharded in (True, False):
        with launched():
            options = {"base": "SFTTrainer", "init_scale": 2.0**10, "model": tiny_lora(dist.get_rank())}
            trainer, params = train(folder, sharded=sharded, **options)
            assert trainer.accelerator.scaler.get_scale() == 2.0**10  # no step overflowed
            found.append(params)
    assert differing(*found) == []


def test_bits_of_ddp_and_lion_with_a_loss_scaler_and_lora_in_sft(gloo, tmp_path):
    gloo.run(2, train_scaled_lora_in_sft, str(tmp_path))


def overflow(folder: str) -> tuple[list[float], int, float]:
    with launched():
        trainer, _ = train(folder, init_scale=2.0**40, lr_scheduler_type="linear")
        optimizer = trainer.optimizer.optimizer
        return logged(trainer, "learning_rate"), optimizer.skipped_steps(), trainer.accelerator.scaler.get_scale()


def test_a_schedule_stands_still_in_steps_that_overflow(gloo, tmp_path):
    for rates, skipped, scale in gloo.run(2, overflow, str(tmp_path)):
        assert rates == [1e-2] * 4 and skipped == 4 and scale == 2.0**36


# ---- checkpoints


def model_in(folder: Path, lora: bool = False) -> dict[str, torch.Tensor]:
    """The parameters of a checkpoint, by ``from_pretrained``."""
    if lora:
        from peft import PeftModel

        return params_of(PeftModel.from_pretrained(tiny_llama(), folder))
    from transformers import AutoModelForCausalLM

    return params_of(AutoModelForCausalLM.from_pretrained(folder))


def go_on(folder: str, first: dict, then: dict) -> None:
    """A run with checkpoints; and another that goes on from the middle of it."""
    with launched():
        trainer, whole = train(folder, save_strategy="steps", save_steps=2, **first)
        trainer.save_model(f"{folder}/saved")
    dist.barrier()
    assert differing(model_in(Path(folder) / "saved"), whole) == []
    with launched():
        resumed, params = train(folder, f"{folder}/checkpoint-2", **then)
        if then.get("sharded", True):
            assert resumed.optimizer.optimizer.taken_steps() == (
                4 if first.get("sharded", True) else 2
            )  # Lion has no count
    assert differing(params, whole) == []
    assert logged(resumed, "loss") == logged(trainer, "loss")


def go_on_with_a_bf16_model(folder: str) -> None:
    go_on(folder, {"model": tiny_llama(0).bfloat16()}, {"model": tiny_llama(1).bfloat16()})


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


def test_a_resumed_run_of_a_bf16_model(gloo, tmp_path):
    gloo.run(2, go_on_with_a_bf16_model, str(tmp_path))


def go_on_with_lora_in_sft(folder: str) -> None:
    """Two steps from the middle, on as many ranks."""
    every = {"base": "SFTTrainer", "save_strategy": "steps", "save_steps": 2}
    with launched():
        _, whole = train(folder, model=tiny_lora(0), **every)
    for sharded in (True, False):
        with launched():
            _, params = train(folder, f"{folder}/checkpoint-2", model=tiny_lora(0), sharded=sharded, **every)
            assert differing(params, whole) == []


def test_a_resumed_run_of_lora_in_sft(gloo, tmp_path):
    gloo.run(2, go_on_with_lora_in_sft, str(tmp_path))
    for sharded in (True, False):
        (alone,) = gloo.run(1, end_with_lora_in_sft, str(tmp_path), sharded)
        assert differing(alone, gloo.run(2, end_with_lora_in_sft, str(tmp_path), sharded)[0]) == []


def end_with_lora_in_sft(folder: str, sharded: bool) -> dict[str, torch.Tensor]:
    """What a run finds that has come to its end."""
    with launched():
        options = {"base": "SFTTrainer", "model": tiny_lora(1), "sharded": sharded}
        return {n: p for n, p in train(folder, f"{folder}/checkpoint-4", **options)[1].items() if "lora" in n}


def train_in_another_world(
    folder: str, resume: str | None, accumulation: int, sharded: bool = True
) -> dict[str, torch.Tensor]:
    with launched():
        options = {"gradient_accumulation_steps": accumulation, "save_strategy": "steps", "save_steps": 2}
        return train(folder, resume, sharded=sharded, **options)[1]


def test_a_run_with_lion_resumes_on_fewer_ranks(gloo, tmp_path):
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    whole = gloo.run(2, train_in_another_world, two, None, 1, False)[0]
    (alone,) = gloo.run(1, train_in_another_world, one, f"{two}/checkpoint-2", 2, False)
    assert differing(whole, alone) == []


def test_a_run_resumes_on_fewer_and_on_more_ranks(gloo, tmp_path):
    """The same global batch, and sums of two, which have one order."""
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    whole = gloo.run(2, train_in_another_world, two, None, 1)[0]
    (alone,) = gloo.run(1, train_in_another_world, one, f"{two}/checkpoint-2", 2)
    assert differing(whole, alone) == []
    again = gloo.run(2, train_in_another_world, two, f"{one}/checkpoint-4", 1)[0]
    assert differing(again, alone) == []  # it was at its end
    (alone,) = gloo.run(1, train_in_another_world, one, None, 2)
    assert differing(gloo.run(2, train_in_another_world, two, f"{one}/checkpoint-2", 1)[0], alone) == []


def keep_the_best(folder: str, lora: bool) -> None:
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    model = (tiny_lora if lora else tiny_llama)(dist.get_rank())
    with launched():
        trainer, params = train(
            folder, model=model, load_best_model_at_end=True, save_total_limit=1, learning_rate=0.3, **every
        )
        best = trainer.state.best_model_checkpoint
        losses = logged(trainer, "eval_loss")
        assert math.isclose(trainer.evaluate()["eval_loss"], min(losses), rel_tol=1e-5)
    assert best.endswith(f"checkpoint-{losses.index(min(losses)) + 1}")
    dist.barrier()
    assert len(list(Path(folder).glob("checkpoint-*"))) <= 2  # the best, and the last
    saved = model_in(Path(best), lora)
    names = [name for name in params if not lora or "lora" in name]
    assert all(torch.equal(params[name], saved[name]) for name in names)


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_model_is_loaded_at_the_end(gloo, tmp_path, lora):
    gloo.run(2, keep_the_best, str(tmp_path), lora)


def evaluate_with_buffers(folder: str) -> float:
    with launched():
        trainer, _ = train(folder)
        trainer.model.register_buffer("mark", torch.tensor(float(dist.get_rank())))
        trainer.evaluate()
        return float(trainer.model.mark)


def test_buffers_are_the_first_ranks_when_the_model_is_evaluated(gloo, tmp_path):
    assert gloo.run(2, evaluate_with_buffers, str(tmp_path)) == [0.0, 0.0]


# ---- where the settings come from, and what is refused


def settings(folder: str, options: dict, arguments: dict) -> tuple:
    with launched():
        trainer = make_trainer(folder, options=options, **arguments)
        trainer.create_optimizer()
        group = trainer.optimizer.param_groups[0]
        return group["lr"], group["betas"], group["weight_decay"]


@pytest.mark.parametrize(
    ("options", "arguments", "expected"),
    [
        ({}, {}, (1e-2, (0.9, 0.99), 0.1)),
        ({}, {"adam_beta2": 0.98, "weight_decay": 0.0}, (1e-2, (0.9, 0.98), 0.0)),
        ({"lr": 3e-4, "betas": (0.95, 0.98)}, {"adam_beta2": 0.9}, (3e-4, (0.95, 0.98), 0.1)),
    ],
)
def test_settings_come_from_the_arguments_and_from_the_keywords(gloo, tmp_path, options, arguments, expected):
    assert gloo.run(1, settings, str(tmp_path), options, arguments) == [expected]


def refused(folder: str, changes: dict) -> str:
    from transformers import TrainingArguments

    from lion_dist.integrations.transformers import ShardedTrainer

    model = tiny_llama()
    with launched():
        changes = dict(changes)
        if changes.pop("optimizers", False):
            changes["optimizers"] = (Lion(model.parameters()), None)
        args = TrainingArguments(output_dir=folder, **ARGUMENTS, **changes.pop("args", {}))
        with pytest.raises((TypeError, ValueError)) as raised:
            ShardedTrainer(model=model, args=args, train_dataset=sequences(), **changes)
        return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": True}, r"optimizers=(Lion, ...)"),
        ({"optimizer_cls_and_kwargs": (Lion, {})}, r"optimizer_cls_and_kwargs=(Lion, ...)"),
        ({"optimizer_cls_and_kwargs": (ShardedLion, {"weight_decay": 0.1})}, "TrainingArguments(weight_decay=...)"),
        ({"args": {"optim": "adafactor"}}, "optim='adafactor'"),
        ({"args": {"save_on_each_node": True}}, "save_on_each_node=True"),
    ],
)
def test_what_cannot_work_is_refused(gloo, tmp_path, changes, message):
    assert message in gloo.run(1, refused, str(tmp_path), changes)[0]


def refused_engine(changes: dict) -> str:
    from lion_dist.integrations.transformers import ShardedTraining

    args = {"fsdp": "", "deepspeed": None, "n_gpu": 1, "save_on_each_node": False} | changes
    trainer = ShardedTraining.__new__(ShardedTraining)
    trainer.args = SimpleNamespace(**args)
    with pytest.raises(ValueError) as raised:
        trainer.create_accelerator_and_postprocess()
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp": "full_shard"}, "TrainingArguments(fsdp=...)"),
        ({"deepspeed": "ds.json"}, "TrainingArguments(deepspeed=...)"),
        ({"n_gpu": 2}, "this process has 2 GPUs"),
    ],
)
def test_other_engines_are_refused(gloo, changes, message):
    assert message in gloo.run(1, refused_engine, changes)[0]
