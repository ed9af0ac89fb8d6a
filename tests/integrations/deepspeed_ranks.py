"""What the ranks of the DeepSpeed tests run: engines over small models whose gradients a test decides by the bit."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import Lion, PrecisionPolicy

SHAPES = ((5, 7), (16,), (3, 4), (9,), (2, 3))
FROZEN, UNUSED = 3, 4  # indices into SHAPES
BF16 = torch.bfloat16
_process_group = None  # that DeepSpeed has been started on


class Slot(nn.Module):
    """One parameter; ``forward(gradient)`` makes a loss that has exactly this gradient."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=generator))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient.to(self.weight)).sum().float()


class Slots(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, ...]] = SHAPES, frozen: int | None = FROZEN):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.slots = nn.ModuleList(Slot(shape, generator) for shape in shapes)
        if frozen is not None:
            self.slots[frozen].weight.requires_grad_(False)

    def forward(self, gradients: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(self.slots, gradients, strict=True)
        return torch.stack([slot(gradient) for slot, gradient in pairs if gradient is not None]).sum()

    def groups(self, weight_decay: float = 0.5) -> list[dict]:
        """Two groups, as everybody has them: matrices decay, the rest does not."""
        weights = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
        ]


class Words(nn.Module):
    """An embedding, a layer and a head: an ordinary model, of which a batch touches only some rows."""

    def __init__(self, vocabulary: int = 24, width: int = 8):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.embedding.weight.device)
        logits = self.head(torch.relu(self.hidden(self.embedding(tokens))))
        return nn.functional.cross_entropy(logits.float(), (tokens + 1) % 6)


def words(step: int, rank: int) -> Tensor:
    """Eight of the first six words, as [8] int64."""
    return torch.randint(6, (8,), generator=torch.Generator().manual_seed(100 * step + rank))


def exact_gradients(step: int, micro_batch: int, rank: int) -> list[Tensor | None]:
    """Multiples of 1/64 of at most 1: sums of four of them are exact in bf16, so no order of summation matters."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * micro_batch + rank)
    gradients = [torch.randint(-64, 65, shape, generator=generator) / 64 for shape in SHAPES]
    gradients[FROZEN] = gradients[UNUSED] = None
    return gradients


def ds_config(stage: int, precision: str = "bf16", params: dict | None = None, **more) -> dict:
    """``precision``: fp32, fp16, bf16, or bf16_acc (bf16 with fp32 accumulation; at stage 1 that is BF16_Optimizer)."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Lion", "params": {"lr": 2**-8, "momentum_dtype": "bf16"} | (params or {})},
        "gradient_clipping": 0.0,  # the default of 0.19.8 is 1.0
        "zero_optimization": {"stage": stage},
    }
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    elif precision != "fp32":
        config["bf16"] = {"enabled": True}
    if precision == "bf16_acc":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    zero = more.pop("zero_optimization", {})
    config["zero_optimization"] |= zero
    return config | more


def start_deepspeed() -> None:
    """DeepSpeed over the process group that there is."""
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    import tests.integrations.deepspeed_ahead  # noqa: F401

    global _process_group
    if _process_group is dist.group.WORLD:
        return
    _process_group = dist.group.WORLD
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    # What it remembers of earlier tests: their process group, and what numbers stage 3 has given on this rank.
    comm.cdb = groups._WORLD_GROUP = None
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def make_engine(model: nn.Module, config: dict, model_parameters=None, peer: bool = False):
    """``peer``: with DeepSpeed's own optimizer for the name in ``config``."""
    import deepspeed

    from lion_dist.integrations.deepspeed import lion_optimizer

    start_deepspeed()
    if model_parameters is None:
        model_parameters = model.groups() if isinstance(model, Slots) else list(model.parameters())
    optimizer = None if peer else lion_optimizer(config)
    return deepspeed.initialize(model=model, model_parameters=model_parameters, optimizer=optimizer, config=config)[0]


def take_exact_step(engine, step: int) -> None:
    for micro_batch in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(exact_gradients(step, micro_batch, dist.get_rank())))
        engine.step()


def full_params(engine) -> list[Tensor]:
    import deepspeed

    weights = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(weights):
        return [p.detach().cpu().clone() for p in weights]


def full_fp32(engine) -> list[Tensor]:
    """The fp32 values of the trained parameters; stages 1 to 3."""
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(p).cpu() for p in engine.module.parameters() if p.requires_grad]


def full_tensors(engine) -> dict[str, list[Tensor]]:
    """What the ranks hold together: parameters, and of the trained ones the fp32 values and the momentum."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found = {"params": full_params(engine)}
    if engine.zero_optimization_stage() == 0:
        states = list(engine.basic_optimizer.state.values())
        return found | {"exp_avg": [state["exp_avg"].float().cpu() for state in states]}
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    return found | {
        "fp32": full_fp32(engine),
        "exp_avg": [safe_get_full_optimizer_state(p, "exp_avg").cpu() for p in trained],
    }


def drift(config: dict, peer: bool = False) -> tuple[float, float, float]:
    """How far (largest element) training moves ``Words`` in ten steps of zero gradients, and then, in five steps on
    ``words``, the embedding rows that no batch touches and those that batches do. ``peer``: by DeepSpeed's own Lion."""
    engine = make_engine(Words(), config, peer=peer)

    def embedding_after(steps: range, scale: float) -> Tensor:
        for step in steps:
            engine.backward(engine(words(step, dist.get_rank())) * scale)
            engine.step()
        return full_params(engine)[0].float()

    start = embedding_after(range(0), 0.0)
    still = embedding_after(range(10), 0.0)
    trained = embedding_after(range(5), 1.0)
    return tuple(x.abs().max().item() for x in (still - start, (trained - still)[6:], (trained - still)[:6]))


def states_of(engine) -> list[dict[str, tuple]]:
    """Of every partition on this rank: {key: (dtype, numel, bytes)}."""
    return [
        {key: (value.dtype, value.numel(), value.nbytes) for key, value in state.items() if torch.is_tensor(value)}
        for state in engine.basic_optimizer.state.values()
    ]


def lion_alone(steps: int, micro_batches: int, ranks: int, dtype: torch.dtype, zero_steps: int = 0) -> dict:
    """The same training by plain ``Lion`` in one process, on fp32 tensors that start as ``dtype`` has them.

    ``zero_steps`` come first: FP16_UnfusedOptimizer takes one of zero gradients when it is constructed, and the decay
    of that one is real.
    """
    model = Slots()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
    optimizer = Lion(model.groups(), lr=2**-8, precision=PrecisionPolicy(momentum_dtype=BF16))
    for _ in range(zero_steps):
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        optimizer.step()
    for step in range(steps):
        parts = [exact_gradients(step, micro, rank) for micro in range(micro_batches) for rank in range(ranks)]
        for weight, *gradients in zip(model.parameters(), *parts, strict=True):
            if weight.requires_grad:  # an engine gives an unused parameter zeros
                zeros = torch.zeros_like(weight)
                weight.grad = sum(zeros if g is None else g for g in gradients) / (micro_batches * ranks)
        optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "params": [p.detach().to(dtype) for p in model.parameters()],
        "fp32": [p.detach() for p in trained],
        "exp_avg": [optimizer.state[p]["exp_avg"].float() for p in trained],
    }


def assert_same(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    """Bit for bit, kind by kind and tensor by tensor."""
    for kind in found:
        for i, (ours, theirs) in enumerate(zip(found[kind], expected[kind], strict=True)):
            different = (ours != theirs).sum().item()
            assert not different, f"{kind}[{i}]: {different} of {theirs.numel()} elements differ"
