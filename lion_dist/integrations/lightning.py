"""``ShardedLion`` under Lightning: ``Trainer(strategy=ShardedLionStrategy())``.

``configure_optimizers`` returns ``ShardedLion(self.parameters(), module=self)``. The strategy is Lightning's DDP
without the wrapper: launchers, samplers, metrics and checkpoints are its own. What it does differently:

* gradients are reduced by the optimizer; micro-batches of ``accumulate_grad_batches`` run in its ``no_sync()``;
* ``gradient_clip_val`` clips by the norm over all ranks, and ``gradient_clip_algorithm="value"`` is refused;
* ``precision="16-mixed"`` scales by :class:`lion_dist.GradScaler`;
* a checkpoint has the whole state of the optimizer, and every rank takes its part: any number of ranks can resume.

:class:`GradNorm` shows the norm, for Lightning's own ``grad_norm`` finds no ``.grad``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from lion_dist import GradScaler, ShardedLion

__all__ = ["GradNorm", "ShardedLionStrategy"]


class ShardedLionStrategy(DDPStrategy):
    """Train with one or several :class:`lion_dist.ShardedLion`; no parameter is wrapped.

    Args:
        process_group_backend, timeout, start_method, and the rest: as of Lightning's ``DDPStrategy``. DDP's settings
            (``find_unused_parameters``, ``static_graph``, communication hooks) have no meaning here and are not taken.
    """

    strategy_name = "sharded_lion"

    def __init__(
        self,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment=None,
        checkpoint_io=None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "popen",
    ):
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            process_group_backend=process_group_backend,
            start_method=start_method,
            **({} if timeout is None else {"timeout": timeout}),
        )

    # ---- setting up

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Make the optimizers, by ``configure_optimizers``.

        Raises:
            TypeError: one of them is no ShardedLion: nobody would reduce its gradients.
        """
        for optimizer in self._sharded():  # of an earlier fit(), over the same parameters
            optimizer.close()
        self.optimizers = []
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, ShardedLion):
                raise TypeError(
                    f"ShardedLionStrategy expects every optimizer of configure_optimizers to be a ShardedLion, got "
                    f"{type(optimizer).__name__}: nobody would reduce its gradients. Return "
                    'ShardedLion(self.parameters(), module=self), or use strategy="ddp".'
                )

    def setup_precision_plugin(self) -> None:
        """Let gradients be clipped and scaled by those who find them."""
        super().setup_precision_plugin()
        plugin = self.precision_plugin
        plugin.clip_gradients = self._clip_gradients
        if self._scaler is not None:
            plugin.scaler = _scaler_like(self._scaler, plugin.device)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        plugin = self.precision_plugin
        return plugin.scaler if isinstance(plugin, MixedPrecision) else None

    def _sharded(self) -> list[ShardedLion]:
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, ShardedLion)]

    def teardown(self) -> None:
        """Leave the parameters whole. The state stays where it is: it is part of the optimizer's buffers."""
        for optimizer in self._sharded():
            optimizer.finish_param_sync()
        optimizers, self.optimizers = self.optimizers, []
        super().teardown()
        self.optimizers = optimizers

    # ---- a step

    def training_step(self, *args: Any, **kwargs: Any):
        """Call ``training_step`` as the module's forward where the module has none of its own.

        Then each of its modules waits for its own parameters only. A module with a forward is called by its
        ``training_step``, which comes to the same.
        """
        module = self.lightning_module
        if type(module).forward is not pl.LightningModule.forward:
            return super().training_step(*args, **kwargs)
        with self.precision_plugin.train_step_context():
            return self._forward_redirection(module, module, "training_step", *args, **kwargs)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around a micro-batch that is not the last of its step."""
        with contextlib.ExitStack() as stack:
            for optimizer in self._sharded():
                stack.enter_context(optimizer.no_sync())
            yield

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: pl.LightningModule | None = None, **kwargs: Any
    ) -> Any:
        """Unscale gradients as soon as they are there, so that whatever looks at them sees their true size."""
        module = model or self.lightning_module
        scaler = self._scaler

        def with_unscaling() -> Any:
            result = closure()
            if scaler is not None and not (result is None and module.automatic_optimization):
                scaler.unscale_(optimizer)
            return result

        return super().optimizer_step(optimizer, with_unscaling, model, **kwargs)

    def _clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if not clip_val or clip_val <= 0:
            return
        if gradient_clip_algorithm != GradClipAlgorithmType.NORM:
            raise ValueError(
                'gradient_clip_algorithm="value" needs whole gradients, and ShardedLion keeps them in shards. Use '
                'gradient_clip_algorithm="norm".'
            )
        if self._scaler is not None and not self.lightning_module.automatic_optimization:
            raise ValueError(
                "clip_gradients() in manual optimization comes before the gradients are unscaled. Use "
                'precision="bf16-mixed", which scales nothing, or automatic optimization.'
            )
        getattr(optimizer, "_optimizer", optimizer).clip_grad_norm_(clip_val)

    # ---- checkpoints: ``Strategy.optimizer_state`` gathers the whole state on rank 0, which writes it

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Every rank takes its part of the whole state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)


def _scaler_like(scaler: torch.amp.GradScaler, device: str) -> GradScaler:
    """A scaler of lion_dist with the settings of ``scaler``.

    Raises:
        TypeError: it is of a class of somebody else's.
    """
    if isinstance(scaler, GradScaler):
        return scaler
    if type(scaler) not in (torch.amp.GradScaler, torch.cuda.amp.GradScaler):
        raise TypeError(
            f"the precision plugin has a {type(scaler).__name__}, which finds no gradients of ShardedLion. Pass "
            'MixedPrecision("16-mixed", device, scaler=lion_dist.GradScaler(...)).'
        )
    ours = GradScaler(device, enabled=scaler.is_enabled())
    ours.load_state_dict(scaler.state_dict())
    return ours


class GradNorm(pl.Callback):
    """Log the norm of the gradients over all ranks before clipping, by default in the progress bar.

    Args:
        name: under which it is logged; of the second optimizer ``name`` with ``_1``, and so on.
    """

    def __init__(self, name: str = "grad_norm", prog_bar: bool = True):
        self.name, self.prog_bar = name, prog_bar

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Log ``optimizer.grad_norm()``; it stays on the device."""
        number = [id(known) for known in trainer.optimizers].index(id(optimizer))
        name = self.name if number == 0 else f"{self.name}_{number}"
        pl_module.log(name, optimizer.grad_norm(), prog_bar=self.prog_bar)
