"""``offload_optimizer: cpu``: this Lion on the CPU, and DeepSpeed's own beside it."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.integrations.deepspeed_ranks import (
    BF16,
    Slots,
    assert_same,
    drift,
    ds_config,
    full_fp32,
    full_params,
    full_tensors,
    lion_alone,
    make_engine,
    start_deepspeed,
    states_of,
    take_exact_step,
)

pytest.importorskip("deepspeed")


def offload(stage: int, params: dict | None = None) -> dict:
    config = ds_config(stage, "bf16", params, zero_force_ds_cpu_optimizer=False, gradient_accumulation_steps=2)
    config["zero_optimization"] |= {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    return config


def train_offloaded(config: dict, by_name: bool):
    """``by_name``: DeepSpeed itself makes the optimizer, after ``register()``."""
    from lion_dist.integrations.deepspeed import register, unregister

    if by_name:
        del config["zero_force_ds_cpu_optimizer"]
        register()
    engine = make_engine(Slots(), config, peer=by_name)
    for step in range(4):
        take_exact_step(engine, step)
    if by_name:
        unregister()
    return type(engine.basic_optimizer).__name__, full_tensors(engine), states_of(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("by_name", [False, True], ids=["callable", "registered"])
def test_offloaded_steps_equal_those_of_lion(gloo, stage, by_name):
    expected = lion_alone(steps=4, micro_batches=2, ranks=2, dtype=BF16)
    for name, found, states in gloo.run(2, train_offloaded, offload(stage), by_name):
        assert name == "DeepSpeedLion"
        assert_same(found, expected)
        assert all(state.keys() == {"exp_avg"} for state in states), "no exp_avg_sq"
        assert all(state["exp_avg"][0] == BF16 for state in states)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_gradients_move_nothing(gloo, stage):
    for moved, untouched_moved, touched_moved in gloo.run(2, drift, offload(stage, {"lr": 0.01})):
        assert moved == 0.0 and untouched_moved == 0.0 and touched_moved > 0.01


# ---- DeepSpeedCPULion, which is compiled on its first use: half a minute


def built(extensions: Path) -> Path:
    """In a folder of these tests' own: a build that was killed leaves a lock, which hangs all later ones."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    start_deepspeed()
    from deepspeed.ops.op_builder import CPULionBuilder

    class InOneFile(CPULionBuilder):
        """In two fifths of the time: torch's headers are read once, and no debugger will ask."""

        def sources(self):
            return [str(extensions / "whole.cpp")]

        def cxx_args(self):
            return [flag for flag in super().cxx_args() if flag != "-g"]

    builder = InOneFile()
    for rank in range(dist.get_world_size()):  # one compiles, the next finds it compiled
        if rank == dist.get_rank():
            if rank == 0:
                paths = map(builder.deepspeed_src_path, CPULionBuilder().sources())
                (extensions / "whole.cpp").write_text("".join(f'#include "{path}"\n' for path in paths))
            builder.load(verbose=False)  # DeepSpeedCPULion takes what is loaded
        dist.barrier()
    return extensions


@pytest.fixture(scope="package")
def peer(gloo, once):
    return once("deepspeed-extensions", lambda folder: gloo.run(2, built, folder, timeout=900)[0])


def peers_config(stage: int, lr: float = 2**-8) -> dict:
    """The same Lion, as DeepSpeedCPULion takes it."""
    config = offload(stage)
    config["optimizer"]["params"] = {"lr": lr, "betas": [0.9, 0.99]}
    return config


def peers_drift(extensions: Path, config: dict):
    built(extensions)
    return drift(config, peer=True)


@pytest.mark.slow
def test_deepspeeds_own_drifts_on_zero_gradients(gloo, peer):
    """The defect that the test of the same name above is about: every weight without a gradient walks off."""
    for moved, untouched_moved, _ in gloo.run(2, peers_drift, peer, peers_config(2, lr=0.01)):
        assert moved > 0.04 and untouched_moved > 0.02


def peer_saves(extensions: Path, stage: int, folder: Path):
    built(extensions)
    engine = make_engine(Slots(), peers_config(stage), peer=True)
    for step in range(3):
        take_exact_step(engine, step)
    engine.save_checkpoint(str(folder), tag="saved")
    keys = {key for state in states_of(engine) for key in state}
    return type(engine.basic_optimizer).__name__, keys, {"params": full_params(engine), "fp32": full_fp32(engine)}


def take_over(stage: int, folder: Path, offloaded: bool):
    config = offload(stage) if offloaded else ds_config(stage, gradient_accumulation_steps=2)
    config["optimizer"]["params"]["betas"] = [0.9, 0.99]
    engine = make_engine(Slots(), config)
    engine.load_checkpoint(str(folder), tag="saved")
    loaded = full_params(engine), states_of(engine)
    take_exact_step(engine, 3)
    return *loaded, full_tensors(engine), states_of(engine)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offloaded", [True, False], ids=["offloaded", "on-device"])
def test_run_of_deepspeeds_own_goes_on_here(gloo, peer, tmp_path, stage, offloaded):
    saved = gloo.run(2, peer_saves, peer, stage, tmp_path)
    for (name, keys, theirs), (params, loaded, after, states) in zip(
        saved, gloo.run(2, take_over, stage, tmp_path, offloaded), strict=True
    ):
        assert name == "DeepSpeedCPULion" and "exp_avg_sq" in keys
        assert_same({"params": params}, {"params": theirs["params"]})
        for now in (loaded, states):
            assert all(state.keys() == {"exp_avg"} and state["exp_avg"][0] == BF16 for state in now)
        largest = max((a - b).abs().max().item() for a, b in zip(after["fp32"], theirs["fp32"], strict=True))
        assert 2**-8 <= largest < 1.1 * 2**-8 + 0.01, "one step of lr, and its decay"
