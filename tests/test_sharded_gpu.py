"""ShardedLion on all GPUs, one rank each: by peer memory where they have it, and by NCCL, which sums in an order of its
own. So parity means: equal to ``Lion`` fed that run's reduced gradients and the same factor."""

import copy
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from tests.launch.jobs import meeting_place
from tests.models import GivenGradients
from tests.reduced_gradients import Sums, check_sums, reduced_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CASES = {
    "fp32 parameters": (torch.float32, PrecisionPolicy(), ShardingConfig(bucket_numel=70_000)),
    "fp32, bf16 momentum, stage 1": (
        torch.float32,
        PrecisionPolicy(momentum_dtype=torch.bfloat16),
        ShardingConfig(zero_stage=1, bucket_numel=70_000),
    ),
    "split": (torch.bfloat16, PrecisionPolicy(main_params="split"), ShardingConfig(bucket_numel=70_000)),
    "split, NCCL": (torch.bfloat16, PrecisionPolicy(), ShardingConfig(bucket_numel=70_000, peer_memory=False)),
    "fp32 main params, fp32 wire": (
        torch.bfloat16,
        PrecisionPolicy(main_params="fp32"),
        ShardingConfig(bucket_numel=70_000, reduce_dtype=torch.float32),
    ),
    "none, stochastic momentum, ordered sum": (
        torch.bfloat16,
        PrecisionPolicy(main_params="none", momentum_rounding="stochastic", seed=5),
        ShardingConfig(bucket_numel=70_000, ordered_sum=True),
    ),
    "fp32 parameters, coded": (
        torch.float32,
        PrecisionPolicy(),
        ShardingConfig(bucket_numel=70_000, param_sync="coded"),
    ),
    "split, coded": (
        torch.bfloat16,
        PrecisionPolicy(main_params="split"),
        ShardingConfig(bucket_numel=70_000, param_sync="coded"),
    ),
    "none, coded": (
        torch.bfloat16,
        PrecisionPolicy(main_params="none", seed=5),
        ShardingConfig(bucket_numel=70_000, param_sync="coded"),
    ),
}


def on_all_gpus(function, *args):
    store, where = meeting_place()
    ranks = torch.cuda.device_count()
    mp.spawn(_rank, args=(ranks, where, function, args), nprocs=ranks)
    del store  # until here: its port is the ranks'


def _rank(rank, world_size, where, function, args):
    os.environ.update(where)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=world_size, device_id=device)
    # Not destroyed after a failure: that waits for the other ranks, which wait for this one, and the error is not told.
    function(device, *args)
    torch.cuda.synchronize()
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, tokens):
        hidden = self.blocks(self.embedding(tokens))
        return nn.functional.cross_entropy(
            nn.functional.linear(hidden[:, :-1], self.embedding.weight).flatten(0, 1).float(), tokens[:, 1:].flatten()
        )


def build(device, case):
    dtype, precision, sharding = CASES[case]
    torch.manual_seed(0)
    model = Net().to(device, dtype)
    optimizer = ShardedLion(
        model.parameters(), lr=1e-3, weight_decay=0.1, module=model, precision=precision, sharding=sharding
    )
    return model, optimizer


def tokens_for(step, device):
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randint(1000, (4, 64), generator=generator).to(device)


def equals_lion_fed_its_reduced_gradients(device, case):
    model, optimizer = build(device, case)
    torch.manual_seed(0)
    twin = Net().to(device, CASES[case][0])
    reference = Lion(twin.parameters(), lr=1e-3, weight_decay=0.1, precision=CASES[case][1], use_triton=False)
    for step in range(6):
        for micro_batch in range(2):
            model(tokens_for(10 * step + micro_batch, device)).backward()
        optimizer.clip_grad_norm_(0.5)
        grads = reduced_gradients(optimizer)
        factor = optimizer._gradients.gradient_check.grad_scale(None)
        masters = [grads[p] for p in model.parameters()]
        for param, grad in zip(twin.parameters(), masters, strict=True):
            param.grad = None
            param.grad_dtype = grad.dtype
            param.grad = grad
        reference._scaling = lambda factor=factor: (factor, None)
        reference.step()
        optimizer.step()
        optimizer.finish_param_sync()
        for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(param, other), (step, name)


def never_waits_for_the_device(device):
    model, optimizer = build(device, "split")
    batches = [tokens_for(step, device) for step in range(6)]
    for step, batch in enumerate(batches):
        if step == 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")


