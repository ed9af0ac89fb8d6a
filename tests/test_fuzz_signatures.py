"""Every public signature, fed what does not belong: each call succeeds, or raises an error that names the argument.

The arguments are read from the signatures, so that a new one is fed too. First every argument alone with every value
of ``HOSTILE``; then several at once, at random, for a bounded time, with the seed in the failure.
"""

from __future__ import annotations

import decimal
import fractions
import gc
import inspect
import json
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig, checkpoint, values
from lion_dist.checkpoint.consolidated import consolidate, import_consolidated
from lion_dist.checkpoint.contents import read_contents
from lion_dist.integrations.deepspeed import DeepSpeedLion
from lion_dist.integrations.deepspeed_config import LION_KEYS, PRECISION_KEYS, read_optimizer_section, read_params
from lion_dist.planning.estimates import EnginePlan, Job, activation_bytes, plan
from lion_dist.planning.model_shapes import preset, read_shapes
from tests.seeds import fuzz_seed

SECONDS = 5.0  # for the random part of each target


class Odd:
    """It answers to nothing, not even to repr()."""

    def __repr__(self):
        raise RuntimeError("no repr")


HOSTILE = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.5, 1e-45, -1e-9, 1e300, 1e-320, float("nan"), float("inf"), -float("inf")),
    *("", "auto", "False", "true", "1e-4", "fp32", "bf16", "split", "coded", "nul\0", "\udcff", "x" * 5000, b"bytes"),
    *([], [0.9], [0.9, 0.99], (0.9, 0.99, 0.999), [None, None], ["0.9", "0.99"], {}, {"lr": 1}, {1, 2}, [[1], [2]]),
    *(torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.device("cpu")),
    *(torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(float("nan")), torch.tensor(True), torch.tensor(1j)),
    *(torch.ones(2), torch.empty(0), torch.empty((), device="meta"), torch.tensor([0.5, 0.75])),
    *(np.float32(0.5), np.float64("nan"), np.int64(1), np.bool_(True), np.array(0.5), np.array([0.9, 0.99])),
    *(np.array("text"), np.datetime64("2026-01-01"), np.array([object()])),
    *(1j, decimal.Decimal("0.5"), fractions.Fraction(1, 2), object(), Odd(), int, len, lambda *_: None, iter([1])),
    *(range(3), PrecisionPolicy, ShardingConfig, PrecisionPolicy(), ShardingConfig(), nn.Linear, nn.Linear(2, 2)),
    *(Path("nowhere"), Ellipsis, NotImplemented, ValueError("x"), [float("nan")] * 2, {"params": 3}, {"params": None}),
]


@dataclass(frozen=True)
class Target:
    """A call, its valid arguments (made anew for each call), and the arguments that are fed."""

    name: str
    call: Callable
    valid: Callable[[Path], dict]
    fed: tuple[str, ...]
    errors: tuple[type[Exception], ...] = (TypeError, ValueError)
    also: tuple[str, ...] = ()  # other words by which an error may name its argument

    def __str__(self):
        return self.name


def names_of(call: Callable, *left_out: str) -> tuple[str, ...]:
    found = inspect.signature(call).parameters.values()
    return tuple(p.name for p in found if p.name not in ("self", *left_out) and p.kind != p.VAR_KEYWORD)


def model_of() -> nn.Module:
    return nn.Linear(3, 2)


def trains(make: Callable) -> Callable:
    """``make`` the optimizer, and take a step with it: what is accepted has to work."""

    def call(**arguments):
        model = arguments.pop("_model")
        opt = make(**arguments)
        model(torch.ones(2, 3)).sum().backward()
        opt.step()
        if isinstance(opt, ShardedLion):
            opt.finish_param_sync()
        assert all(p.isfinite().all() for p in model.parameters())

    return call


def of_model(_: Path) -> dict:
    model = model_of()
    return {"_model": model, "params": list(model.parameters())}


def method(kind: type, name: str) -> Callable:
    def call(**arguments):
        model = model_of()
        opt = kind(model.parameters())
        model(torch.ones(2, 3)).sum().backward()
        getattr(opt, name)(**arguments)
        opt.zero_grad()

    return call


def group_of(kind: type) -> Callable:
    """A param group is its own bundle of arguments."""

    def call(**settings):
        model = model_of()
        opt = kind([{"params": [model.weight]}])
        opt.add_param_group({"params": [model.bias], **settings})
        model(torch.ones(2, 3)).sum().backward()
        opt.step()

    return call


def late_group_of(kind: type) -> Callable:
    """A program puts values into a group between steps."""

    def call(**settings):
        model = model_of()
        opt = kind(model.parameters())
        opt.param_groups[0].update(settings)
        model(torch.ones(2, 3)).sum().backward()
        opt.step()
        assert all(p.isfinite().all() for p in model.parameters())

    return call


def on_checkpoint(call: Callable) -> Callable[[Path], dict]:
    def valid(folder: Path) -> dict:
        model = model_of()
        optimizer = Lion(model.parameters())
        if not (folder / "saved").exists():
            checkpoint.save(folder / "saved", model=model, optimizer=optimizer)
            consolidate(folder / "saved", folder / "saved.pt")
        new = folder / f"new{time.monotonic_ns()}"
        arguments = {"model": model, "optimizer": optimizer, "extra": {}, "folder": folder, "count": 3, "path": new}
        arguments["verified"] = False
        if call in (checkpoint.load, checkpoint.verify, read_contents, consolidate):
            arguments["path"] = folder / "saved"
        arguments |= {"source": folder / "saved.pt", "target": new}
        return {name: arguments[name] for name in names_of(call, "progress")}

    return valid


def save_async_and_wait(**arguments) -> None:
    checkpoint.save_async(**arguments).wait()


