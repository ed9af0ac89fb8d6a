"""Hugging Face Accelerate around a :class:`~lion_dist.ShardedLion`.

    accelerator = ShardedAccelerator(gradient_accumulation_steps=4)
    model.to(accelerator.device)
    optimizer = ShardedLion(model.parameters(), lr=1e-4, module=model)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

Accelerate puts a model into DistributedDataParallel, clips ``p.grad``, and saves ``state_dict()`` of one rank. Here the
model stays bare, because the optimizer reduces its gradients; clipping and norms are the optimizer's; and the whole
optimizer state is gathered on rank 0 for ``save_state``. A model that no ShardedLion trains is treated as ever.

The saved state is the consolidated one, not a directory of ``lion_dist.checkpoint``: Accelerate's files keep their
names and number, they load on any number of ranks, and a run of DistributedDataParallel with ``Lion`` can go on from
them, and the other way round. It costs rank 0 the momentum in host memory, where it holds the model anyway.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DDPCommunicationHookType, DistributedType
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lion_dist.grad_scaler import GradScaler
from lion_dist.sharded_lion import ShardedLion

REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class AcceleratedShardedLion(AcceleratedOptimizer):
    """What ``ShardedAccelerator.prepare`` returns for a ShardedLion, which is its ``.optimizer``."""

    def __init__(self, optimizer: ShardedLion, scaler: GradScaler | None):
        super().__init__(optimizer, device_placement=False, scaler=scaler)  # its state already lies where it belongs
        self._skipped_before: Tensor | None = None

    def step(self, closure=None) -> None:
        if self.scaler is not None and self.gradient_state.sync_gradients:
            self._skipped_before = self.optimizer.counters[1].clone()
        super().step(closure)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step's gradients overflowed, so that schedulers stay where they are.

        Accelerate looks at whether ``step`` was called, and it always is: a ShardedLion decides on the device. Waits
        for the device, and is asked only under a loss scaler, as Accelerate's own waits.
        """
        return self._skipped_before is not None and bool(self.optimizer.counters[1] > self._skipped_before)


