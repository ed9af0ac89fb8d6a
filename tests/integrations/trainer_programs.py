"""A user's script: ``trainer_programs.py trainer|resume|accelerate|client CONFIG OUT`` trains a tiny Llama.

Neither framework may be told to use the CPU: they would run DDP instead of DeepSpeed. Without a GPU they find it.
It knows nothing of lion_dist (but for ``client``, whose own optimizer is a ``Lion``): the runner has registered it.
"""

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))


def counting_sequences() -> list[dict]:
    rows = [(torch.arange(12) + start) % 32 for start in range(64)]
    return [{"input_ids": row, "labels": row} for row in rows]


def by_trainer(config: str, out: Path, resume: bool):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        deepspeed=config,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=24,
        learning_rate=3e-3,
        adam_beta2=0.99,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=12,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=tiny_llama(), args=arguments, train_dataset=counting_sequences())
    trainer.train(resume_from_checkpoint=str(out / "trainer" / "checkpoint-12") if resume else None)
    return trainer.model_wrapped, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def by_accelerate(config: str, client: bool):
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = tiny_llama()
    if client:
        from lion_dist import Lion, PrecisionPolicy

        policy = PrecisionPolicy(momentum_dtype=torch.bfloat16)
        optimizer = Lion(model.parameters(), lr=3e-3, precision=policy)
    else:
        optimizer = DummyOptim(model.parameters())
    loader = torch.utils.data.DataLoader(counting_sequences(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(3):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return model, losses


def leave(out: Path, found: dict) -> NoReturn:
    """The first rank writes ``found`` to ``out/found.json``; every rank ends with exit code 0.

    Past the interpreter's own end: the frameworks leave process groups behind, whose threads now and then abort it.
    """
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    framework, config, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    if framework in ("trainer", "resume"):
        engine, losses = by_trainer(config, out, resume=framework == "resume")
    else:
        engine, losses = by_accelerate(config, client=framework == "client")
    inner = engine.basic_optimizer
    states = [state for state in inner.state.values() if state]
    found = {
        "optimizer": f"{type(inner).__module__}.{type(inner).__name__}",
        "wrapper": type(engine.optimizer).__name__,
        "betas": inner.param_groups[0]["betas"],
        "state": sorted({f"{key} {value.dtype}" for state in states for key, value in state.items()}),
        "losses": losses,
    }
    leave(out, found)


if __name__ == "__main__":
    main()
