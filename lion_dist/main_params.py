"""Main params, the fp32 values behind low-precision parameters: how they begin, follow, convert and travel.

Torch's collectives cannot move all of them, and ``FSDP.optim_state_dict`` (FSDP1) and
``get_optimizer_state_dict(..., full_state_dict=True)`` (FSDP2) use those. Two things stand in their way: neither gloo
nor NCCL moves int16, so a remainder travels as the bf16 of the same 16 bits; and FSDP1 wants one dtype for all state of
a parameter, so main params travel there in the momentum's: whole beside an fp32 momentum, as a remainder beside a bf16
one. ``Lion.state_dict()`` gives them in that form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lion_dist.kernels.reference import join_main, split_main
from lion_dist.local_shard import LocalShard, local_tensor, with_local


def init_main_param(param: Tensor, kind: str) -> Tensor | None:
    """Fresh main params of ``param``: ``kind`` is ``PrecisionPolicy.main_params_for``'s answer."""
    if kind == "fp32":
        return param.detach().float()
    if kind == "split":
        return torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
    return None


@torch.no_grad()
def sync_main_param_(main: Tensor, param: Tensor) -> None:
    """Let fp32 ``main`` follow a low-precision ``param`` that was changed from outside; of one shape, in place.

    The upper 16 bits become the parameter's and the remainder stays: exactly what happens to ``"split"`` main params,
    whose upper half *is* the parameter, and nothing at all where the parameter did not change.
    """
    if param.dtype == torch.bfloat16:
        main.copy_(join_main(param, split_main(main)[1]))
    else:
        main.copy_(torch.where(main.to(param.dtype) == param, main, param.float()))


def main_param_as(dtype: torch.dtype, saved: Tensor, param: Tensor) -> Tensor:
    """Saved main params (fp32, int16, or the bf16 that int16 travels as) as local ones of ``dtype``, fp32 or int16."""
    main = local_tensor(saved).to(local_tensor(param).device)
    if main.dtype == torch.bfloat16:
        main = main.view(torch.int16)
    if main.dtype == dtype:
        return main
    if dtype == torch.int16:
        return split_main(main.float())[1]
    return join_main(local_tensor(param.detach()), main) if main.dtype == torch.int16 else main.float()


def collective_safe_state(param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` of one parameter as torch's collectives can move it; views where nothing is converted.

    Raises:
        TypeError: main params of fp16 parameters beside a bf16 momentum, under FSDP1.
    """
    main, exp_avg = state.get("main_param"), state.get("exp_avg")
    if main is None or exp_avg is None:
        return state
    if LocalShard.of(param).is_flat:
        if exp_avg.dtype != torch.float32 and param.dtype != torch.bfloat16:
            raise TypeError(
                f"FSDP1 saves state of one dtype a parameter, and {param.dtype} parameters have fp32 main params "
                "beside a bf16 momentum. Keep momentum_dtype=torch.float32, or use FSDP2."
            )
        main = main_param_as(torch.float32 if exp_avg.dtype == torch.float32 else torch.int16, main, param)
    if main.dtype == torch.int16:
        main = with_local(main, local_tensor(main).view(torch.bfloat16))
    return {**state, "main_param": main}