class ShardedAccelerator(Accelerator):
    """``accelerate.Accelerator`` that trains models with ShardedLion; it takes the same arguments.

    Refused by name, when ``prepare`` is called or at the call itself: FSDP, DeepSpeed, Megatron-LM and tensor or
    context parallel (use ``lion_dist.Lion``), ``comm_hook``, ``clip_grad_value_``, norms other than 2 or of a part of
    the parameters, ``join_uneven_inputs``, ``save_on_each_node``.

    Attributes:
        sharded_lions: those that ``prepare`` has been given.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._become_sharded()

    @classmethod
    def adopt(cls, accelerator: Accelerator) -> ShardedAccelerator:
        """Turn an Accelerator that somebody else has made, such as the Trainer, into one of these, in place.

        Raises:
            TypeError: it is of a subclass, whose methods would be lost.
        """
        if type(accelerator) is not Accelerator:
            raise TypeError(
                f"the accelerator is a {type(accelerator).__name__}, of which nothing is known here. Derive it from "
                "lion_dist.integrations.accelerate.ShardedAccelerator."
            )
        accelerator.__class__ = cls
        accelerator._become_sharded()
        return cast(ShardedAccelerator, accelerator)

    def _become_sharded(self) -> None:
        self.sharded_lions: list[ShardedLion] = []
        if self.scaler is not None:
            found, self.scaler = self.scaler, GradScaler(self.device.type, enabled=self.scaler.is_enabled())
            self.scaler.load_state_dict(found.state_dict())  # its settings

    # ---- preparing

    def prepare(self, *args, device_placement: list[bool] | None = None):
        for given in args:
            optimizer = _unwrapped(given)
            if isinstance(optimizer, ShardedLion):
                self._take(optimizer)
        return super().prepare(*args, device_placement=device_placement)

    def _take(self, optimizer: ShardedLion) -> None:
        if any(optimizer is known for known in self.sharded_lions):
            return
        self._refuse_engines()
        _check_placement(optimizer, self.device, self.num_processes)
        self.sharded_lions.append(optimizer)

    def _refuse_engines(self) -> None:
        if self.distributed_type not in REPLICATED:
            raise ValueError(
                f"ShardedLion needs a replicated model, and this Accelerator runs {self.distributed_type.value}. Take "
                "that configuration out, or use lion_dist.Lion, which works with FSDP and DeepSpeed."
            )
        parallel = self.parallelism_config
        if parallel is not None and (set(parallel.active_mesh_dims) - {"dp_replicate"}):
            raise ValueError(
                f"parallelism_config divides the model over {parallel.active_mesh_dims}; ShardedLion needs a "
                "replicated one. Leave it out, or use lion_dist.Lion with FSDP2."
            )
        hook = DDPCommunicationHookType.NO if self.ddp_handler is None else self.ddp_handler.comm_hook
        if hook != DDPCommunicationHookType.NO:
            raise ValueError(
                f"comm_hook={DDPCommunicationHookType(hook).value} belongs to DistributedDataParallel, which "
                "ShardedLion replaces. Leave it out; ShardingConfig(reduce_dtype=torch.bfloat16) sends bf16."
            )
        if self.project_configuration.save_on_each_node:
            raise ValueError(
                "save_on_each_node=True would save optimizer state on ranks that hold a part of it. Save to a folder "
                "that all nodes share, or let rank 0 copy it."
            )

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False):
        """As Accelerate's, without DistributedDataParallel where a ShardedLion trains the model."""
        owners = self._owners(model.parameters())
        if owners and not evaluation_mode:
            _refuse_untrained(model, owners)
        if owners:  # it has been placed; nothing but autocast and torch.compile is left to do
            device_placement, evaluation_mode = False, True
        return super().prepare_model(model, device_placement, evaluation_mode)

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None):
        if not isinstance(optimizer, ShardedLion):
            return super().prepare_optimizer(optimizer, device_placement)
        self._take(optimizer)
        wrapper = optimizer.guards.find_wrapper()
        if wrapper is not None:
            raise TypeError(
                f"the model has been wrapped in {wrapper}, before its ShardedLion was known. Pass both to one call: "
                "accelerator.prepare(model, optimizer, ...)."
            )
        prepared = AcceleratedShardedLion(optimizer, self.scaler)
        self._optimizers.append(prepared)
        return prepared

    def free_memory(self, *objects):
        self.sharded_lions.clear()
        return super().free_memory(*objects)

    def _owners(self, params: Iterable[Parameter]) -> list[ShardedLion]:
        """The optimizers that train one of ``params``."""
        params = set(params)
        return [optimizer for optimizer in self.sharded_lions if not params.isdisjoint(_params_of(optimizer))]

    # ---- gradients

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Gradients of backward passes inside stay on their rank (ZeRO stage 1; stage 2 reduces them all the same)."""
        owners = self._owners(model.parameters())
        with contextlib.ExitStack() as stack:
            if not owners:
                stack.enter_context(super().no_sync(model))
            for optimizer in owners:
                stack.enter_context(optimizer.no_sync())
            yield

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """Clip the global norm of ``parameters`` over all ranks, and return it; infinite ``max_norm``: clip nothing.

        Raises:
            ValueError: another norm, or the norm of other parameters than all that one ShardedLion trains.
            RuntimeError: in a micro-batch whose gradients have not been summed over ranks.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        owners = self._owners(parameters)
        if not owners:
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        _check_norm(owners, parameters, norm_type)
        if not self.sync_gradients:
            raise RuntimeError(
                "clip_grad_norm_() in a micro-batch that is not the last of its step: gradients have not been summed "
                "over ranks. Write `if accelerator.sync_gradients:` before it."
            )
        (optimizer,) = owners
        self.unscale_gradients(optimizer)
        return optimizer.grad_norm() if math.isinf(max_norm) else optimizer.clip_grad_norm_(max_norm)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if self._owners(parameters):
            raise ValueError(
                "clip_grad_value_() would find no gradients: ShardedLion keeps them in shards. Use clip_grad_norm_(); "
                "Lion takes the sign of its update, so single large values matter little."
            )
        super().clip_grad_value_(parameters, clip_value)

    def join_uneven_inputs(self, joinables, even_batches: bool | None = None):
        if self.sharded_lions:
            raise ValueError(
                "join_uneven_inputs() knows DistributedDataParallel only. Leave it out: the prepared loader gives "
                "every rank as many batches (even_batches=True), or call backward_without_batch() of ShardedLion where "
                "a rank has none."
            )
        return super().join_uneven_inputs(joinables, even_batches)

    # ---- saving

    def consolidate(self) -> None:
        """Let rank 0 hold the whole state of every ShardedLion until the next step. All ranks call it together."""
        for optimizer in self.sharded_lions:
            optimizer.broadcast_buffers()
            optimizer.consolidate_state_dict(to=0)

    def save_state(self, output_dir: str | None = None, *args, **kwargs) -> Any:
        """As Accelerate's; what it writes loads on any number of ranks. All ranks call it together."""
        self.consolidate()
        return super().save_state(output_dir, *args, **kwargs)

    def load_state(self, input_dir: str | None = None, *args, **kwargs) -> None:
        """As Accelerate's; the whole optimizer state goes through host memory, from which each rank takes its part."""
        for optimizer in self.sharded_lions:
            optimizer.finish_param_sync()
            kwargs.setdefault("map_location", "cpu")
        super().load_state(input_dir, *args, **kwargs)


