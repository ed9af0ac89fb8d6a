"""The plan of a load: what goes where when dtypes or kinds of main params differ, exactly or else rounded once.

The value of a parameter is its main param where there is one: fp32, or bf16 and remainder together, or the parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lion_dist.averages import KIND as AVERAGE
from lion_dist.boxed_tensor import PIECE_BYTES, BoxedTensor
from lion_dist.boxes import Box
from lion_dist.checkpoint.sharded_state import ShardedParamState, ShardedState
from lion_dist.kernels.reference import join_main, split_main
from lion_dist.main_params import sync_main_param_

Stored = dict[str, TensorStorageMetadata]


@dataclass
class LoadPlan:
    """How each tensor here gets its contents.

    Attributes:
        read: by name in the checkpoint, read in place.
        convert: parameters whose value is read piece by piece and stored in another form.
        resync_main: parameters read in place whose fp32 main params must follow them.
        zero_fill: state that the checkpoint does not have.
        begin_average: parameters whose average begins at them, for the checkpoint has none.
        notes: what the user should know: {fact: names}.
    """

    read: dict[str, BoxedTensor] = field(default_factory=dict)
    convert: dict[str, ShardedParamState] = field(default_factory=dict)
    resync_main: dict[str, ShardedParamState] = field(default_factory=dict)
    zero_fill: list[Tensor] = field(default_factory=list)
    begin_average: list[ShardedParamState] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def plan_load(stored: Stored, state: ShardedState) -> LoadPlan:
    plan = LoadPlan()
    for name, buffer in state.buffers.items():
        _read(plan, stored, f"model.{name}", buffer)
    for name, param in state.params.items():
        if not param.state:
            if f"optimizer.{name}.main_param" in stored:
                _plan_value(plan, stored, name, param)  # the parameter in the file is its rounding
            else:
                _read(plan, stored, f"model.{name}", param.value)
            if f"optimizer.{name}.exp_avg" in stored:
                plan.notes["the saved state of parameters that this optimizer does not hold is left out"].append(name)
            continue
        _plan_value(plan, stored, name, param)
        if f"optimizer.{name}.exp_avg" in stored:
            _read(plan, stored, f"optimizer.{name}.exp_avg", param.state["exp_avg"])
        else:
            plan.notes["not in the checkpoint, starts at zero: exp_avg"].append(name)
            plan.zero_fill += param.state["exp_avg"].boxes.values()
        _plan_average(plan, stored, name, param)
        if param.step is not None:
            _read_scalar(plan, stored, f"optimizer.{name}.step", param.step)
    if state.counters is not None:
        _read_scalar(plan, stored, "counters", state.counters)
    if state.spike_window is not None:
        _read_scalar(plan, stored, "spike_guard", state.spike_window)
    return plan


def _plan_average(plan: LoadPlan, stored: Stored, name: str, param: ShardedParamState) -> None:
    key, average = f"optimizer.{name}.{AVERAGE}", param.state.get(AVERAGE)
    if key in stored and average is not None:
        _read(plan, stored, key, average)
    elif key in stored:
        plan.notes["the saved average of the weights is left out: this optimizer keeps none"].append(name)
    elif average is not None:
        plan.notes["not in the checkpoint, begins at the loaded parameters: the average of the weights"].append(name)
        plan.begin_average.append(param)


def _read(plan: LoadPlan, stored: Stored, key: str, boxed: BoxedTensor) -> None:
    if key not in stored:
        return  # a tensor of no elements
    plan.read[key] = boxed
    saved = stored[key].properties.dtype
    if saved != boxed.dtype:
        kind = "exp_avg" if key.endswith(".exp_avg") else AVERAGE if key.endswith(f".{AVERAGE}") else "tensor"
        plan.notes[f"the saved {kind} is {saved}; it is kept as {boxed.dtype}, as configured"].append(key)


def _read_scalar(plan: LoadPlan, stored: Stored, key: str, value: Tensor) -> None:
    if key in stored:
        boxes = {Box((0,) * value.ndim, tuple(value.shape)): value}
        plan.read[key] = BoxedTensor(value.shape, boxes, dtype=value.dtype, device=value.device)
    else:
        plan.zero_fill.append(value)


def _plan_value(plan: LoadPlan, stored: Stored, name: str, param: ShardedParamState) -> None:
    main = param.state.get("main_param")
    saved_main = stored.get(f"optimizer.{name}.main_param")
    if f"model.{name}" not in stored:
        return  # a tensor of no elements
    saved = stored[f"model.{name}"].properties.dtype, saved_main and saved_main.properties.dtype
    if saved == (param.value.dtype, None if main is None else main.dtype):
        plan.read[f"model.{name}"] = param.value
        if main is not None:
            plan.read[f"optimizer.{name}.main_param"] = main
            if main.dtype == torch.float32:
                plan.resync_main[name] = param
        return
    plan.convert[name] = param
    loses = main is None and param.value.dtype != torch.float32 and (saved_main or saved[0] != param.value.dtype)
    if loses:
        what = "parameter" if saved_main is None else "main params"
        plan.notes[f"the saved {what} in fp32 precision are rounded to {param.value.dtype} here, once"].append(name)


def convert(
    converted: dict[str, ShardedParamState], stored: Stored, read: Callable[[dict[str, BoxedTensor]], None]
) -> None:
    """Read the parameters' saved form, a piece or a few at a time, and keep it in the form that is configured here."""
    for batch in _batches(converted):
        temporary: dict[str, dict[Box, Tensor]] = {}
        for name, piece, value, _ in batch:
            for key in _sources(name, stored):
                place = torch.empty(piece.sizes, dtype=stored[key].properties.dtype, device=value.device)
                temporary.setdefault(key, {})[piece] = place
        read(
            {
                key: BoxedTensor(stored[key].size, boxes, dtype=stored[key].properties.dtype, device=batch[0][2].device)
                for key, boxes in temporary.items()
            }
        )
        for name, piece, value, main in batch:
            store_(exact_value(*(temporary[key][piece] for key in _sources(name, stored))), value, main)


