"""Universal checkpoints: converted by DeepSpeed's own program, loaded on other ranks and by other stages.

Between stage 3 and the others there is no way in 0.19.8, for any optimizer: they look for the model under other names.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests import preloaded
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
pytestmark = pytest.mark.slow  # the converter is a process of its own that imports DeepSpeed
RANKS = 2


def train_and_save(config: dict, folder: Path):
    engine = make_engine(Slots(), config)
    for step in range(3):
        take_exact_step(engine, step)
    engine.save_checkpoint(str(folder), tag="saved")
    return full_tensors(engine)


def convert(folder: Path) -> None:
    command = [preloaded.python(*preloaded.DEEPSPEED), "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--inject_missing_state"]
    command += ["--input_folder", str(folder / "saved"), "--output_folder", str(folder / "universal")]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, env=os.environ | preloaded.ON_CPUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def load_universal(config: dict, folder: Path, stepped: bool):
    """``stepped``: into an engine that has trained already."""
    engine = make_engine(Slots(), config | {"checkpoint": {"load_universal": True}})
    if stepped:
        take_exact_step(engine, 17)
    engine.load_checkpoint(str(folder), tag="universal")
    loaded = full_tensors(engine)
    saved = [state["exp_avg"].dtype for state in inner_state_dict(engine)["state"].values()]
    take_exact_step(engine, 3)
    return loaded, saved, states_of(engine)


def inner_state_dict(engine) -> dict:
    """What the engine's next checkpoint would hold of the inner optimizer."""
    whole = engine.optimizer.state_dict()
    return whole.get("base_optimizer_state") or whole["optimizer_state_dict"]


def loads_on(gloo, folder: Path, expected: dict, config: dict, ranks: int, stepped: bool) -> None:
    for loaded, saved, states in gloo.run(ranks, load_universal, config, folder, stepped):
        assert_same(loaded, expected)
        assert set(saved) == {BF16}
        assert states and all(state.keys() == {"exp_avg"} and state["exp_avg"][0] == BF16 for state in states)


def test_stages_1_and_2_load_each_others(gloo, tmp_path):
    expected, _ = gloo.run(RANKS, train_and_save, ds_config(2), tmp_path)
    convert(tmp_path)
    for config, ranks, stepped in [
        (ds_config(2), 1, False),
        (ds_config(2), 3, True),
        (ds_config(1), 1, True),
        (ds_config(1, "bf16_acc"), 3, False),
    ]:
        loads_on(gloo, tmp_path, expected, config, ranks, stepped)


def test_stage_3_on_other_ranks(gloo, tmp_path):
    expected, _ = gloo.run(RANKS, train_and_save, ds_config(3), tmp_path)
    convert(tmp_path)
    for ranks, stepped in [(1, False), (3, True)]:
        loads_on(gloo, tmp_path, expected, ds_config(3), ranks, stepped)
