"""DeepSpeed: ``"optimizer": {"type": "Lion"}`` means this Lion.

Three ways, from the least to the most that they touch:

* your code calls ``deepspeed.initialize``: pass ``optimizer=lion_optimizer(config)``. DeepSpeed is told, through its
  public list ``ZERO_SUPPORTED_OPTIMIZERS``, that ZeRO may use the class, and nothing else changes;
* somebody else calls it (HF Trainer, Accelerate, Lightning): call :func:`register` first. It replaces the two classes
  that DeepSpeed looks up for the name, until :func:`unregister`;
* no change of code: ``torchrun ... -m lion_dist.integrations.deepspeed train.py ARGS``, or
  ``deepspeed --module lion_dist.integrations.deepspeed train.py ARGS``, registers and runs the script.

What ZeRO does to an optimizer, and why :class:`DeepSpeedLion` is not plain ``Lion``: it replaces the parameters by flat
fp32 partitions after construction (one a group; in stage 3 one a sub-group, with the others' absent from the groups);
it links, saves and restores entries of ``state`` directly, also before the first step, and in fp32; and its elastic
and universal checkpoints ask for keys that Lion does not have.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import runpy
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lion_dist import values
from lion_dist.integrations.deepspeed_config import PRECISION_KEYS, read_optimizer_section, read_params
from lion_dist.lion import Lion

logger = logging.getLogger(__name__)

OLDEST_DEEPSPEED, FIRST_UNTESTED_DEEPSPEED = "0.19.8", "0.20"


# ---- the optimizer


class DeepSpeedLion(Lion):
    """``Lion`` over DeepSpeed's partitions, made from the ``"params"`` of the JSON (see :func:`read_params`).

    The state of a partition is ``exp_avg`` (its shape, fp32 or bf16 as configured) and, with stochastic rounding,
    ``step``. Checkpoints carry two more entries for DeepSpeed's universal conversion; see :meth:`state_dict`.
    """

    def __init__(self, params: Iterable, **json_params):
        self._own_state: dict[Tensor, dict[str, Tensor]] = {}  # as made here, to notice what DeepSpeed replaced
        super().__init__(params, **read_params(json_params))
        self.defaults["step"] = 0  # load_state_dict fills it in where a file has none
        self.state = _StateOnDemand(self._fresh_state)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("step", 0)  # DeepSpeed's elastic checkpoints ask for it; FusedLion's is 0 too

    def __setstate__(self, state: dict) -> None:
        self.__dict__.setdefault("_own_state", {})
        super().__setstate__(state)
        self.state = _StateOnDemand(self._fresh_state, self.state)

    def _fresh_state(self, param: Tensor) -> dict[str, Tensor]:
        state = super()._fresh_state(param)
        self._own_state[param] = dict(state)
        return state

    def _batches_of(self, group: dict):
        # Here rather than around step(): a step() that calls another hooked one runs every step hook twice.
        for param in group["params"]:
            if param.grad is not None:
                self._adopt_restored_state(param)
        batches = super()._batches_of(group)
        for batch, _ in batches:
            if "step" in batch.states[0]:  # counts that may have become views of one tensor: still our own
                self._own_state.update(zip(batch.params, map(dict, batch.states), strict=True))
        return batches

    def _adopt_restored_state(self, param: Tensor) -> None:
        """Take over entries that a loader put in the place of ours: fp32 copies, an exp_avg_sq, a step as an int."""
        state, own = self.state[param], self._own_state.get(param)
        if own is not None and state.keys() == own.keys() and all(state[key] is own[key] for key in own):
            return
        if "exp_avg" in state:  # without adopt_state's warning: universal loading makes everything fp32
            state["exp_avg"] = state["exp_avg"].to(self.precision.momentum_dtype_for(param.dtype))
        self.state[param] = self.adopt_state(param, state)
        self._batches.forget()  # they hold the tensors that were replaced

    def state_dict(self) -> dict:
        """As ``Lion``'s, and for every partition the entries that ``ds_to_universal`` insists on.

        ``exp_avg_sq`` is one zero expanded to the partition's shape (no bytes to speak of in memory or on disk), and
        ``step`` is 0 where nothing counts steps. Loading leaves both behind.
        """
        for param in [param for group in self.param_groups for param in group["params"]]:
            if param in self.state:
                self._adopt_restored_state(param)
        saved = super().state_dict()
        for key, state in saved["state"].items():
            exp_avg = state["exp_avg"]
            saved["state"][key] = {"step": 0, **state, "exp_avg_sq": exp_avg.new_zeros(1).expand(exp_avg.shape)}
        return saved

    def load_state_dict(self, state_dict: dict) -> None:
        """Of this class, of DeepSpeed's FusedLion or DeepSpeedCPULion; the file's hyperparameters win, as in torch."""
        configured = [group["betas"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, betas in zip(self.param_groups, configured, strict=True):
            if tuple(group["betas"]) != tuple(betas):
                warnings.warn(
                    f"the checkpoint's betas {tuple(group['betas'])} replace the configured {tuple(betas)}. To train "
                    "on with those, set them in engine.optimizer.param_groups after load_checkpoint.",
                    stacklevel=2,
                )


class _StateOnDemand(defaultdict):
    """``state[param]`` makes the state of ``param``.

    DeepSpeed links ``state`` to its parameters after the first group has stepped, before the others have, and its
    elastic loader copies into what is there but makes fp32 tensors of what is not.
    """

    def __init__(self, fresh_state: Callable[[Tensor], dict], *items):
        super().__init__(None, *items)
        self._make = fresh_state

    def __missing__(self, param: Tensor) -> dict:
        state = self[param] = self._make(param)
        return state


# ---- your code calls deepspeed.initialize


def lion_optimizer(config: Mapping | str | os.PathLike) -> Callable[[Iterable], DeepSpeedLion]:
    """For ``deepspeed.initialize(optimizer=lion_optimizer(config), config=config)``; ``config``: a dict or a JSON file.

    The ``"optimizer"`` section may stay in the config: DeepSpeed prefers the callable. Appends :class:`DeepSpeedLion`
    to DeepSpeed's public list ``ZERO_SUPPORTED_OPTIMIZERS``, so ``zero_allow_untested_optimizer`` is not needed.

    Raises:
        ValueError: the config names another optimizer, has parameters that Lion has not, or offloads the optimizer
            to NVMe or without ``"zero_force_ds_cpu_optimizer": false``.
    """
    config = config if isinstance(config, Mapping) else _read_json(config)
    params = read_optimizer_section(config)
    read_params(params)  # now, where the config is, rather than inside initialize
    _allow_in_zero()

    def make(model_parameters: Iterable) -> DeepSpeedLion:
        return DeepSpeedLion(model_parameters, **params)

    return make


def _read_json(config: str | os.PathLike) -> Mapping:
    remedy = "Pass a dict, or the path of a DeepSpeed config."
    try:
        found = json.loads(values.path("config", config).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config: {config} is not JSON ({error}). {remedy}") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"config: {config} must hold an object, got {values.shown(found)}. {remedy}")
    return found


def check_version() -> None:
    """Raise ImportError unless a DeepSpeed is installed whose inner workings are known here."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("DeepSpeed is not installed. pip install 'lion-dist[deepspeed]'")
    from deepspeed import __version__ as found
    from packaging.version import Version

    if not Version(OLDEST_DEEPSPEED) <= Version(found) < Version(FIRST_UNTESTED_DEEPSPEED):
        raise ImportError(
            f"DeepSpeed {found} is installed; lion_dist works with {OLDEST_DEEPSPEED} <= version < "
            f"{FIRST_UNTESTED_DEEPSPEED}. pip install 'deepspeed>={OLDEST_DEEPSPEED},<{FIRST_UNTESTED_DEEPSPEED}'"
        )