def memory_stays_flat(device):
    model, optimizer = build(device, "split")
    peaks = []
    for step in range(60):
        optimizer.zero_grad()
        model(tokens_for(step, device)).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        if step in (20, 59):
            peaks.append(torch.cuda.max_memory_reserved(device))
    assert peaks[0] == peaks[1], peaks


def a_step_with_a_nan_is_skipped_everywhere(device):
    model, optimizer = build(device, "split")
    before = [p.clone() for p in model.parameters()]
    loss = model(tokens_for(0, device))
    (loss * (float("nan") if dist.get_rank() == 0 else 1.0)).backward()
    optimizer.step()
    optimizer.finish_param_sync()
    assert optimizer.skipped_steps() == 1
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(not shard.exp_avg.any() for shard in optimizer.shards)


def gradients_are_summed_in_rank_order(device, sharding, dtype):
    """Linear layers only: their backward gives the same bits each time."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))).to(device, torch.bfloat16)
    twin = copy.deepcopy(model)
    optimizer = ShardedLion(model.parameters(), module=model, sharding=ShardingConfig(**sharding))
    torch.manual_seed(1 + dist.get_rank())
    batch = torch.randn(64, 256, device=device, dtype=torch.bfloat16)
    for net in (model, twin):
        net(batch).float().square().mean().backward()
    found = reduced_gradients(optimizer)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        addends = [torch.empty_like(other.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(addends, other.grad)
        total = addends[0].float()
        for addend in addends[1:]:
            total += addend.float()
        assert torch.equal(found[param], total.to(dtype))


class Uneven(nn.Module):
    """Sizes that leave gaps in buckets; gradients that are transposed; a layer that the last rank does not use."""

    def __init__(self):
        super().__init__()
        self.first, self.optional, self.last = nn.Linear(255, 129), nn.Linear(129, 129), nn.Linear(129, 33)
        self.weight = nn.Parameter(torch.randn(63, 33))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = self.first(x)
        if dist.get_rank() < dist.get_world_size() - 1:
            x = x + self.optional(x)
        return (self.last(x) @ self.weight.t() * self.scale).float().square().mean()


def gradients_are_summed_whoever_is_late(device, wire):
    """Each step another rank is late, at another moment, and with two micro-batches every second step."""
    torch.manual_seed(0)
    model = Uneven().to(device, torch.bfloat16)
    twin = copy.deepcopy(model)
    sharding = ShardingConfig(bucket_numel=5000, peer_memory=True, reduce_dtype=wire, average=False)
    optimizer = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=sharding)
    rank, ranks, late = dist.get_rank(), dist.get_world_size(), torch.Generator().manual_seed(0)
    for step in range(40):
        expected = {}
        for micro_batch in range(1 + step % 2):
            batch = torch.randn(32, 255, device=device, dtype=torch.bfloat16)
            moments = torch.randint(0, 3, (ranks,), generator=late).tolist()
            if moments[rank] == 1:
                torch.cuda._sleep(3_000_000)
            loss = model(batch)
            if moments[rank] == 2:
                time.sleep(0.005)
            loss.backward()
            twin(batch).backward()
            for name, other in twin.named_parameters():
                grad = torch.zeros_like(other) if other.grad is None else other.grad
                addends = [torch.empty_like(grad) for _ in range(ranks)]
                dist.all_gather(addends, grad.contiguous())
                total = sum(addend.to(wire or grad.dtype).float() for addend in addends)
                if step % 2 == 0:
                    expected[name] = total.to(wire or grad.dtype)
                elif micro_batch == 0:
                    expected[name] = total.to(wire or grad.dtype).float()
                else:
                    expected[name] = expected[name] + total
                other.grad = None
        found = reduced_gradients(optimizer)
        for name, param in model.named_parameters():
            assert torch.equal(found[param], expected[name]), (step, name)
        norm = optimizer.clip_grad_norm_(1.0)
        squares = sum(grad.double().square().sum() for grad in expected.values())
        torch.testing.assert_close(norm, squares.sqrt().float(), rtol=1e-6, atol=0)
        optimizer.step()
        optimizer.finish_param_sync()
        twin.load_state_dict(model.state_dict())


def parameters_may_be_written_as_soon_as_they_are_whole(device):
    """One rank writes over its parameters at once; the others must not read that as its update."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).to(device, torch.bfloat16)
    optimizer = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=ShardingConfig(bucket_numel=2**21))
    for step in range(10):
        model(torch.randn(8, 1024, device=device, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        if dist.get_rank() == step % dist.get_world_size():
            torch.cuda._sleep(10_000_000)  # this rank comes late to the gather
        with torch.no_grad():
            kept = [param.clone() for param in model.parameters()]  # waits for them
            for param in model.parameters():
                param.fill_(torch.nan)
            for param, value in zip(model.parameters(), kept, strict=True):
                assert not value.isnan().any(), step
                param.copy_(value)


def gradients_are_kept_until_they_are_read(device, peer_memory):
    """Communication is late, and the memory that backward has let go of serves the program at once."""
    shapes, ranks = ((1 << 20,), (1 << 20,)), dist.get_world_size()
    model = GivenGradients(*shapes).to(device)
    sharding = ShardingConfig(bucket_numel=1 << 20, average=False, peer_memory=peer_memory)
    opt = ShardedLion(model.parameters(), lr=0.0, sharding=sharding)
    assert len(opt.buckets) == 2  # as many as may be kept: computation waits for none
    for step in range(6):  # over peer memory the first two run as they are, and the others are replayed
        with torch.cuda.stream(opt.buckets[0].stream.stream):
            torch.cuda._sleep(100_000_000)
        values = [float(10 * step + i + dist.get_rank()) for i in range(2)]
        for param, value, shape in zip(model.weights, values, shapes, strict=True):
            param.grad = torch.full(shape, value, device=device)
        model.loss([None, torch.zeros(shapes[1], device=device)]).backward()  # the pass takes all along
        written_over = [torch.full(shapes[0], torch.nan, device=device) for _ in range(8)]
        opt.grad_norm()
        found = reduced_gradients(opt)
        for i, param in enumerate(model.weights):
            assert (found[param] == ranks * (10 * step + i) + sum(range(ranks))).all(), (step, i)
        opt.step()
        del written_over


needs_peers = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@needs_peers
@pytest.mark.parametrize("ordered, dtype", [(False, torch.bfloat16), (True, torch.float32)], ids=["bf16", "fp32"])
def test_peer_memory_sums_gradients_in_rank_order(ordered, dtype):
    on_all_gpus(gradients_are_summed_in_rank_order, {"peer_memory": True, "ordered_sum": ordered}, dtype)


@needs_peers
@pytest.mark.parametrize("wire", [None, torch.float32], ids=["bf16", "fp32 wire"])
def test_peer_memory_sums_gradients_whoever_is_late(wire):
    on_all_gpus(gradients_are_summed_whoever_is_late, wire)


@needs_peers
def test_parameters_may_be_written_as_soon_as_they_are_whole():
    on_all_gpus(parameters_may_be_written_as_soon_as_they_are_whole)


SUMS = {
    "bf16": Sums(torch.bfloat16, ordered=False),
    "fp32 wire": Sums(torch.bfloat16, ordered=False, wire=torch.float32),
    "fp32": Sums(torch.float32, ordered=False),
    "in rank order": Sums(torch.bfloat16, ordered=True),
}


@needs_peers
@pytest.mark.parametrize("case", SUMS)
def test_nccl_sums_the_gradients_of_all_ranks(case):
    on_all_gpus(check_sums, SUMS[case])


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA GPUs")
@pytest.mark.parametrize("ordered", [False, True])
def test_nccl_sums_the_gradients_of_all_replicas(ordered):
    on_all_gpus(check_sums, Sums(torch.bfloat16, ordered=ordered, replicas=2))


@needs_peers
@pytest.mark.parametrize("peer_memory", [False, True], ids=["NCCL", "peer memory"])
def test_gradients_are_kept_until_they_are_read(peer_memory):
    on_all_gpus(gradients_are_kept_until_they_are_read, peer_memory)


@pytest.mark.parametrize("case", CASES)
def test_parameters_equal_lion_fed_the_reduced_gradients(case):
    on_all_gpus(equals_lion_fed_its_reduced_gradients, case)


def test_a_step_never_waits_for_the_device():
    on_all_gpus(never_waits_for_the_device)


def test_memory_does_not_creep():
    on_all_gpus(memory_stays_flat)


def test_a_nan_on_one_rank_skips_the_step_on_all():
    on_all_gpus(a_step_with_a_nan_is_skipped_everywhere)
