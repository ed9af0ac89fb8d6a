"""What a training job will hold and send, before it runs: bytes a rank by kind, bytes on the wire a step.

Integers only, no process groups: the buckets and shards are those of ``sharding/layout.py``, the gradient buffers
those of ``sharding/buffers.py``, so that a plan of ShardedLion is what ``opt.memory_bytes()`` counts. FSDP2's shards
follow ``torch.chunk`` on dim 0. DeepSpeed's are what 0.19.8 was seen to hold on CPU ranks, with its default buckets.

Kinds: ``params``, ``main_params``, ``exp_avg`` and ``weight_avg`` (of ``ema_decay``) stay between steps; ``grads`` is
their peak in a step (shards, pooled buffers, gradients kept through accumulation); ``transient``, an estimate, is what
else lives for a moment: gradients that no bucket has taken yet, layers that FSDP2 has gathered, DeepSpeed's buckets.
All of a rank that owns the most.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch

from lion_dist import values
from lion_dist.coded_sync.codes import digits_for
from lion_dist.config import PrecisionPolicy, ShardingConfig, check_sharding
from lion_dist.planning.model_shapes import ModelShapes
from lion_dist.sharding.buffers import GradBufferPool
from lion_dist.sharding.layout import BucketLayout, choose_bucket_numel, pack_into_buckets

BF16, FP32 = torch.bfloat16, torch.float32
MAIN_BYTES = {"own": 0, "none": 0, "split": 2, "fp32": 4}
# DeepSpeed 0.19.8's defaults, in elements.
DEEPSPEED_BUCKET, DEEPSPEED_PREFETCH, DEEPSPEED_KEEPS_WHOLE = 500_000_000, 50_000_000, 100_000


@dataclass(frozen=True)
class Precision:
    """A parameter dtype and the policy that goes with it.

    ``moments``: how many values of the momentum's dtype the optimizer keeps for each element; AdamW 2. ``average``: the
    dtype of the average of the weights, if one is kept.
    """

    param_dtype: torch.dtype
    policy: PrecisionPolicy
    moments: int = 1
    average: torch.dtype | None = None

    @property
    def param_bytes(self) -> int:
        return self.param_dtype.itemsize

    @property
    def main_bytes(self) -> int:
        return MAIN_BYTES[self.policy.main_params_for(self.param_dtype)]

    @property
    def momentum_bytes(self) -> int:
        return self.moments * self.policy.momentum_dtype_for(self.param_dtype).itemsize

    def average_memory(self, numel: int) -> dict[str, int]:
        return {} if self.average is None else {"weight_avg": numel * self.average.itemsize}


PRECISIONS = {
    "bf16-split": Precision(BF16, PrecisionPolicy("split")),
    "bf16-split, fp32 momentum": Precision(BF16, PrecisionPolicy("split", FP32)),
    "bf16-none": Precision(BF16, PrecisionPolicy("none")),
    "bf16-none, fp32 momentum": Precision(BF16, PrecisionPolicy("none", FP32)),
    "bf16-fp32": Precision(BF16, PrecisionPolicy("fp32")),
    "bf16-fp32, fp32 momentum": Precision(BF16, PrecisionPolicy("fp32", FP32)),
    "fp32": Precision(FP32, PrecisionPolicy()),
    "fp32, bf16 momentum": Precision(FP32, PrecisionPolicy(momentum_dtype=BF16)),
}


@dataclass(frozen=True)
class Job:
    """Args:
    nodes: ``ranks`` are spread evenly over them. With more than one, hybrid engines shard inside a node and
        replicate across.
    micro_batches: gradient accumulation, in passes a step.
    sharding: ShardedLion's; its zero_stage is set by each engine, ``ordered_sum=None`` means NCCL's own sum.
    """

    ranks: int
    nodes: int = 1
    micro_batches: int = 1
    sharding: ShardingConfig = field(default_factory=ShardingConfig)

    def __post_init__(self):
        for name in ("ranks", "nodes", "micro_batches"):
            found = values.whole_number(name, getattr(self, name), "at least 1", least=1, remedy="Pass a whole number.")
            object.__setattr__(self, name, found)
        check_sharding(self.sharding)
        if self.ranks % self.nodes:
            raise ValueError(f"{self.ranks} ranks do not spread evenly over {self.nodes} nodes")

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes


@dataclass(frozen=True)
class Collective:
    """What each rank sends in one step by one kind of collective; ``crosses`` says whether its group spans nodes."""

    what: str
    sent: int
    crosses: bool


@dataclass(frozen=True)
class EnginePlan:
    """One engine with one precision: ``memory`` in bytes by kind, ``traffic`` of one step.

    ``compute_bytes``: of one value in forward and backward.
    """

    engine: str
    precision: str
    memory: dict[str, int]
    traffic: tuple[Collective, ...]
    compute_bytes: int

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def sent(self) -> int:
        return sum(collective.sent for collective in self.traffic)

    def seconds(self, intra: float, inter: float) -> float:
        """Time on the wire at ``intra`` and ``inter`` bytes/s a rank, inside a node and across.

        A group that spans nodes goes at the slower of the two. Latency, and overlap with computing, are left out.
        """
        for name, speed in (("intra", intra), ("inter", inter)):
            values.number(name, speed, "above 0", above=0.0, remedy="Pass bytes/s of a rank, such as 300e9.")
        return sum(c.sent / (min(intra, inter) if c.crosses else intra) for c in self.traffic)


def _share(nbytes: int, ranks: int) -> int:
    """What each rank sends of a reduce-scatter or all-gather over ``nbytes``."""
    return nbytes * (ranks - 1) // ranks


def _traffic(job: Job, *collectives: tuple[str, int, int]) -> tuple[Collective, ...]:
    """From (what, bytes sent, ranks of the group, which are neighbours); what sends nothing is left out."""
    return tuple(Collective(what, sent, size > job.ranks_per_node) for what, sent, size in collectives if sent)


# ---- engines


def plan_replicated(
    model: ModelShapes, precision: Precision, job: Job, *, bucket_view: bool = False
) -> tuple[dict, tuple]:
    """``Lion`` on one rank, or under DDP.

    ``bucket_view``: DDP's gradient_as_bucket_view, by which its buckets are the gradients; without it both are kept.
    """
    numel, grads = model.numel, model.numel * precision.param_bytes
    memory = {
        "params": numel * precision.param_bytes,
        "main_params": numel * precision.main_bytes,
        "exp_avg": numel * precision.momentum_bytes,
        **precision.average_memory(numel),
        "grads": grads if job.ranks == 1 or bucket_view else 2 * grads,
        "transient": 0,
    }
    return memory, _traffic(job, ("all-reduce gradients", 2 * _share(grads, job.ranks), job.ranks))


def plan_zero_redundancy(model: ModelShapes, precision: Precision, job: Job) -> tuple[dict, tuple]:
    """torch's ``ZeroRedundancyOptimizer`` under DDP: each rank keeps the state of whole parameters, and sends those."""
    memory, traffic = plan_replicated(model, precision, job)
    owned = [0] * job.ranks
    for numel in sorted(model.numels, reverse=True):  # each to the rank that has the least, as it does
        heapq.heapreplace(owned, owned[0] + numel)
    memory["exp_avg"] = max(owned) * precision.momentum_bytes
    sent = "broadcast parameters", _share(model.numel * precision.param_bytes, job.ranks), job.ranks
    return memory, traffic + _traffic(job, sent)


