"""The engines of ``benchmarks.step``: what one training step is under each, with the settings that are best for it.

Peers get what their own documentation recommends for speed: DDP gradients as views of its buckets and a static graph;
FSDP2 the next block's parameters ahead of time, and, as engines of their own, NCCL's symmetric memory and collectives
that take no SMs (``cta_policy`` zero).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lion_dist import CapturedStep, Lion, PrecisionPolicy, ShardedLion, ShardingConfig

LR, BETAS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.99), 0.1, 1.0
SETTINGS = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
BASELINE = "forward + backward alone"
IN_A_GRAPH = "forward + backward alone, in a graph"  # the baseline of steps in graphs
NCCL_CTA_POLICY_ZERO = 2

Step = Callable[[list[Tensor]], None]  # the micro-batches of one step


def forward_backward(model: nn.Module) -> Step:
    def step(batches: list[Tensor]) -> None:
        for batch in batches:
            model(batch).backward()
        model.zero_grad(set_to_none=True)

    return step


def captured(step: Step) -> Step:
    """The same as a CUDA graph, made in the third call; for what leaves nothing in flight."""
    graph, stream, static, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), [], 0

    def replay(batches: list[Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(batches)
            torch.cuda.current_stream().wait_stream(stream)
            return
        if not static:
            static.extend(batch.clone() for batch in batches)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                step(static)
        for mine, batch in zip(static, batches, strict=True):
            mine.copy_(batch)
        graph.replay()

    return replay


def captured_sharded_lion(model: nn.Module, **sharding) -> Step:
    step, optimizer = _sharded_lion(model, **sharding)
    whole = CapturedStep(lambda *batches: step(list(batches)), optimizer)
    return lambda batches: whole(*batches)


def sharded_lion(model: nn.Module, **sharding) -> Step:
    return _sharded_lion(model, **sharding)[0]


def _sharded_lion(model: nn.Module, **sharding) -> tuple[Step, ShardedLion]:
    optimizer = ShardedLion(model.parameters(), **SETTINGS, module=model, sharding=ShardingConfig(**sharding))

    def step(batches: list[Tensor]) -> None:
        optimizer.zero_grad()
        for i, batch in enumerate(batches):
            if i < len(batches) - 1:
                with optimizer.no_sync():
                    model(batch).backward()
            else:
                model(batch).backward()
        if not sharding.get("update_in_backward"):
            optimizer.clip_grad_norm_(CLIP)
        optimizer.step()

    return step, optimizer


def torch_loop(model: nn.Module, wrapped: nn.Module, optimizer: torch.optim.Optimizer, no_sync=None) -> Step:
    def step(batches: list[Tensor]) -> None:
        for i, batch in enumerate(batches):
            if no_sync is not None and i < len(batches) - 1:
                with no_sync():
                    wrapped(batch).backward()
            else:
                wrapped(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ddp(model: nn.Module, make: Callable, micro_batches: int) -> Step:
    device = next(model.parameters()).device
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=micro_batches == 1,  # with no_sync() the graph of a pass is another
    )
    return torch_loop(model, wrapped, make(model.parameters()), wrapped.no_sync)


def lion_pytorch(params):
    from lion_pytorch import Lion as Peer

    return Peer(params, **SETTINGS, use_triton=torch.cuda.is_available())


def lion_pytorch_zero(params):
    from lion_pytorch import Lion as Peer

    return ZeroRedundancyOptimizer(params, Peer, **SETTINGS, use_triton=torch.cuda.is_available())


def adamw(params):
    """torch's fused AdamW, whose moments have the parameters' dtype."""
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def adamw_zero(params):
    return ZeroRedundancyOptimizer(params, torch.optim.AdamW, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def flash_lion(params):
    from flashoptim import FlashLion

    return FlashLion(params, **SETTINGS, quantize=False, master_weight_bits=32)


def fsdp2(model: nn.Module, make: Callable, reshard: bool, symmetric: bool = False) -> Step:
    blocks = list(model.get_submodule("blocks").children())
    mesh = mesh_without_sms() if symmetric else None
    sharded = [fully_shard(module, mesh=mesh, reshard_after_forward=reshard) for module in (*blocks, model)]
    for module in sharded if symmetric else ():
        module.set_symm_mem_for_comm()
    for block, following in zip(sharded, sharded[1:-1], strict=False):
        block.set_modules_to_forward_prefetch([following])
    return torch_loop(model, model, make(model.parameters()))


def mesh_without_sms() -> DeviceMesh:
    """All ranks, over a communicator whose collectives run on copy engines where their memory is symmetric."""
    if not torch.cuda.is_available():
        raise ImportError("symmetric memory needs GPUs")
    options = dist.ProcessGroupNCCL.Options()
    options.config.cta_policy = NCCL_CTA_POLICY_ZERO
    return DeviceMesh.from_group(dist.new_group(pg_options=options), "cuda")


def deepspeed_zero(model: nn.Module, stage: int, micro_batches: int) -> Step:
    import deepspeed
    from deepspeed.ops.lion import FusedLion

    if not torch.cuda.is_available():
        raise ImportError("DeepSpeed's FusedLion has no CPU op")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": True},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=FusedLion(model.parameters(), **SETTINGS), config=config)

    def step(batches: list[Tensor]) -> None:
        for batch in batches:
            engine.backward(engine(batch))
            engine.step()

    return step


def graphs() -> dict[str, Callable[[nn.Module], Step]]:
    """Whole steps as CUDA graphs, beside forward and backward alone both ways."""
    return {
        BASELINE: forward_backward,
        IN_A_GRAPH: lambda model: captured(forward_backward(model)),
        "lion_dist stage 2, in a graph": lambda model: captured_sharded_lion(model, zero_stage=2),
        "lion_dist stage 1, in a graph": lambda model: captured_sharded_lion(model, zero_stage=1),
        "lion_dist stage 2, NCCL alone, in a graph": lambda model: captured_sharded_lion(model, peer_memory=False),
    }


def engines(micro_batches: int) -> dict[str, Callable[[nn.Module], Step]]:
    own = lambda params: Lion(params, **SETTINGS, precision=PrecisionPolicy())  # noqa: E731
    return {
        BASELINE: forward_backward,
        "lion_dist stage 2": lambda model: sharded_lion(model, zero_stage=2),
        "lion_dist stage 2, update in backward (no clipping)": lambda model: sharded_lion(
            model, update_in_backward=True
        ),
        "lion_dist stage 1": lambda model: sharded_lion(model, zero_stage=1),
        "lion_dist stage 2, NCCL alone": lambda model: sharded_lion(model, peer_memory=False),
        "lion_dist stage 2, coded": lambda model: sharded_lion(model, param_sync="coded"),
        "lion_dist stage 2, fp32 on the wire": lambda model: sharded_lion(model, reduce_dtype=torch.float32),
        "FSDP2 no reshard + lion_dist.Lion": lambda model: fsdp2(model, own, reshard=False),
        "FSDP2 reshard + lion_dist.Lion": lambda model: fsdp2(model, own, reshard=True),
        "FSDP2 no reshard, symmetric memory + lion_dist.Lion": lambda model: fsdp2(model, own, False, symmetric=True),
        "FSDP2 reshard, symmetric memory + lion_dist.Lion": lambda model: fsdp2(model, own, True, symmetric=True),
        "DDP + lion-pytorch": lambda model: ddp(model, lion_pytorch, micro_batches),
        "DDP + ZeroRedundancyOptimizer(lion-pytorch)": lambda model: ddp(model, lion_pytorch_zero, micro_batches),
        "DDP + AdamW": lambda model: ddp(model, adamw, micro_batches),
        "DDP + ZeroRedundancyOptimizer(AdamW)": lambda model: ddp(model, adamw_zero, micro_batches),
        "FSDP2 no reshard + AdamW": lambda model: fsdp2(model, adamw, reshard=False),
        "FSDP2 reshard + AdamW": lambda model: fsdp2(model, adamw, reshard=True),
        "FSDP2 no reshard + FlashLion": lambda model: fsdp2(model, flash_lion, reshard=False),
        "FSDP2 reshard + FlashLion": lambda model: fsdp2(model, flash_lion, reshard=True),
        **{
            f"DeepSpeed ZeRO-{stage} + FusedLion": lambda model, stage=stage: deepspeed_zero(
                model, stage, micro_batches
            )
            for stage in (1, 2, 3)
        },
    }
