"""State of a parameter in a form that torch's collectives can move; it is what ``Lion.state_dict()`` gives.

With it ``FSDP.optim_state_dict`` (FSDP1) and ``get_optimizer_state_dict(..., full_state_dict=True)`` (FSDP2) work as
for any optimizer. Two things stand in their way: neither gloo nor NCCL moves int16, so a remainder travels as the bf16
of the same 16 bits; and FSDP1 wants one dtype for all state of a parameter, so main params travel there in the
momentum's: whole beside an fp32 momentum, as a remainder beside a bf16 one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lion_dist.kernels.reference import join_main, split_main
from lion_dist.local_tensors import local_tensor


def is_flat_param(param: Tensor) -> bool:
    """Whether FSDP1 has flattened ``param`` into a 1-D piece that need not begin or end where a tensor does."""
    return getattr(param, "_fsdp_flattened", False) or type(param).__name__ == "FlatParameter"


def share_mesh_axes(params: Iterable[Tensor]) -> bool:
    """Whether the DTensors among ``params`` are all cut along the same axes of one mesh."""
    dtensors = [p for p in params if hasattr(p, "placements")]
    return len({(p.device_mesh, tuple(not x.is_replicate() for x in p.placements)) for p in dtensors}) <= 1


def movable_state(param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` of one parameter with its main params as above; views where nothing is converted.

    Raises:
        TypeError: main params of fp16 parameters beside a bf16 momentum, under FSDP1.
    """
    main, exp_avg = state.get("main_param"), state.get("exp_avg")
    if main is None or exp_avg is None:
        return state
    if is_flat_param(param) and exp_avg.dtype == torch.float32:
        main = main_as(torch.float32, main, param)
    elif is_flat_param(param):
        if param.dtype != torch.bfloat16:
            raise TypeError(
                f"FSDP1 saves state of one dtype a parameter, and {param.dtype} parameters have fp32 main params "
                "beside a bf16 momentum. Keep momentum_dtype=torch.float32, or use FSDP2."
            )
        main = main_as(torch.int16, main, param)
    return {**state, "main_param": _view(main, torch.bfloat16) if main.dtype == torch.int16 else main}


def main_as(dtype: torch.dtype, saved: Tensor, param: Tensor) -> Tensor:
    """Saved main params (fp32, int16, or the bf16 that int16 travels as) as local ones of ``dtype``, fp32 or int16."""
    main = local_tensor(saved).to(local_tensor(param).device)
    if main.dtype == torch.bfloat16:
        main = main.view(torch.int16)
    if main.dtype == dtype:
        return main
    if dtype == torch.int16:
        return split_main(main.float())[1]
    return join_main(local_tensor(param.detach()), main) if main.dtype == torch.int16 else main.float()


def _view(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if local_tensor(tensor) is tensor:
        return tensor.view(dtype)
    from torch.distributed.tensor import DTensor

    local, mesh, placements = local_tensor(tensor).view(dtype), tensor.device_mesh, tensor.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
