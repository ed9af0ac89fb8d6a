"""What a user may choose, validated where it is chosen.

Two frozen dataclasses: :class:`PrecisionPolicy` says in which dtypes the state is kept and how it is rounded,
:class:`ShardingConfig` how gradients and parameters move between ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lion_dist import values

MAIN_PARAMS = ("auto", "fp32", "split", "none")
ROUNDINGS = ("nearest", "stochastic")
PARAM_SYNCS = ("gather", "coded")
LOW_PRECISION = (torch.bfloat16, torch.float16)
PARAM_DTYPES = (torch.float32, *LOW_PRECISION)


@dataclass(frozen=True)
class PrecisionPolicy:
    """In which dtypes the optimizer keeps its state, and how it rounds.

    Args:
        main_params: what the update reads and writes for a low-precision parameter. fp32 parameters are their own
            main params whatever is said here.

            * ``"fp32"``: a separate fp32 value (4 bytes per owned parameter).
            * ``"split"``: bf16 parameter + 16-bit remainder; the two halves *are* the fp32 value, so training is
              bit-equal to ``"fp32"`` at 2 bytes. bf16 only.
            * ``"none"``: the bf16 parameter alone, rounded stochastically so that neither the decay nor the update
              is lost in its 8 bits. bf16 only.
            * ``"auto"``: split for bf16, fp32 for fp16.
        momentum_dtype: ``torch.float32``, ``torch.bfloat16``, or None for the parameter's own (fp32 for fp16).
        momentum_rounding: how a bf16 momentum is rounded, ``"nearest"`` (ties to even) or ``"stochastic"``.
        seed: of the random bits of stochastic rounding; the same on every rank.
        ema_dtype: of the average of the weights (``ema_decay``): ``torch.float32``, or ``torch.bfloat16`` with
            stochastic rounding. None: fp32 with ``ema_decay``.
    """

    main_params: str = "auto"
    momentum_dtype: torch.dtype | None = None
    momentum_rounding: str = "nearest"
    seed: int = 0
    ema_dtype: torch.dtype | None = None

    def __post_init__(self):
        _set(
            self,
            main_params=values.choice("main_params", self.main_params, MAIN_PARAMS),
            momentum_rounding=values.choice("momentum_rounding", self.momentum_rounding, ROUNDINGS),
            momentum_dtype=values.dtype(
                "momentum_dtype",
                self.momentum_dtype,
                (torch.float32, torch.bfloat16),
                "fp16 lacks the range of a momentum; None is the parameter's own dtype.",
            ),
            ema_dtype=values.dtype(
                "ema_dtype", self.ema_dtype, (torch.float32, torch.bfloat16), "None is fp32 with ema_decay."
            ),
            seed=values.whole_number(
                "seed", self.seed, "an int in [0, 2**63)", least=0, below=2**63, remedy="Pass the same on every rank."
            ),
        )

    def main_params_for(self, param_dtype: torch.dtype) -> str:
        """``"own"`` (the parameter itself is fp32), ``"fp32"``, ``"split"`` or ``"none"`` for one parameter dtype."""
        if param_dtype == torch.float32:
            return "own"
        if self.main_params == "auto":
            return "split" if param_dtype == torch.bfloat16 else "fp32"
        if param_dtype == torch.float16 and self.main_params != "fp32":
            raise ValueError(
                f"main_params={self.main_params!r} is for bf16 parameters, but a parameter is torch.float16. "
                "Use main_params='fp32' (or 'auto'), or bf16 parameters."
            )
        return self.main_params

    def momentum_dtype_for(self, param_dtype: torch.dtype) -> torch.dtype:
        """The dtype of ``exp_avg`` for a parameter of ``param_dtype``."""
        if self.momentum_dtype is not None:
            return self.momentum_dtype
        return torch.bfloat16 if param_dtype == torch.bfloat16 else torch.float32

    def is_stochastic(self, param_dtype: torch.dtype) -> bool:
        """Whether updating a parameter of ``param_dtype`` draws random bits."""
        stochastic_momentum = (
            self.momentum_rounding == "stochastic" and self.momentum_dtype_for(param_dtype) == torch.bfloat16
        )
        stochastic_state = stochastic_momentum or self.ema_dtype == torch.bfloat16
        return stochastic_state or self.main_params_for(param_dtype) == "none"

    def state_dtypes(self, param_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """List the entries of the state of a parameter of ``param_dtype``."""
        dtypes = {"exp_avg": self.momentum_dtype_for(param_dtype)}
        kind = self.main_params_for(param_dtype)
        if kind in ("fp32", "split"):
            dtypes["main_param"] = torch.float32 if kind == "fp32" else torch.int16
        if self.ema_dtype is not None:
            dtypes["weight_avg"] = self.ema_dtype
        if self.is_stochastic(param_dtype):
            dtypes["step"] = torch.int64
        return dtypes


@dataclass(frozen=True)
class ShardingConfig:
    """How :class:`~lion_dist.ShardedLion` moves gradients and parameters.

    Args:
        zero_stage: 1 keeps full local gradients through ``no_sync()`` micro-batches; 2 reduces every micro-batch
            into the gradient shard, so that no full gradient is ever kept. Momentum is sharded in both.
        bucket_numel: elements per bucket (what is communicated together); None chooses from the model and ranks.
        reduce_dtype: dtype of gradients on the wire; None: the parameter's.
        ordered_sum: True sums gradients in fp32 in rank order (an all-to-all and a local sum), which makes the
            sum bit-identical in every run; False leaves the sum to the backend's reduce-scatter. None: True on gloo,
            whose own reduce-scatter sends an all-reduce's bytes and rounds bf16 at every hop; False on NCCL.
        average: True divides the summed gradient by the number of ranks; False leaves the sum.
        param_sync: how updated parameters reach the other ranks. ``"gather"`` sends them, 2 or 4 bytes each.
            ``"coded"`` sends how they moved, 0.2 to 0.4 bytes each, and every rank replays that: the same bits on
            every rank for a fifth of the traffic or less, and some arithmetic (docs/coded-param-sync.md).
        peer_memory: GPUs of one host copy parameters and gradients between each other's memory by copy engines, where
            NCCL's kernels would slow the computation beside them; gradients are summed in fp32 in rank order. None:
            where all ranks of the shard group can (NCCL elsewhere; a warning says why when one host's GPUs cannot).
            False: NCCL. True: an error where they cannot.
        update_in_backward: update each bucket as soon as its gradients are reduced, and gather it, inside backward;
            ``step()`` finishes what is left. There is no norm to clip by and no check to skip by: an element whose
            gradient is not finite stays. A parameter that nobody used counts as one with a zero gradient. All backward
            passes of a step but the last go inside ``no_sync()``.
        wait_in_backward: True: when the gradients of a few buckets are under way, backward waits for the first of them
            to be reduced, which bounds memory to those. False: it never waits, and gradients of all buckets may be in
            memory at once. So it must be where ranks would wait for each other: where some ranks take another branch,
            in a model that has collectives of its own inside backward (a loss that compares with other ranks'
            examples), or in one of several models with a ShardedLion each in one backward pass.
        overlap_param_sync: True: given ``module``, parameters arrive during the next forward. False: ``step()`` returns
            with all of them whole, for code that holds references to them (a log of their norms, an average).
        check_replicas_every: in every n-th step, compare checksums of all ranks' parameters, without waiting; a
            difference is raised by the next step (``ShardedLion.check_replicas``). 0: never.
    """

    zero_stage: int = 2
    bucket_numel: int | None = None
    reduce_dtype: torch.dtype | None = None
    ordered_sum: bool | None = None
    average: bool = True
    param_sync: str = "gather"
    peer_memory: bool | None = None
    update_in_backward: bool = False
    wait_in_backward: bool = True
    overlap_param_sync: bool = True
    check_replicas_every: int = 0

    def __post_init__(self):
        remedy = "Use 2, or 1 where no_sync() is to send nothing."
        stage = values.whole_number("zero_stage", self.zero_stage, "1 or 2", least=1, below=4, remedy=remedy)
        if stage == 3:
            raise ValueError(
                "zero_stage=3 (sharded parameters) is not ShardedLion's: wrap the model with "
                "torch.distributed.fsdp.fully_shard and use lion_dist.Lion(model.parameters()) over its shards."
            )
        _set(
            self,
            zero_stage=stage,
            param_sync=values.choice("param_sync", self.param_sync, PARAM_SYNCS),
            reduce_dtype=values.dtype(
                "reduce_dtype", self.reduce_dtype, (torch.float32, torch.bfloat16), "None is the parameter's own dtype."
            ),
            average=values.flag("average", self.average),
            ordered_sum=values.flag("ordered_sum", self.ordered_sum, optional=True),
            peer_memory=values.flag("peer_memory", self.peer_memory, optional=True),
            update_in_backward=values.flag("update_in_backward", self.update_in_backward),
            wait_in_backward=values.flag("wait_in_backward", self.wait_in_backward),
            overlap_param_sync=values.flag("overlap_param_sync", self.overlap_param_sync),
            check_replicas_every=check_interval("check_replicas_every", self.check_replicas_every),
        )
        if self.bucket_numel is not None:
            expected, remedy = "at least 1 element", "Pass a whole number such as 16_000_000, or None."
            found = values.whole_number("bucket_numel", self.bucket_numel, expected, least=1, remedy=remedy)
            _set(self, bucket_numel=found)
        if self.update_in_backward and (self.param_sync != "gather" or self.check_replicas_every):
            raise ValueError(
                "update_in_backward=True leaves no moment at which all parameters are old or all are new, which "
                f"param_sync={self.param_sync!r} and check_replicas_every={self.check_replicas_every} need. "
                'Use param_sync="gather" and check_replicas_every=0, or update_in_backward=False.'
            )


def _set(config, **fields) -> None:
    """Keep checked values in a frozen config as Python's own, whose repr is the same on every rank."""
    for name, value in fields.items():
        object.__setattr__(config, name, value)


def check_interval(name: str, every: int) -> int:
    """``every`` as an int; ValueError unless it is a number of steps, or 0 for never."""
    expected = "a whole number of steps, or 0 for never"
    return values.whole_number(name, every, expected, least=0, remedy="Pass one without a decimal point.")


def check_policy(precision: object) -> PrecisionPolicy:
    """TypeError unless ``precision`` is a PrecisionPolicy."""
    remedy = 'Pass lion_dist.PrecisionPolicy(main_params="fp32"), for example.'
    return values.instance("precision", precision, PrecisionPolicy, remedy)


def check_sharding(sharding: object) -> ShardingConfig:
    """TypeError unless ``sharding`` is a ShardingConfig."""
    remedy = "Pass lion_dist.ShardingConfig(zero_stage=2), for example."
    return values.instance("sharding", sharding, ShardingConfig, remedy)
