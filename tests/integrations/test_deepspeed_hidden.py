"""A plain ``Lion`` that DeepSpeed is handed as a client's optimizer: what flat partitions hide is refused by name."""

import os

import pytest
import torch
import torch.distributed as dist

from lion_dist import Lion, SpikeGuard
from tests.integrations.deepspeed_ranks import (
    Slots,
    ds_config,
    exact_gradients,
    full_params,
    start_deepspeed,
    take_exact_step,
)

deepspeed = pytest.importorskip("deepspeed")

OPTIONS = {
    "ema_decay": {"ema_decay": 0.9},
    "cautious=True": {"cautious": True},
    "skip_spikes": {"skip_spikes": SpikeGuard()},
}


def config_of(stage: int, precision: str) -> dict:
    config = ds_config(stage, precision, zero_allow_untested_optimizer=True)
    del config["optimizer"]
    return config


def train(stage: int, precision: str, options: dict) -> bool:
    """Returns whether the step has changed something."""
    start_deepspeed()
    model = Slots()
    lion = Lion(model.groups(), lr=2**-8, **options)
    engine = deepspeed.initialize(model=model, optimizer=lion, config=config_of(stage, precision))[0]
    before = full_params(engine)
    take_exact_step(engine, 0)
    return not all(map(torch.equal, before, full_params(engine)))


def refused(stage: int, precision: str, option: str) -> str:
    with pytest.raises(ValueError) as caught:
        train(stage, precision, OPTIONS[option])
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "precision", "option"),
    [(1, "fp32", option) for option in OPTIONS]
    + [
        (stage, precision, "ema_decay") for stage, precision in ((0, "bf16"), (1, "bf16_acc"), (2, "bf16"), (3, "bf16"))
    ],
)
def test_what_needs_the_models_own_tensors_is_refused_at_the_first_step(gloo, stage, precision, option):
    for said in gloo.run(2, refused, stage, precision, option):
        assert said.startswith(f"{option} needs ") and "has put a tensor of its own, of shape (" in said
        assert said.endswith(f"Use ShardedLion or fully_shard (FSDP2), or leave {option} out.")


def test_without_such_an_option_it_trains(gloo):
    assert all(gloo.run(2, train, 2, "bf16", {"cautious_wd": True}))


def average_the_models_own() -> None:
    start_deepspeed()
    model = Slots()
    lion = Lion(model.groups(), lr=2**-8, ema_decay=0.5)
    engine = deepspeed.initialize(model=model, optimizer=lion, config=config_of(0, "fp32"))[0]
    start = full_params(engine)
    take_exact_step(engine, 0)
    trained = full_params(engine)
    with lion.averaged_parameters():
        expected = [(a + b) / 2 for a, b in zip(start, trained, strict=True)]
        assert all(map(torch.allclose, full_params(engine), expected))
    assert all(map(torch.equal, full_params(engine), trained))


def test_stage_0_in_fp32_leaves_the_model_its_own_and_is_averaged(gloo):
    gloo.run(2, average_the_models_own)


def prepare_by_accelerate() -> str:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    start_deepspeed()
    model, config = Slots(), config_of(2, "bf16")
    del config["zero_allow_untested_optimizer"]  # Accelerate says so itself
    environ = dict(os.environ)
    try:
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        engine, _ = accelerator.prepare(model, Lion(model.groups(), ema_decay=0.9))
        with pytest.raises(ValueError) as caught:  # its backward() steps the engine
            accelerator.backward(engine(exact_gradients(0, 0, dist.get_rank())))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(environ)
    return str(caught.value)


def test_accelerate_hands_it_on_and_it_is_refused(gloo):
    pytest.importorskip("accelerate")
    for said in gloo.run(2, prepare_by_accelerate):
        assert said.startswith("ema_decay needs the model's own weights")