def _allow_in_zero() -> None:
    check_version()
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if DeepSpeedLion not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(DeepSpeedLion)


# ---- somebody else calls deepspeed.initialize

_replaced: list[tuple[object, str, object]] = []  # (module, attribute, what was there)


def register() -> None:
    """From now on ``"type": "Lion"`` is :class:`DeepSpeedLion`, with and without offload. Again: does nothing.

    Replaces ``deepspeed.ops.lion.FusedLion`` and ``DeepSpeedCPULion``. Where Accelerate is installed, also its
    ``map_pytorch_optim_to_deepspeed``, which hands any optimizer but bitsandbytes' Lion over to DeepSpeedCPUAdam under
    offload: a ``Lion`` that a user gave to ``accelerator.prepare`` stays one. :func:`unregister` puts all back.
    """
    if _replaced:
        return
    check_version()
    import deepspeed.ops.lion

    replacements = [
        (deepspeed.ops.lion, "FusedLion", DeepSpeedLion),
        (deepspeed.ops.lion, "DeepSpeedCPULion", DeepSpeedLion),
    ]
    if importlib.util.find_spec("accelerate") is not None:
        import accelerate.accelerator

        if not hasattr(accelerate.accelerator, "map_pytorch_optim_to_deepspeed"):
            raise ImportError(
                f"Accelerate {accelerate.__version__} is installed, which has no map_pytorch_optim_to_deepspeed: under "
                "offload it would make a DeepSpeedCPUAdam of Lion. Install another version, or none."
            )
        replacements.append(
            (accelerate.accelerator, "map_pytorch_optim_to_deepspeed", _keep_lion(accelerate.accelerator))
        )
    originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]  # before any is replaced
    _allow_in_zero()
    _replaced.extend(originals)
    for module, name, value in replacements:
        setattr(module, name, value)
        _log(f"replaced {module.__name__}.{name} by {value.__module__}.{value.__qualname__}")


