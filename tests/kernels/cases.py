"""Cases for the kernels: every combination of storage, tensors full of trouble, and what the reference makes of them.

A new kind of storage is one line in ``STORAGES``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lion_dist.kernels.reference import (
    StepScalars,
    cautious_lrs,
    count_aligned,
    lion_step,
    random_bits,
    split_main,
    update_average,
)
from lion_dist.kernels.update import LionTensors

FP32, BF16, FP16, INT16 = torch.float32, torch.bfloat16, torch.float16, torch.int16
GRAD_DTYPES = (FP32, BF16, FP16)


@dataclass(frozen=True)
class Storage:
    param: torch.dtype
    main: torch.dtype | None
    exp_avg: torch.dtype
    stochastic_momentum: bool = False
    average: torch.dtype | None = None

    def __str__(self):
        names = [str(dtype).removeprefix("torch.") for dtype in (self.param, self.main, self.exp_avg)]
        averaged = "" if self.average is None else f"-{self.average} average".replace("torch.", "")
        return "-".join(names) + ("-stochastic" if self.stochastic_momentum else "") + averaged

    @property
    def is_stochastic(self) -> bool:
        return self.stochastic_momentum or (self.param == BF16 and self.main is None) or self.average == BF16


STORAGES = [
    Storage(param, main, exp_avg, stochastic_momentum)
    for param, main in [(FP32, None), (BF16, FP32), (FP16, FP32), (BF16, INT16), (BF16, None)]
    for exp_avg, stochastic_momentum in [(FP32, False), (BF16, False), (BF16, True)]
]

AVERAGED = [replace(storage, average=dtype) for storage in STORAGES for dtype in (FP32, BF16)]

# Zeros, denormals, ties of rounding, the edges of bf16 and fp16, largest finite, infinities, NaN. The last two
# are NaNs of which integer rounding without care makes a zero; the first of them is what a GPU's arithmetic returns.
TROUBLE = torch.tensor(
    [
        *(0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, -2e-38, 1.00390625, 1.01171875, -1.00390625, 65504.0, 65520.0),
        *(3.3895314e38, 3.4028235e38, -3.4028235e38, float("inf"), -float("inf"), float("nan")),
    ]
)
TROUBLE = torch.cat([TROUBLE, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])


def troubled(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[numel], normal numbers of which a third are replaced by trouble."""
    normal = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-3, 3, (numel,), generator=generator)
    trouble = TROUBLE[torch.randint(len(TROUBLE), (numel,), generator=generator)]
    return torch.where(torch.rand(numel, generator=generator) < 1 / 3, trouble, normal).to(dtype)