def plan_adamw(
    model: ModelShapes, precision: Precision, job: Job, *, engine: Callable, **settings
) -> tuple[dict, tuple] | None:
    """torch's AdamW in ``engine``: two moments in the parameters' dtype, no main params. Other precisions: no plan."""
    if precision.main_bytes or precision.policy.momentum_dtype_for(precision.param_dtype) != precision.param_dtype:
        return None
    return engine(model, replace(precision, moments=2, average=None), job, **settings)


def bucket_layouts(model: ModelShapes, shard_ranks: int, bucket_numel: int | None) -> list[BucketLayout]:
    """As ShardedLion lays them out, with matrices and vectors in param groups of their own."""
    numels = model.numels
    bucket_numel = bucket_numel or choose_bucket_numel(sum(numels), shard_ranks)
    keys = [len(shape) >= 2 for _, shape in model.params]
    members = pack_into_buckets(numels, keys, bucket_numel)
    return [BucketLayout(tuple(numels[i] for i in bucket), shard_ranks) for bucket in members]


def plan_sharded(
    model: ModelShapes,
    precision: Precision,
    job: Job,
    *,
    stage: int,
    hybrid: bool = False,
    two_levels: bool = False,
    coded: bool = False,
) -> tuple[dict, tuple]:
    """``ShardedLion``; ``hybrid`` shards inside a node and replicates across, ``two_levels`` shards over all ranks and
    sends inside the node and across apart, ``coded`` is param_sync="coded"."""
    shard_ranks = job.ranks_per_node if hybrid else job.ranks
    replicas = job.ranks // shard_ranks
    layouts = bucket_layouts(model, shard_ranks, job.sharding.bucket_numel)
    numel, shard_numel = sum(b.numel for b in layouts), sum(b.shard_numel for b in layouts)
    largest = max(b.numel for b in layouts)
    wire = (job.sharding.reduce_dtype or precision.param_dtype).itemsize
    ordered = bool(job.sharding.ordered_sum)
    shard_bytes = 4 if ordered else wire
    grads = shard_numel * shard_bytes + GradBufferPool.DEPTH * largest * wire
    if job.micro_batches > 1:
        if stage == 1:
            grads += model.numel * precision.param_bytes  # p.grad, through no_sync()
        elif shard_bytes < 4:
            grads += shard_numel * 4  # the fp32 accumulator
    memory = {
        "params": numel * precision.param_bytes,
        "main_params": shard_numel * precision.main_bytes,
        "exp_avg": shard_numel * precision.momentum_bytes,
        **precision.average_memory(shard_numel),
        "grads": grads,
        # The bucket in the making and the next one, and what an ordered sum receives.
        "transient": 2 * max(sum(b.param_numels) for b in layouts) * precision.param_bytes
        + (largest * wire if ordered else 0),
    }
    syncs = job.micro_batches if stage == 2 else 1
    sent = numel * precision.param_bytes
    if coded:
        digits = digits_for(precision.param_dtype, precision.main_bytes > 0)
        codes = sum(digits.num_bytes(b.shard_numel) for b in layouts)  # of one rank; escapes are too few to count
        memory["transient"] = max(memory["transient"], (shard_ranks + 1) * codes)
        sent = shard_ranks * codes
    what = "update codes" if coded else "parameters"
    if two_levels:
        memory["transient"] += largest // job.ranks_per_node * shard_bytes  # the node's sum of a bucket
        return memory, _on_two_levels(job, syncs * numel * wire, sent, what)
    across = (replicas - 1) * shard_numel * 4 if ordered else 2 * _share(shard_numel * wire, replicas)
    return memory, _traffic(
        job,
        ("reduce-scatter gradients", syncs * _share(numel * wire, shard_ranks), shard_ranks),
        ("all-reduce gradient shards", syncs * across, job.ranks),
        (f"all-gather {what}", _share(sent, shard_ranks), shard_ranks),
    )


