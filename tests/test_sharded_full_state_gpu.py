"""The whole state over NCCL and out of peer memory: consolidated, and through torch's state-dict functions."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from tests.full_states import assert_same_tensors, bits
from tests.test_sharded_gpu import on_all_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

POLICIES = {
    "fp32": (torch.float32, PrecisionPolicy()),
    "split": (torch.bfloat16, PrecisionPolicy(main_params="split")),
    "stochastic": (torch.bfloat16, PrecisionPolicy(main_params="none", momentum_rounding="stochastic", seed=5)),
}


def trained(policy: str, steps: int = 2) -> tuple[nn.Module, ShardedLion]:
    dtype, precision = POLICIES[policy]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 70), nn.GELU(), nn.Linear(70, 51)).to("cuda", dtype)
    sharding = ShardingConfig(bucket_numel=3000)
    opt = ShardedLion(model.parameters(), lr=1e-2, module=model, precision=precision, sharding=sharding)
    for _ in range(steps):
        opt.zero_grad()
        model(torch.ones(4, 33, device="cuda", dtype=dtype)).float().square().mean().backward()
        opt.step()
    return model, opt


def live(opt: ShardedLion) -> list:
    tensors = [x for s in opt.shards for x in (s.exp_avg, s.main_param, s.steps) if x is not None]
    return [bits(x).clone() for x in (*tensors, opt.counters)]


def whole_state(_device, policy: str, path: str) -> None:
    model, opt = trained(policy)
    before = live(opt)
    full = StateDictOptions(full_state_dict=True)
    gathered = copy.deepcopy(get_optimizer_state_dict(model, opt, options=full))
    opt.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        whole = opt.full_state_dict()
        assert all(value.device.type == "cpu" for kinds in whole["state"].values() for value in kinds.values())
        in_order = {"state": dict(enumerate(gathered["state"].values()))}
        assert_same_tensors(copied_to_cpu(in_order), whole)  # torch's has the counters, too
        plain = Lion(model.parameters(), precision=opt.precision)
        plain.load_state_dict(whole)
        torch.save(whole, path)
    dist.barrier()
    for load in (
        lambda o: o.load_state_dict(torch.load(path)),
        lambda o: set_optimizer_state_dict(model, o, copy.deepcopy(gathered), options=full),
        lambda o: set_optimizer_state_dict(
            model,
            o,
            copy.deepcopy(gathered) if dist.get_rank() == 0 else {},
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        ),
    ):
        for shard in opt.shards:
            for tensor in shard.slices_of(shard.exp_avg):
                tensor.zero_()
        load(opt)
        assert all(map(torch.equal, live(opt), before))
    for options in (StateDictOptions(), StateDictOptions(cpu_offload=True)):
        state = {"optim": get_optimizer_state_dict(model, opt, options=options)}
        dcp.save(state, checkpoint_id=path + ".dcp")
        for shard in opt.shards:
            for tensor in shard.slices_of(shard.exp_avg):
                tensor.zero_()
        dcp.load(state, checkpoint_id=path + ".dcp")
        set_optimizer_state_dict(model, opt, state["optim"], options=options)
        assert all(map(torch.equal, live(opt), before))


def copied_to_cpu(state: dict) -> dict:
    return {"state": {i: {kind: value.cpu() for kind, value in kinds.items()} for i, kinds in state["state"].items()}}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_whole_state_by_either_way_comes_back_bit_identical(tmp_path, policy):
    on_all_gpus(whole_state, policy, str(tmp_path / "o.pt"))
