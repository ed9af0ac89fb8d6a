"""Loops as other people write them, before and after: the lines that change, and the bits that come out.

Each program in ``tests/recipes`` runs. ``docs/frameworks.md`` shows the differences; a test compares them, and
``pytest -s -k lines`` prints them.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lion_dist import Lion

RECIPES = Path(__file__).parent / "recipes"
PAGE = Path(__file__).parents[1] / "docs" / "frameworks.md"
PAIRS = [
    ("nanogpt_before", "nanogpt_after"),
    ("torchtitan_before", "torchtitan_fsdp2_lion"),
    ("torchtitan_before", "torchtitan_sharded_lion"),
]


def changed_lines(before: str, after: str) -> str:
    old, new = (RECIPES.joinpath(f"{name}.py").read_text().splitlines()[1:] for name in (before, after))  # less titles
    lines = difflib.unified_diff(old, new, lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_page_shows_the_lines_that_change(before, after):
    lines = changed_lines(before, after)
    print(f"\n{before} -> {after}\n{lines}")
    assert len(lines.splitlines()) <= 18
    assert f"```diff\n{lines}\n```" in PAGE.read_text()


def module(name: str):
    return importlib.import_module(f"tests.recipes.{name}")


def whole(model: torch.nn.Module) -> dict[str, Tensor]:
    params = {name: param.detach() for name, param in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in params.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# ---- like nanoGPT's


def nanogpt_by(name: str) -> dict[str, Tensor]:
    """``before`` with Lion instead of AdamW, or ``after``."""
    program = module(name)
    if name == "nanogpt_after":
        return whole(program.train(4))
    with mock.patch.object(torch.optim, "AdamW", Lion), mock.patch.multiple(
        program, learning_rate=1e-4, betas=(0.9, 0.99)
    ):  # fmt: skip
        return whole(program.train(4))


def test_nanogpts_loop_has_the_bits_of_ddp_with_lion(gloo):
    theirs, ours = (gloo.run(2, nanogpt_by, name)[0] for name in ("nanogpt_before", "nanogpt_after"))
    assert_same(ours, theirs)


def test_nanogpts_loop_runs_before_it_is_changed(gloo):
    gloo.run(2, run_before)


def run_before() -> None:
    module("nanogpt_before").train(1)


# ---- like torchtitan's


def titan(name: str, steps: int, load_from: Path | None = None, start: int = 0, save_to: Path | None = None) -> dict:
    spec = module(name).TrainSpec()
    if load_from is not None:
        spec.load(load_from)
    spec.train(range(start, steps))
    if save_to is not None:
        spec.save(save_to)
    return whole(spec.model)


def test_torchtitans_loop_runs_before_it_is_changed(gloo):
    gloo.run(2, titan, "torchtitan_before", 1)


def test_torchtitans_loop_has_the_same_bits_over_fsdp2_and_with_sharded_lion(gloo):
    fsdp2, sharded = (gloo.run(2, titan, f"torchtitan_{name}", 4)[0] for name in ("fsdp2_lion", "sharded_lion"))
    assert_same(sharded, fsdp2)


@pytest.mark.parametrize("name", ["torchtitan_fsdp2_lion", "torchtitan_sharded_lion"])
def test_torchs_own_checkpoints_resume_by_bits_and_on_other_ranks(gloo, tmp_path, name):
    went_on = gloo.run(2, titan, name, 4)[0]
    saved = gloo.run(2, titan, name, 2, None, 0, tmp_path / "checkpoint")[0]
    assert_same(gloo.run(2, titan, name, 4, tmp_path / "checkpoint", 2)[0], went_on)
    assert_same(gloo.run(1, titan, name, 2, tmp_path / "checkpoint", 2)[0], saved)