def _unwrapped(optimizer: object) -> object:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _params_of(optimizer: ShardedLion) -> set[Parameter]:
    return {param for group in optimizer.param_groups for param in group["params"]}


def _check_placement(optimizer: ShardedLion, device: torch.device, num_processes: int) -> None:
    """Raise ValueError when ``optimizer`` was made for another device or for other ranks than the Accelerator's."""
    module = optimizer._params.module
    if module is None:
        raise ValueError(
            "ShardedLion was made without its model, so nobody makes replicas equal, as DistributedDataParallel would. "
            "Construct it with module=model."
        )
    if optimizer.groups.num_ranks != num_processes:
        if num_processes == 1 and device.type == "cpu":  # Accelerate joins the ranks, and then runs alone
            raise ValueError(
                f"ShardedLion trains over {optimizer.groups.num_ranks} ranks and the Accelerator runs alone: without "
                "GPUs it asks to be told. Pass cpu=True to ShardedAccelerator, use_cpu=True to TrainingArguments."
            )
        raise ValueError(
            f"ShardedLion trains over {optimizer.groups.num_ranks} ranks and the Accelerator gives batches to "
            f"{num_processes}. Make the Accelerator first, which starts the process group, and leave process_group to "
            "its default or to a mesh of all ranks."
        )
    for name, param in module.named_parameters():
        if param.device.type != device.type or (device.type != "cpu" and param.device.index != device.index):
            raise ValueError(
                f"parameter {name!r} is on {param.device} and the Accelerator would move it to {device}, away from "
                "ShardedLion's buffers. Call model.to(accelerator.device) before ShardedLion is constructed."
            )


def _refuse_untrained(model: nn.Module, owners: list[ShardedLion]) -> None:
    known = set().union(*map(_params_of, owners))
    for name, param in model.named_parameters():
        if param.requires_grad and param not in known:
            raise ValueError(
                f"parameter {name!r} requires a gradient and no ShardedLion trains it, so nobody would sum its "
                "gradients over ranks. Pass it to ShardedLion, or call requires_grad_(False) on it."
            )


def _check_norm(owners: list[ShardedLion], params: list[Parameter], norm_type: float) -> None:
    if norm_type != 2:
        raise ValueError(f"clip_grad_norm_() of ShardedLion takes norm_type=2, got {norm_type}")
    given = {param for param in params if param.requires_grad}
    if len(owners) > 1 or given != {param for param in _params_of(owners[0]) if param.requires_grad}:
        raise ValueError(
            f"clip_grad_norm_() of {len(given)} parameters, which are not those that one ShardedLion trains: its norm "
            "is that of all. Pass model.parameters(), and one model at a time."
        )
