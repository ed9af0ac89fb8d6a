"""One momentum buffer per rank partition, and no full gradient in stage 2: counted in bytes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.sharding.buffers import GradBufferPool
from tests.models import mlp

BF16, FP32 = torch.bfloat16, torch.float32
LAYERS, WIDTH = 16, 32
LAYER_NUMEL = WIDTH * WIDTH + WIDTH
TOTAL = LAYERS * LAYER_NUMEL
PADDING = 512  # elements a bucket


def deep_model(dtype: torch.dtype = FP32) -> nn.Sequential:
    return mlp(*[WIDTH] * (LAYERS + 1)).to(dtype)


def train(model: nn.Module, opt: ShardedLion, steps: int = 2) -> None:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(steps):
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        opt.step()
    opt.finish_param_sync()


def storages_alive() -> dict[int, int]:
    """Address -> bytes of all memory that tensors occupy which Python can reach: of each storage, but for those within
    another, as a parameter's is in its bucket's."""
    gc.collect()
    tensors = [obj for obj in gc.get_objects() if type(obj) in (Tensor, nn.Parameter) and obj.layout == torch.strided]
    extents = {(t.untyped_storage().data_ptr(), -t.untyped_storage().nbytes()) for t in tensors if t.numel()}
    alive, end = {}, 0
    for start, minus_nbytes in sorted(extents):
        if start - minus_nbytes > end:
            assert start >= end, "storages overlap"
            alive[start], end = -minus_nbytes, start - minus_nbytes
    return alive


# ---- what is kept between steps


def count_bytes(dtype: torch.dtype, policy: PrecisionPolicy, stage: int) -> dict[str, int]:
    model = deep_model(dtype)
    opt = ShardedLion(
        model.parameters(), module=model, precision=policy, sharding=ShardingConfig(stage, bucket_numel=LAYER_NUMEL)
    )
    train(model, opt)
    held = {
        "exp_avg": sum(shard.exp_avg.untyped_storage().nbytes() for shard in opt.shards),
        "main_params": sum(s.main_param.untyped_storage().nbytes() for s in opt.shards if s.main_param is not None),
        "params": sum(bucket.flat_params.untyped_storage().nbytes() for bucket in opt.buckets),
    }
    flats = [(bucket.flat_params.data_ptr(), bucket.flat_params.nbytes) for bucket in opt.buckets]
    assert all(any(0 <= p.data_ptr() - start <= size - p.nbytes for start, size in flats) for p in model.parameters())
    said = opt.memory_bytes()
    assert {kind: said[kind] for kind in held} == held
    assert not opt.state  # nothing is kept twice, in the place where torch's optimizers keep it
    return said


MEMORY_CASES = {  # dtype, policy -> bytes a parameter: of momentum and main params, on the owner
    "fp32": (FP32, PrecisionPolicy(), 4, 0),
    "fp32-momentum16": (FP32, PrecisionPolicy(momentum_dtype=BF16), 2, 0),
    "bf16-split": (BF16, PrecisionPolicy("split"), 2, 2),
    "bf16-fp32": (BF16, PrecisionPolicy("fp32", FP32), 4, 4),
    "bf16-none": (BF16, PrecisionPolicy("none"), 2, 0),
}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", MEMORY_CASES)
def test_each_rank_keeps_the_momentum_of_its_own_part_only(gloo, name, stage, world_size):
    dtype, policy, momentum, main = MEMORY_CASES[name]
    said = gloo.run(world_size, count_bytes, dtype, policy, stage)
    most = TOTAL // world_size + LAYERS * PADDING // world_size
    for memory in said:
        assert TOTAL // world_size * momentum <= memory["exp_avg"] <= most * momentum
        assert TOTAL // world_size * main <= memory["main_params"] <= most * main
        assert TOTAL * dtype.itemsize <= memory["params"] <= (TOTAL + LAYERS * PADDING) * dtype.itemsize
    assert len({memory["exp_avg"] for memory in said}) == 1


def compare_with_what_is_alive() -> None:
    """All tensors that construction and training left behind are the ones that memory_bytes() names."""
    torch.zeros(1, requires_grad=True).sum().backward()
    before = storages_alive()
    model = deep_model()
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(bucket_numel=LAYER_NUMEL))
    train(model, opt)
    new = {pointer: size for pointer, size in storages_alive().items() if pointer not in before}
    said = sum(opt.memory_bytes().values())
    overhead = LAYERS * 200 + 2000  # counters, flags and positions
    assert said <= sum(new.values()) <= said + overhead, (said, sum(new.values()))


def test_memory_bytes_names_everything_that_is_kept(gloo):
    gloo.run(2, compare_with_what_is_alive)


# ---- gradients


def peak_of_gradients(stage: int, no_sync: bool) -> tuple[int, int]:
    """The most bytes that gradients took at any hook of backward: full ones, and those in shards and buffers."""
    model = deep_model()
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(stage, bucket_numel=LAYER_NUMEL))
    full, in_optimizer = [0], [0]

    def look(_param: Tensor) -> None:
        full.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        in_optimizer.append(opt.memory_bytes()["grads"])

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(look)
    x = torch.randn(4, WIDTH)
    for _ in range(2):
        if no_sync:
            with opt.no_sync():
                model(x).square().mean().backward()
        model(x).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        opt.step()
    assert len(full) > 2 * 2 * LAYERS
    return max(full), max(in_optimizer)


@pytest.mark.parametrize("no_sync", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_stage_2_never_holds_a_full_gradient(gloo, world_size, no_sync):
    buffers = GradBufferPool.DEPTH * (LAYER_NUMEL + PADDING) * 4
    shards = (TOTAL + LAYERS * PADDING) * 4 // world_size
    for full, in_optimizer in gloo.run(world_size, peak_of_gradients, 2, no_sync):
        assert 0 < full <= 2 * LAYER_NUMEL * 4  # of 16 layers: the bucket in the making, and the next one
        assert in_optimizer <= buffers + shards


def test_stage_1_keeps_local_gradients_through_no_sync_only(gloo):
    for full, _ in gloo.run(2, peak_of_gradients, 1, True):
        assert full == TOTAL * 4
    for full, _ in gloo.run(2, peak_of_gradients, 1, False):
        assert full <= 2 * LAYER_NUMEL * 4


def watch_the_pool() -> None:
    model = deep_model()
    opt = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(bucket_numel=LAYER_NUMEL))
    taken, original = [], GradBufferPool.take

    def take(pool):
        buffer = original(pool)
        taken.append(buffer.flat.data_ptr())
        return buffer

    GradBufferPool.take = take
    try:
        train(model, opt, steps=3)
    finally:
        GradBufferPool.take = original
    assert len(taken) == 3 * LAYERS
    assert len(set(taken)) == GradBufferPool.DEPTH
    assert all(a != b for a, b in zip(taken, taken[1:], strict=False)), "a buffer was taken twice in a row"


def test_gradient_buffers_are_recycled(gloo):
    gloo.run(2, watch_the_pool)


def accumulate_over_a_bf16_wire() -> None:
    """With a bf16 wire and the backend's own sum, micro-batches are added in an fp32 buffer; it goes with the step."""
    model = deep_model(BF16)
    sharding = ShardingConfig(bucket_numel=LAYER_NUMEL, ordered_sum=False)
    opt = ShardedLion(model.parameters(), module=model, sharding=sharding)
    x = torch.randn(4, WIDTH).bfloat16()
    model(x).float().square().mean().backward()
    opt.grad_norm()  # all reductions are complete
    one_pass = opt.memory_bytes()["grads"]
    model(x).float().square().mean().backward()
    opt.grad_norm()
    shard_numel = sum(shard.exp_avg.numel() for shard in opt.shards)
    assert opt.memory_bytes()["grads"] == one_pass + 4 * shard_numel
    opt.step()
    assert opt.memory_bytes()["grads"] == one_pass


def test_fp32_accumulator_lives_for_one_step(gloo):
    gloo.run(2, accumulate_over_a_bf16_wire)


# ---- what is left when nobody needs it any more


def buckets_left(with_module: bool, backward: bool) -> int:
    model = deep_model()
    opt = ShardedLion(model.parameters(), module=model if with_module else None)
    if backward:
        train(model, opt)
    left = [weakref.ref(bucket) for bucket in opt.buckets]
    del model, opt
    gc.collect()
    return sum(bucket() is not None for bucket in left)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("with_module", [False, True])
def test_an_optimizer_and_a_model_that_are_forgotten_leave_no_bucket_behind(gloo, with_module, backward):
    """Their hooks on parameters once kept all of them: torch's hooks after accumulation hide cycles from Python's
    collector, so the second model of a sweep ran out of memory."""
    assert gloo.run(2, buckets_left, with_module, backward) == [0, 0]


def test_gradients_of_a_model_whose_optimizer_is_forgotten_stay_with_autograd():
    model = deep_model()
    opt = ShardedLion(model.parameters())
    del opt
    gc.collect()
    model(torch.ones(1, WIDTH)).sum().backward()
    assert all(param.grad is not None for param in model.parameters())