def _on_two_levels(job: Job, grads: int, params: int, what: str) -> tuple[Collective, ...]:
    """``grads``, ``params``: bytes of all that is reduced and gathered; a rank sends its node's part across."""
    inside, nodes = job.ranks_per_node, job.nodes
    return _traffic(
        job,
        ("reduce-scatter gradients inside the node", _share(grads, inside), inside),
        ("reduce-scatter gradients across nodes", _share(grads // inside, nodes), job.ranks),
        (f"all-gather {what} across nodes", _share(params // inside, nodes), job.ranks),
        (f"all-gather {what} inside the node", _share(params, inside), inside),
    )


def dim0_shard(shape: Sequence[int], ranks: int) -> int:
    """Elements that FSDP2 allocates on each rank for a parameter: whole rows, the last ranks' padded."""
    return -(-shape[0] // ranks) * prod(shape[1:])


def plan_fsdp(
    model: ModelShapes,
    precision: Precision,
    job: Job,
    *,
    reshard: bool = True,
    hybrid: bool = False,
    compute: torch.dtype | None = None,
) -> tuple[dict, tuple]:
    """``fully_shard`` on every block and the root, and ``Lion`` over the shards; each micro-batch is reduced.

    Args:
        reshard: free a block's parameters after its forward and gather them again in backward.
        compute: MixedPrecisionPolicy's param_dtype, in which blocks are gathered and gradients reduced; None: as they
            are.
    """
    shard_ranks = job.ranks_per_node if hybrid else job.ranks
    replicas = job.ranks // shard_ranks
    *blocks, root = [sum(dim0_shard(shape, shard_ranks) for shape in block) for block in model.blocks()]
    shard_numel, compute_bytes = sum(blocks) + root, (compute or precision.param_dtype).itemsize
    full = shard_numel * shard_ranks * compute_bytes
    block, root_bytes = max(blocks, default=0) * shard_ranks * compute_bytes, root * shard_ranks * compute_bytes
    gathered = root_bytes + 2 * block if reshard else full  # the root is never resharded after forward
    memory = {
        "params": shard_numel * precision.param_bytes,
        "main_params": shard_numel * precision.main_bytes,
        "exp_avg": shard_numel * precision.momentum_bytes,
        **precision.average_memory(shard_numel),
        "grads": shard_numel * precision.param_bytes,
        "transient": gathered + 2 * max(block, root_bytes),  # a block's gradients, and their reduce-scatter's input
    }
    gathers = job.micro_batches * (2 * full - root_bytes if reshard else full)
    return memory, _traffic(
        job,
        ("all-gather parameters", _share(gathers, shard_ranks), shard_ranks),
        ("reduce-scatter gradients", job.micro_batches * _share(full, shard_ranks), shard_ranks),
        ("all-reduce gradient shards", 2 * job.micro_batches * _share(full // shard_ranks, replicas), job.ranks),
    )


def plan_deepspeed(model: ModelShapes, precision: Precision, job: Job, *, stage: int) -> tuple[dict, tuple] | None:
    """DeepSpeed with ``"type": "Lion"``. It keeps fp32 main params and no average of the weights: no other plans."""
    if precision.average is not None or (precision.param_dtype == BF16 and precision.main_bytes != 4):
        return None
    numel, itemsize, ranks = model.numel, precision.param_bytes, job.ranks
    part = -(-numel // ranks)
    bucket = min(numel, DEEPSPEED_BUCKET) * itemsize
    owned = numel if stage == 0 else part
    memory = {
        "params": (part if stage == 3 else numel) * itemsize,
        "main_params": owned * (precision.main_bytes if stage == 0 else 4),
        "exp_avg": owned * precision.momentum_bytes,
        "grads": owned * itemsize,
    }
    if stage == 1 and job.micro_batches > 1:
        memory["grads"] += numel * itemsize  # p.grad, until the last micro-batch
    fp32_grads = owned * 4 if precision.param_dtype == BF16 else 0  # made in step()
    full = numel * itemsize
    if stage == 3:
        memory["params"] += sum(n for n in model.numels if n < DEEPSPEED_KEEPS_WHOLE) * itemsize
        block = max(sum(map(prod, block)) for block in model.blocks())
        memory["transient"] = bucket + max(fp32_grads, (block + min(block, DEEPSPEED_PREFETCH)) * itemsize)
        moves = [
            ("all-gather parameters", 2 * job.micro_batches * _share(full, ranks), ranks),
            ("reduce-scatter gradients", job.micro_batches * _share(full, ranks), ranks),
        ]
    else:
        memory["transient"] = max(fp32_grads, bucket * (2 if stage else 1))  # overlap_comm takes two
        passes = job.micro_batches if stage == 2 else 1
        moves = [("all-reduce gradients", 2 * passes * _share(full, ranks), ranks)]  # its reduce_scatter is one too
        moves += [("all-gather parameters", _share(full, ranks), ranks)] if stage else []
    return memory, _traffic(job, *moves)


# ---- all of them


def engines_for(precision: Precision, job: Job) -> dict[str, tuple[Callable, dict]]:
    """The engines that make sense for a job: {name in tables: (function above, its settings)}."""
    engines: dict[str, tuple[Callable, dict]] = {"Lion" if job.ranks == 1 else "DDP + Lion": (plan_replicated, {})}
    if job.ranks > 1:
        engines["DDP + Lion, bucket view"] = plan_replicated, {"bucket_view": True}
    engines |= {f"ShardedLion stage {stage}": (plan_sharded, {"stage": stage}) for stage in (1, 2)}
    engines["ShardedLion stage 2, coded"] = plan_sharded, {"stage": 2, "coded": True}
    hybrid = job.nodes > 1 and job.ranks_per_node > 1
    if hybrid:
        engines["ShardedLion stage 2, hybrid"] = plan_sharded, {"stage": 2, "hybrid": True}
        levels = {"stage": 2, "two_levels": True}
        engines["ShardedLion 2 levels"] = plan_sharded, levels
        engines["ShardedLion 2 levels, coded"] = plan_sharded, levels | {"coded": True}
    engines["FSDP2 + Lion"] = plan_fsdp, {}
    engines["FSDP2 + Lion, no reshard"] = plan_fsdp, {"reshard": False}
    if hybrid:
        engines["FSDP2 + Lion, hybrid"] = plan_fsdp, {"hybrid": True}
    if precision.param_dtype == FP32:
        engines["FSDP2 + Lion, bf16 compute"] = plan_fsdp, {"compute": BF16}
    engines |= {f"DeepSpeed stage {stage}": (plan_deepspeed, {"stage": stage}) for stage in range(4)}
    return engines | _engines_of_adamw(precision, job)


def _engines_of_adamw(precision: Precision, job: Job) -> dict[str, tuple[Callable, dict]]:
    if job.ranks == 1:
        return {"AdamW": (plan_adamw, {"engine": plan_replicated})}
    engines: dict[str, tuple[Callable, dict]] = {
        "DDP + AdamW": (plan_adamw, {"engine": plan_replicated}),
        "DDP + ZeRO-1 AdamW": (plan_adamw, {"engine": plan_zero_redundancy}),
        "FSDP2 + AdamW": (plan_adamw, {"engine": plan_fsdp}),
    }
    if precision.param_dtype == FP32:
        engines["FSDP2 + AdamW, bf16 compute"] = plan_adamw, {"engine": plan_fsdp, "compute": BF16}
    return engines


def plan(model: ModelShapes, job: Job, precision: str, average: torch.dtype | None = None) -> list[EnginePlan]:
    """Every engine with one of ``PRECISIONS``; an engine that has no such precision is left out. ``average``: the dtype
    of the average of the weights that Lion keeps (``ema_decay``)."""
    values.instance("model", model, ModelShapes, 'Pass model_shapes.read_shapes("7b"), for example.')
    values.instance("job", job, Job, "Pass planning.Job(ranks=8), for example.")
    values.choice("precision", precision, tuple(PRECISIONS))
    values.dtype("average", average, (FP32, BF16), "None is no average.")
    chosen = replace(PRECISIONS[precision], average=average)
    plans = []
    for name, (engine, settings) in engines_for(chosen, job).items():
        found = engine(model, chosen, job, **settings)
        if found is not None:
            compute = settings.get("compute") or chosen.param_dtype
            plans.append(EnginePlan(name, precision, found[0], found[1], compute.itemsize))
    return plans


def activation_bytes(model: ModelShapes, tokens: int, itemsize: int, *, checkpointing: bool) -> int:
    """An estimate for one micro-batch of ``tokens`` on a rank, with fused attention.

    A layer keeps 17 values of the hidden size a token (Korthikanti et al., arXiv 2205.05198, without attention
    scores), or one with activation checkpointing, which has one whole layer at a time. The loss keeps the logits, and
    a copy and a gradient of them in fp32.
    """
    values.instance("model", model, ModelShapes, 'Pass model_shapes.read_shapes("7b"), for example.')
    for name, count in (("tokens", tokens), ("itemsize", itemsize)):
        values.whole_number(name, count, "at least 1", least=1, remedy="Pass a whole number.")
    checkpointing = values.flag("checkpointing", checkpointing) is True
    per_layer = 17 * model.hidden * itemsize
    layers = model.layers * model.hidden * itemsize + per_layer if checkpointing else model.layers * per_layer
    return tokens * (layers + model.vocab * (itemsize + 8))