@dataclass(frozen=True)
class Case:
    """The arguments of one ``lion_update_``. Mains of split storage are what ``split_main`` makes, as in training, but
    for parameters that were set to zero since."""

    storage: Storage
    params: list[Tensor]
    mains: list[Tensor] | None
    exp_avgs: list[Tensor]
    grads: list[Tensor]
    index_starts: list[int]
    steps: Tensor
    scalars: StepScalars = StepScalars.from_group(1e-3, (0.9, 0.99), 0.1)
    grad_scale: Tensor | None = None
    skip: Tensor | None = None
    active: Tensor | None = None
    seed: int = 0
    cautious_lrs: Tensor | None = None
    cautious_wd: bool = False
    averages: list[Tensor] | None = None
    ema_decay: float | None = None

    @classmethod
    def make(cls, storage, grad_dtype, numels, *, data_seed=0, index_start=0, step=0, **arguments) -> Case:
        generator = torch.Generator().manual_seed(data_seed)
        columns = {
            name: [troubled(numel, dtype, generator) for numel in numels]
            for name, dtype in [("params", storage.param), ("exp_avgs", storage.exp_avg), ("grads", grad_dtype)]
        }
        mains = None
        if storage.main == FP32:  # not in step with the params: those without a finite gradient must be left alone
            mains = [troubled(numel, FP32, generator) for numel in numels]
        elif storage.main == INT16:
            pairs = [split_main(troubled(numel, FP32, generator)) for numel in numels]
            columns["params"], mains = map(list, zip(*pairs, strict=True))
            for param in columns["params"]:
                param[::5] *= 0  # by somebody else, a pruning mask for one; their remainders stay
        if storage.average is not None:
            arguments = {"ema_decay": 0.99} | arguments
            columns["averages"] = [troubled(numel, storage.average, generator) for numel in numels]
        index_starts = [index_start + sum(numels[:i]) for i in range(len(numels))]
        steps = torch.arange(step, step + len(numels))
        return cls(storage, mains=mains, index_starts=index_starts, steps=steps, **columns, **arguments)

    def to(self, device) -> Case:
        move = lambda x: [t.to(device) for t in x] if isinstance(x, list) else x.to(device)  # noqa: E731
        names = ["params", "mains", "exp_avgs", "grads", "steps", "grad_scale", "skip", "active", "cautious_lrs"]
        names.append("averages")
        moved = {name: move(getattr(self, name)) for name in names if getattr(self, name) is not None}
        scalars = self.scalars
        if isinstance(scalars.lr, Tensor):
            scalars = replace(scalars, lr=scalars.lr.to(device), decay=scalars.decay.to(device))
        return replace(self, scalars=scalars, **moved)

    def tensors(self, misalignment: int = 0) -> LionTensors:
        """Copies of the state, ``misalignment`` elements past an aligned address."""

        def copy(column):
            return [torch.cat([x.new_zeros(misalignment), x])[misalignment:] for x in column]

        return LionTensors(
            copy(self.params),
            copy(self.exp_avgs),
            None if self.mains is None else copy(self.mains),
            self.index_starts,
            self.steps.clone(),
            self.storage.stochastic_momentum,
            None if self.averages is None else copy(self.averages),
            self.ema_decay,
        )

    def arguments(self) -> dict:
        names = ("grads", "scalars", "grad_scale", "skip", "active", "seed", "cautious_lrs", "cautious_wd")
        return {name: getattr(self, name) for name in names}

    def counts(self) -> Tensor:
        """What the definition counts for a cautious step."""
        pairs = zip(self.exp_avgs, self.grads, strict=True)
        return torch.stack([count_aligned(m, g, self.scalars, self.grad_scale) for m, g in pairs])

    def cautious(self, factor: float) -> Case:
        numels = torch.tensor([param.numel() for param in self.params])
        return replace(self, cautious_lrs=cautious_lrs(self.scalars.lr, self.counts(), numels, factor))

    def takes_part(self, i: int) -> bool:
        skipped = self.skip is not None and self.skip.item() != 0
        return not skipped and (self.active is None or self.active[i].item() != 0)

    def expected(self) -> LionTensors:
        """What the reference implementation says, tensor by tensor."""
        result = self.tensors()
        for i in range(len(self.params)):
            if not self.takes_part(i):
                continue
            main = None if self.mains is None else result.mains[i]
            bits = None
            if self.storage.is_stochastic:
                index = torch.arange(self.params[i].numel()) + self.index_starts[i]
                bits = random_bits(index, self.seed, self.steps[i])
                result.steps[i] += 1
            new = lion_step(
                result.params[i],
                main,
                result.exp_avgs[i],
                self.grads[i],
                self.scalars,
                grad_scale=self.grad_scale,
                bits=bits,
                stochastic_momentum=self.storage.stochastic_momentum,
                cautious_lrs=None if self.cautious_lrs is None else self.cautious_lrs[i],
                cautious_wd=self.cautious_wd,
            )
            for old, value in zip((result.params[i], main, result.exp_avgs[i]), new, strict=True):
                if old is not None:
                    old.copy_(value)
            if self.averages is not None:
                weights = result.params[i], main
                settings = {"grad_scale": self.grad_scale, "bits": bits}
                average = update_average(result.averages[i], *weights, self.grads[i], self.ema_decay, **settings)
                result.averages[i].copy_(average)
        return result


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Indices where the bits differ; a NaN equals any NaN."""
    if not a.is_floating_point():
        return (a != b).nonzero()
    integers = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return ((a.view(integers) != b.view(integers)) & ~(a.isnan() & b.isnan())).nonzero()


def assert_same(actual: LionTensors, expected: LionTensors) -> None:
    """Bit equality of everything that an update may write."""
    for name in ("params", "mains", "exp_avgs", "averages", "steps"):
        columns = [[] if column is None else column for column in (getattr(actual, name), getattr(expected, name))]
        for i, (a, e) in enumerate(zip(*columns, strict=True)):
            where = differing(a, e)
            if where.numel():
                at = tuple(where[0].tolist())
                raise AssertionError(
                    f"{name}[{i}] differs in {len(where)} of {a.numel()} elements, first at {at}: "
                    f"{a[at].item()!r}, expected {e[at].item()!r}"
                )
