"""FSDP2 and FSDP1 over NCCL on one GPU, a group of one rank: the Triton kernel on the engines' own shards.

python -m pytest -m gpu tests/integrations/test_fsdp_gpu.py
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from lion_dist import Lion, PrecisionPolicy
from tests.integrations.fsdp_ranks import BF16, FP32, POLICIES, SETTINGS, Net, Twin, full, inputs, shard, train
from tests.integrations.test_fsdp2_recipes import step_in_backward
from tests.test_optimizer_dtensor import RefuseDTensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(scope="module")
def mesh():
    """gloo too: CPUOffloadPolicy leaves gradients on the CPU, and gathering them is a collective there."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, device_id=device)
    yield init_device_mesh("cuda", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def make(mesh, policy: str, **options) -> tuple[Net, Lion, Twin]:
    """The twin runs on PyTorch operations, beside the shards."""
    dtype, precision = POLICIES[policy]
    settings = SETTINGS | {"precision": precision}
    model = Net(dtype).cuda()
    twin = Twin(model, use_triton=False, **settings)
    shard(model, mesh, **options)
    return model, Lion(model.parameters(), **settings), twin


@pytest.mark.parametrize("policy", POLICIES)
def test_steps_equal_plain_lion_fed_the_reduced_gradients(mesh, policy):
    model, opt, twin = make(mesh, policy)
    train(model, opt, twin, steps=5, device="cuda")
    twin.assert_equal(model, opt)


@pytest.mark.parametrize("policy", ["fp32", "split"])
def test_mixed_precision_and_clipping(mesh, policy):
    model, opt, twin = make(mesh, policy, mp_policy=MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32))
    train(model, opt, twin, device="cuda", before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    twin.assert_equal(model, opt)


@pytest.mark.parametrize("policy", ["fp32", "split"])
def test_cpu_offload_policy(mesh, policy):
    model, opt, twin = make(mesh, policy, offload_policy=CPUOffloadPolicy())
    twin.model.cpu()
    train(model, opt, twin, device="cuda")
    assert {p.to_local().device.type for p in model.parameters()} == {"cpu"}
    twin.assert_equal(model, opt)


def test_compiled_blocks(mesh):
    model, opt, twin = make(mesh, "split")
    for block in model.blocks:
        block.compile()
    train(model, opt, twin, device="cuda")
    twin.assert_equal(model, opt)


@pytest.mark.parametrize("policy", ["fp32", "split"])
def test_optimizer_in_backward_equals_step_after_it(mesh, policy):
    """The hooks run on FSDP2's stream of reduce-scatters; the next forward waits for it."""
    model, opt, _ = make(mesh, policy)
    other, _, _ = make(mesh, policy)
    dtype, precision = POLICIES[policy]
    step_in_backward(other, **SETTINGS, precision=precision)
    for step in range(20):
        opt.zero_grad()
        model(inputs(step, dtype=dtype).cuda()).backward()
        opt.step()
        other(inputs(step, dtype=dtype).cuda()).backward()
    for param, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(full(param), full(theirs))


def test_a_step_asks_dtensor_for_nothing_and_never_waits_for_the_device(mesh):
    model, opt, _ = make(mesh, "split")
    for step in range(4):
        opt.zero_grad()
        model(inputs(step, dtype=BF16).cuda()).backward()
        if step < 2:
            opt.step()
            continue
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with RefuseDTensors():
                opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_state_takes_four_bytes_a_parameter_and_a_step_none(mesh):
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(4096, 4096, bias=False, device="cuda", dtype=BF16), mesh=mesh)
    opt = Lion(model.parameters(), **SETTINGS, precision=PrecisionPolicy("split"))
    model(torch.randn(8, 4096, device="cuda", dtype=BF16)).float().square().mean().backward()
    before = torch.cuda.memory_allocated()
    opt.step()
    state = torch.cuda.memory_allocated() - before
    assert state == pytest.approx(4 * 4096 * 4096, rel=0.01)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    opt.step()
    assert torch.cuda.max_memory_allocated() - held < 2**20


def test_grad_scaler_skips_an_overflow_and_goes_on(mesh):
    model, opt, _ = make(mesh, "fp32", mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    moved = []
    for step in range(3):
        opt.zero_grad()
        loss = model(inputs(step).cuda())
        scaler.scale(loss * (torch.inf if step == 1 else 1.0)).backward()
        before = [full(p) for p in model.parameters()]
        scaler.step(opt)
        scaler.update()
        moved.append(any(not torch.equal(full(p), old) for p, old in zip(model.parameters(), before, strict=True)))
    assert moved == [True, False, True] and scaler.get_scale() == 2.0**9


def test_whole_state_dict_goes_through_nccl(mesh):
    """Which moves no int16: the remainders travel as bf16."""
    model, opt, twin = make(mesh, "split")
    train(model, opt, twin, device="cuda")
    state = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
    other, other_opt, _ = make(mesh, "split")
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.to_local().copy_(theirs.to_local())
    set_optimizer_state_dict(other, other_opt, copy.deepcopy(state), options=StateDictOptions(full_state_dict=True))
    twin.assert_equal(other, other_opt)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_trains_saves_and_loads(mesh, use_orig_params):
    def make_fsdp1() -> tuple[FullyShardedDataParallel, Lion]:
        model = FullyShardedDataParallel(Net(BF16), device_id=torch.device("cuda", 0), use_orig_params=use_orig_params)
        return model, Lion(model.parameters(), **SETTINGS, precision=PrecisionPolicy("split"))

    def step(model, opt, number: int) -> None:
        opt.zero_grad()
        model(inputs(number, dtype=BF16).cuda()).backward()
        opt.step()

    model, opt = make_fsdp1()
    for number in range(3):
        step(model, opt, number)
    saved = copy.deepcopy((model.state_dict(), FullyShardedDataParallel.optim_state_dict(model, opt)))
    other, other_opt = make_fsdp1()
    other.load_state_dict(saved[0])
    other_opt.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(other, other_opt, saved[1]))
    for number in range(3, 6):
        step(model, opt, number), step(other, other_opt, number)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