def _sources(name: str, stored: Stored) -> list[str]:
    return [key for key in (f"model.{name}", f"optimizer.{name}.main_param") if key in stored]


def _batches(converted: dict[str, ShardedParamState]) -> Iterator[list[tuple[str, Box, Tensor, Tensor | None]]]:
    """(name, piece, parameter there, main param there), together no larger than a piece unless one is alone."""
    limit = PIECE_BYTES // torch.float32.itemsize
    batch, numel = [], 0
    for name, param in converted.items():
        main = param.state.get("main_param")
        for box, value in param.value.boxes.items():
            for piece in box.pieces(limit):
                if numel + piece.numel > limit and batch:
                    yield batch
                    batch, numel = [], 0
                main_there = None if main is None else box.view_of(piece, main.boxes[box])
                batch.append((name, piece, box.view_of(piece, value), main_there))
                numel += piece.numel
    if batch:
        yield batch


def resync_main_params(resync_main: dict[str, ShardedParamState]) -> None:
    """A parameter that was changed from outside just before the save leads: the main params saved with it are older.

    The optimizer that saved would have noticed at its next step; the one that loads cannot.
    """
    for batch in _batches(resync_main):
        for _, _, value, main in batch:
            sync_main_param_(main, value)


def begin_averages(params: list[ShardedParamState]) -> None:
    for param in params:
        for box, average in param.state[AVERAGE].boxes.items():
            average.copy_(param.value.boxes[box])


def exact_value(param: Tensor, main: Tensor | None = None) -> Tensor:
    """fp32: what a saved parameter and its main param (fp32 or int16 remainder) stand for."""
    if main is None:
        return param.float()
    if main.dtype == torch.int16:
        return join_main(param, main)
    sync_main_param_(main, param)  # as in resync_main_params
    return main


def store_(value: Tensor, param: Tensor, main: Tensor | None) -> None:
    """Keep fp32 ``value`` as ``param`` and, where there is one, its main param; the same rounding as a step's."""
    if param.dtype == torch.bfloat16:
        low_precision, remainder = split_main(value)
        param.copy_(low_precision)
        if main is not None:
            main.copy_(remainder if main.dtype == torch.int16 else value)
    else:
        param.copy_(value)
        if main is not None:
            main.copy_(value)