SETTINGS = ("lr", "betas", "weight_decay")
FILE_ERRORS = (TypeError, ValueError, checkpoint.CheckpointError, OSError)
RUNS = (TypeError, ValueError, RuntimeError)  # use_triton=True where there is no GPU
CHECKPOINT_CALLS = [checkpoint.save, checkpoint.load, checkpoint.verify, checkpoint.newest, checkpoint.keep_last]
CHECKPOINT_CALLS += [read_contents, consolidate, import_consolidated]
SHAPES = preset("1b")
TARGETS = [
    Target("PrecisionPolicy", PrecisionPolicy, lambda _: {}, names_of(PrecisionPolicy)),
    Target("ShardingConfig", ShardingConfig, lambda _: {}, names_of(ShardingConfig)),
    Target("Lion", trains(Lion), of_model, names_of(Lion), RUNS, ("param",)),
    Target("ShardedLion", trains(ShardedLion), of_model, names_of(ShardedLion), RUNS, ("param",)),
    *(
        Target(
            f"{kind.__name__}.{name}",
            method(kind, name),
            lambda _: {},
            names_of(getattr(kind, name)),
            also=("param", "argument"),  # what a function that is no closure says itself
        )
        for kind, methods in [
            (Lion, ("step", "add_param_group", "load_state_dict")),
            (ShardedLion, ("step", "add_param_group", "load_state_dict", "zero_grad")),
            (ShardedLion, ("clip_grad_norm_", "set_grad_divisor", "unscale_and_check_")),
        ]
        for name in methods
    ),
    *(Target(f"a param group of {k.__name__}", group_of(k), lambda _: {}, SETTINGS) for k in (Lion, ShardedLion)),
    *(Target(f"a late value of {k.__name__}", late_group_of(k), lambda _: {}, SETTINGS) for k in (Lion, ShardedLion)),
    *(
        Target(f"checkpoint.{c.__name__}", c, on_checkpoint(c), names_of(c, "progress"), FILE_ERRORS)
        for c in CHECKPOINT_CALLS
    ),
    Target(
        "checkpoint.save_async",
        save_async_and_wait,
        on_checkpoint(checkpoint.save_async),
        names_of(checkpoint.save_async),
        FILE_ERRORS,
    ),
    Target("read_params", lambda **json: read_params(json), lambda _: {}, (*LION_KEYS, *PRECISION_KEYS)),
    Target("DeepSpeedLion", trains(DeepSpeedLion), of_model, ("params", *LION_KEYS, *PRECISION_KEYS), RUNS, ("param",)),
    Target(
        "read_optimizer_section",
        lambda **config: read_optimizer_section({"zero_force_ds_cpu_optimizer": False} | config),
        lambda _: {},
        ("optimizer", "zero_optimization", "zero_force_ds_cpu_optimizer"),
    ),
    Target("Job", Job, lambda _: {"ranks": 8}, names_of(Job)),
    Target("plan", plan, lambda _: {"model": SHAPES, "job": Job(8), "precision": "fp32"}, names_of(plan)),
    Target(
        "activation_bytes",
        activation_bytes,
        lambda _: {"model": SHAPES, "tokens": 1, "itemsize": 2, "checkpointing": True},
        names_of(activation_bytes),
    ),
    Target(
        "EnginePlan.seconds",
        EnginePlan("Lion", "fp32", {}, (), 4).seconds,
        lambda _: {"intra": 1.0, "inter": 1.0},
        names_of(EnginePlan.seconds),
    ),
    Target("read_shapes", read_shapes, lambda _: {}, names_of(read_shapes), (TypeError, ValueError, OSError)),
]


def attempt(target: Target, folder: Path, fed: dict) -> None:
    """Call; what is raised has to be of the right kind, and name one of the arguments that were ``fed``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.call(**target.valid(folder) | fed)
    except target.errors as error:
        text = str(error)
        paths = [str(value) for value in fed.values() if isinstance(value, str | Path) and str(value)]
        named = isinstance(error, OSError) or any(name in text for name in (*fed, *target.also, *paths))
        assert named, f"{target}({shown(fed)}) raised {type(error).__name__}: {text}"
        assert len(text) < 20_000 if paths else len(text) < 1500, f"{target}({shown(fed)}): {len(text)} characters"
    except Exception as error:
        raise AssertionError(f"{target}({shown(fed)}) raised {type(error).__name__}: {error}") from error
    gc.collect(0)  # optimizers are cycles, and ShardedLion looks for wrappers among all objects that there are


def shown(fed: dict) -> str:
    return ", ".join(f"{name}={values.shown(value)}" for name, value in fed.items())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths are written there
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_each_argument_alone(target, folder):
    for name in target.fed:
        for value in HOSTILE:
            attempt(target, folder, {name: value})


@pytest.mark.parametrize("target", [target for target in TARGETS if len(target.fed) > 2], ids=str)
def test_several_arguments_at_once(target, folder):
    seed = fuzz_seed()
    chosen, stop = random.Random(seed), time.monotonic() + SECONDS
    for _ in range(100):
        if time.monotonic() > stop:
            break
        names = chosen.sample(target.fed, chosen.randint(2, min(4, len(target.fed))))
        attempt(target, folder, {name: chosen.choice(HOSTILE) for name in names})


def test_configs_that_are_accepted_hold_pythons_own_values():
    for kind in (PrecisionPolicy, ShardingConfig):
        for name in names_of(kind):
            for value in HOSTILE:
                try:
                    found = getattr(kind(**{name: value}), name)
                except (TypeError, ValueError):
                    continue
                assert type(found) in (int, bool, str, torch.dtype, type(None)), (name, found)
                json.dumps(found, default=str)
