"""Save, load and go on: the same bits, the same dtypes, on other numbers of ranks and other stages."""

import copy
import glob
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.integrations.deepspeed_ranks import (
    BF16,
    Slots,
    assert_same,
    ds_config,
    full_tensors,
    make_engine,
    states_of,
    take_exact_step,
)

pytest.importorskip("deepspeed")

ENGINES = [(0, "bf16"), (1, "bf16"), (1, "bf16_acc"), (2, "bf16"), (3, "bf16")]
engines = pytest.mark.parametrize(("stage", "precision"), ENGINES, ids=lambda value: str(value))


def save_and_resume(stage: int, precision: str, params: dict, folder: Path):
    """Six steps, saved after three; then a new engine that loads and takes the last three again."""
    config = ds_config(stage, precision, params)
    engine = make_engine(Slots(), copy.deepcopy(config))
    for step in range(6):
        if step == 3:
            engine.save_checkpoint(str(folder), tag="three")
        take_exact_step(engine, step)
    uninterrupted = full_tensors(engine)
    again = make_engine(Slots(), copy.deepcopy(config))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lion_dist")
        again.load_checkpoint(str(folder), tag="three")
    loaded = states_of(again)
    for step in range(3, 6):
        take_exact_step(again, step)
    return uninterrupted, full_tensors(again), loaded, states_of(again)


@engines
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_resumed_run_repeats_the_bits_and_keeps_the_dtype(gloo, tmp_path, stage, precision, rounding):
    params = {"momentum_rounding": rounding, "weight_decay": 0.5}
    for expected, found, loaded, after in gloo.run(2, save_and_resume, stage, precision, params, tmp_path):
        assert_same(found, expected)
        for states in (loaded, after):
            assert states and all(state["exp_avg"][0] == BF16 for state in states)
            assert all(state.keys() == {"exp_avg"} | ({"step"} & state.keys()) for state in states)
            assert all(("step" in state) == (rounding == "stochastic") for state in states)
    for file in glob.glob(f"{tmp_path}/three/*optim_states.pt"):  # the dummy exp_avg_sq has no bytes to speak of
        inner = torch.load(file, weights_only=False)["optimizer_state_dict"]
        inner = inner.get("base_optimizer_state", inner.get("optimizer_state_dict"))
        for state in inner["state"].values():
            assert state["exp_avg"].dtype == BF16
            assert state["exp_avg_sq"].shape == state["exp_avg"].shape
            assert state["exp_avg_sq"].untyped_storage().nbytes() == 2


def elastic(stage: int) -> dict:
    return ds_config(stage, "bf16", zero_optimization={"elastic_checkpoint": True})


def train_and_save(config: dict, folder: Path, steps: int):
    engine = make_engine(Slots(), config)
    for step in range(steps):
        take_exact_step(engine, step)
    engine.save_checkpoint(str(folder), tag="saved")
    return full_tensors(engine)


def load(config: dict, folder: Path, stepped: bool):
    """``stepped``: into an engine that has trained already, so that state is there.

    On another number of ranks ``load_checkpoint`` of 0.19.8 refuses; the elastic loader beneath it still shrinks.
    """
    engine = make_engine(Slots(), config)
    if stepped:
        take_exact_step(engine, 17)
    if dist.get_world_size() == 2:
        engine.load_checkpoint(str(folder), tag="saved")
    else:
        files = sorted(glob.glob(f"{folder}/saved/*optim_states.pt"))
        saved = [torch.load(file, weights_only=False)["optimizer_state_dict"] for file in files]
        engine.optimizer.load_state_dict(saved, load_from_fp32_weights=True)
    optimizer = engine.basic_optimizer
    partitions = [group["params"][0] for group in optimizer.param_groups]
    at_once = [optimizer.state[p]["exp_avg"].clone() for p in partitions], [p.detach().clone() for p in partitions]
    take_exact_step(engine, 3)
    return *at_once, states_of(engine)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_elastic_loading_keeps_the_values_and_the_dtype(gloo, tmp_path, stage, ranks, stepped):
    """DeepSpeed's elastic loader makes fp32 tensors of state that is not there yet."""
    trained, _ = gloo.run(2, train_and_save, elastic(stage), tmp_path, 3)
    order = [0, 2, 3, 1]  # of the trained parameters in the two groups: matrices first
    on_ranks = gloo.run(ranks, load, elastic(stage), tmp_path, stepped)
    for kind, parts in (("exp_avg", [r[0] for r in on_ranks]), ("fp32", [r[1] for r in on_ranks])):
        for group, members in enumerate((order[:3], order[3:])):
            found = torch.cat([part[group] for part in parts])
            expected = torch.cat([trained[kind][i].flatten() for i in members])
            assert torch.equal(found[: expected.numel()].float(), expected)
            assert not found[expected.numel() :].any(), "padding"
            assert found.dtype == (BF16 if kind == "exp_avg" else torch.float32)
    for *_, states in on_ranks:
        assert all(state["exp_avg"][0] == BF16 and state.keys() == {"exp_avg"} for state in states)


def restore_fp32(stage: int, folder: Path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = make_engine(Slots(), ds_config(stage))
    for step in range(2):
        take_exact_step(engine, step)
    engine.save_checkpoint(str(folder), tag="saved")
    trained = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    restored = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="saved")
    return full_tensors(engine)["fp32"], [restored[name] for name in trained]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_to_fp32_gives_the_main_params(gloo, tmp_path, stage):
    for expected, found in gloo.run(2, restore_fp32, stage, tmp_path):
        assert_same({"fp32": found}, {"fp32": expected})