def unregister() -> None:
    """Undo :func:`register`; engines that were initialized in between keep their optimizer."""
    while _replaced:
        module, attribute, original = _replaced.pop()
        setattr(module, attribute, original)
        _log(f"put back {module.__name__}.{attribute}")
    zero_utils = sys.modules.get("deepspeed.runtime.zero.utils")
    if zero_utils is not None and DeepSpeedLion in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.remove(DeepSpeedLion)


def _log(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.info("lion_dist: %s", text)


def _keep_lion(accelerator_module) -> Callable:
    """Accelerate's ``map_pytorch_optim_to_deepspeed``, except that a ``Lion`` becomes a :class:`DeepSpeedLion`."""
    original = accelerator_module.map_pytorch_optim_to_deepspeed

    def map_lion_to_deepspeed(optimizer):
        if not isinstance(optimizer, Lion):
            return original(optimizer)
        if isinstance(optimizer, DeepSpeedLion):
            return optimizer
        return DeepSpeedLion(
            optimizer.param_groups,
            **optimizer.defaults,
            decoupled_weight_decay=optimizer._decoupled_from is not None,
            use_triton=optimizer.use_triton,
            **{key: getattr(optimizer.precision, key) for key in PRECISION_KEYS},
            cautious_wd=optimizer.rule.cautious_wd,
            corrected_weight_decay=optimizer.rule.corrected_weight_decay,
            maximize=optimizer.rule.maximize,
            # These are refused, with the reason.
            **({"cautious": True} if optimizer.rule.is_cautious else {}),
            **({"skip_spikes": True} if optimizer.skip_spikes is not None else {}),
            **({"ema_decay": True} if optimizer.rule.ema_decay is not None else {}),
        )

    return map_lion_to_deepspeed


# ---- no change of code


def main(arguments: list[str]) -> None:
    """Register, then run ``SCRIPT ARGS`` (or ``-m MODULE ARGS``) as if python had been called with it."""
    logging.basicConfig(level=logging.INFO)
    launcher_flags = []  # the deepspeed launcher puts --local_rank=N first; it is the script's
    while arguments and arguments[0].startswith("--local"):
        launcher_flags.append(arguments.pop(0))
    is_module = arguments[:1] == ["-m"]
    if len(arguments) <= is_module:
        sys.exit("usage: python -m lion_dist.integrations.deepspeed SCRIPT.py ARGS, or -m MODULE ARGS")
    register()
    target, *rest = arguments[is_module:]
    sys.argv = [target, *launcher_flags, *rest]
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(target).resolve().parent)  # as python itself does
        runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    # By its own name: classes of a module that runs as __main__ would be others than those its importers see.
    from lion_dist.integrations.deepspeed import main as run  # pyrefly: ignore[missing-module-attribute]

    run(sys.argv[1:])
