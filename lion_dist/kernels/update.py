"""``lion_update_``: one Lion step on the tensors of one homogeneous group, in place, by the backend that is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lion_dist.config import PARAM_DTYPES
from lion_dist.kernels.backends import backend_of
from lion_dist.kernels.reference import StepScalars


@dataclass(eq=False)
class LionTensors:
    """The tensors that one call updates: all on one device, and alike in dtypes. Checked once, updated many times.

    ``params[i]``, ``mains[i]``, ``exp_avgs[i]`` and ``averages[i]`` are 1-D, contiguous and of the same numel, and stay
    where they are in memory for the life of this object. See ``reference.py`` for the dtypes and what each is.
    """

    params: Sequence[Tensor]  # T x [numel_i]
    exp_avgs: Sequence[Tensor]  # T x [numel_i]
    mains: Sequence[Tensor] | None = None  # T x [numel_i]
    index_starts: Sequence[int] | None = None  # T global element indices of the first elements, for random bits
    steps: Tensor | None = None  # [T] int64 on the device, completed steps; random bits need them
    stochastic_momentum: bool = False
    averages: Sequence[Tensor] | None = None  # T x [numel_i] fp32 | bf16, of the weights
    ema_decay: float | None = None  # of ``averages``
    launch_cache: dict = field(default_factory=dict, repr=False)  # the backend's: what outlives a call

    def __post_init__(self):
        for column in filter(None, (self.params, self.exp_avgs, self.mains, self.averages)):
            first = column[0]
            for tensor, param in zip(column, self.params, strict=True):
                if tensor.dtype != first.dtype or tensor.device != self.params[0].device:
                    raise ValueError(
                        f"one group has one dtype and device: got {tensor.dtype} on {tensor.device} beside "
                        f"{first.dtype} on {self.params[0].device}"
                    )
                if tensor.shape != (param.numel(),) or not tensor.is_contiguous():
                    raise ValueError(
                        f"tensors of a group are 1-D and contiguous: got shape {tuple(tensor.shape)}, stride "
                        f"{tensor.stride()} for a parameter of {param.numel()} elements"
                    )
        self._check_dtypes()
        self.numels = [param.numel() for param in self.params]

    def _check_dtypes(self):
        param, exp_avg = self.params[0].dtype, self.exp_avgs[0].dtype
        main = None if self.mains is None else self.mains[0].dtype
        if param not in PARAM_DTYPES:
            raise TypeError(f"Lion updates fp32, bf16 and fp16 parameters, got {param}")
        if exp_avg not in (torch.float32, torch.bfloat16):
            raise TypeError(f"exp_avg must be fp32 or bf16, got {exp_avg}")
        allowed = {torch.float32: [None], torch.bfloat16: [None, torch.float32, torch.int16]}
        if main not in allowed.get(param, [torch.float32]):
            raise TypeError(f"main params of dtype {main} do not go with {param} parameters")
        if (self.averages is None) != (self.ema_decay is None):
            raise ValueError(f"averages and ema_decay go together, got ema_decay={self.ema_decay}")
        if self.averages is not None and self.averages[0].dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"averages must be fp32 or bf16, got {self.averages[0].dtype}")
        if self.is_stochastic and (self.steps is None or self.index_starts is None):
            raise ValueError("stochastic rounding needs steps and index_starts")

    def accept(self, grads: Sequence[Tensor]) -> bool:
        """Whether ``grads`` are contiguous, of one dtype, on the device, and of the params' numels."""
        return (
            len({grad.dtype for grad in grads}) == 1
            and {grad.device for grad in grads} == {self.device}
            and list(map(Tensor.numel, grads)) == self.numels
            and all(map(Tensor.is_contiguous, grads))
        )

    def check_grads(self, grads: Sequence[Tensor]) -> None:
        """Raise ValueError, naming the first misfit, unless the group accepts ``grads``."""
        if self.accept(grads):
            return
        for grad, numel in zip(grads, self.numels, strict=True):
            found = (grad.numel(), grad.dtype, grad.device, grad.is_contiguous())
            if found != (numel, grads[0].dtype, self.device, True):
                raise ValueError(
                    f"a gradient has {grad.numel()} elements of {grad.dtype} on {grad.device} "
                    f"(contiguous: {grad.is_contiguous()}), but its parameter has {numel} on {self.device} and the "
                    f"group's gradients are {grads[0].dtype}"
                )

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def stochastic_param(self) -> bool:
        return self.mains is None and self.params[0].dtype == torch.bfloat16

    @property
    def stochastic_average(self) -> bool:
        return self.averages is not None and self.averages[0].dtype == torch.bfloat16

    @property
    def is_stochastic(self) -> bool:
        return self.stochastic_param or self.stochastic_momentum or self.stochastic_average


@torch.no_grad()
def lion_update_(
    tensors: LionTensors,
    grads: Sequence[Tensor],  # T x numel_i elements, contiguous, one dtype: fp32 | bf16 | fp16
    scalars: StepScalars,
    *,
    grad_scale: Tensor | None = None,  # [] fp32 on the device: gradients are multiplied by it
    skip: Tensor | None = None,  # [] fp32 on the device: nonzero leaves everything as it was
    active: Tensor | None = None,  # [T] fp32 on the device: 0 leaves that tensor as it was
    seed: int = 0,
    cautious_lrs: Tensor | None = None,  # [T, 2] fp32 on the device, reference.cautious_lrs(): the cautious step
    cautious_wd: bool = False,  # decay only where step and parameter have the same sign
    backend: str = "cpu",  # a name in backends.MODULES, which choose_backend() gives
    check: bool = True,  # False: the caller has asked tensors.accept(grads), which takes host time
) -> None:
    """One Lion step on every tensor of the group, in place. Nothing here waits for a GPU.

    Raises:
        ValueError: a gradient of another size, dtype or device than the group's; nothing is changed.
    """
    if check:
        tensors.check_grads(grads)
    backend_of(backend).update(
        tensors,
        grads,
        scalars,
        grad_scale=grad_scale,
        skip=skip,
        active=active,
        seed=seed,
        cautious_lrs=cautious_lrs,
        cautious_wd=cautious_wd,
    )
    if tensors.is_stochastic:
        _count_steps(tensors.steps, skip, active)


def _count_steps(steps: Tensor, skip: Tensor | None, active: Tensor | None) -> None:
    taken = 1
    if active is not None:
        taken = active != 0
    if skip is not None:
        taken = taken * (skip == 0)
    steps += taken


@torch.no_grad()
def count_aligned_elements(
    tensors: LionTensors,
    grads: Sequence[Tensor],
    scalars: StepScalars,
    *,
    grad_scale: Tensor | None = None,
    backend: str = "cpu",
    check: bool = True,  # this and all others: as lion_update_'s
) -> Tensor:
    """[T] int64 on the device: the elements of each tensor whose update and gradient agree in sign
    (``reference.count_aligned``).

    It reads momentum and gradients once more than the update does, in one launch, and waits for nothing.
    """
    if check:
        tensors.check_grads(grads)
    return backend_of(backend).count_aligned(tensors, grads, scalars, grad_scale=grad_scale)
