"""``skip_spikes``: a step far above those before is not taken, on any rank, and the window is state."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import lion_dist.checkpoint
from lion_dist import GradScaler, Lion, ShardedLion, ShardingConfig, SpikeGuard
from lion_dist.integrations.deepspeed_config import read_params
from lion_dist.spike_guard.watch import SpikeWatch
from lion_dist.triton_backend import blocks

GUARD = SpikeGuard(window=8, sigmas=6.0)
CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", "triton"])
def backend(request):
    if request.param == "triton" and not blocks.INTERPRETED.value:
        pytest.skip("the kernels are compiled here")
    return request.param


def verdicts(numbers, guard=GUARD, row="norm", backend="cpu"):
    watch = SpikeWatch(guard, CPU, backend)
    column = {"norm": lambda x: (x, None), "loss": lambda x: (None, x)}[row]
    return [bool(watch.verdict(*column(torch.tensor(x)), None)) for x in numbers], watch


def by_hand(numbers, window, sigmas):
    """The rule once more, with Python's own arithmetic."""
    last, found = [], []
    for x in numbers:
        known = last[-window:]
        spike = False
        if len(known) >= window // 2:
            mean = sum(known) / len(known)
            std = (sum((y - mean) ** 2 for y in known) / (len(known) - 1)) ** 0.5
            limit = mean + sigmas * max(std, 1e-6 * abs(mean))
            spike = x > limit
        found.append(spike)
        last.append(limit if spike else x)
    return found


# ---- the rule


@pytest.mark.parametrize("row", ["norm", "loss"])
def test_a_value_far_above_those_before_is_a_spike(row, backend):
    numbers = [1.0, 1.1, 0.9, 1.0, 1.05, 50.0, 1.0, 0.95]
    assert verdicts(numbers, row=row, backend=backend)[0] == [False] * 5 + [True] + [False] * 2


def test_the_verdicts_are_those_of_the_rule_by_hand(backend):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(100, generator=generator, dtype=torch.float64)
    numbers[::17] *= 9
    found, watch = verdicts(numbers.tolist(), SpikeGuard(window=12, sigmas=3.0), backend=backend)
    as_fp32 = [float(torch.tensor(x)) for x in numbers.tolist()]
    assert found == by_hand(as_fp32, 12, 3.0) and any(found)
    assert watch.report() == {"spikes": sum(found), "last_spike": 1 + max(i for i, x in enumerate(found) if x)}


def test_nothing_is_a_spike_before_half_the_window_is_filled():
    assert verdicts([1.0, 1.0, 1.0, 1e9])[0] == [False] * 4


def test_a_step_that_is_skipped_anyway_stays_so(backend):
    for skip in (0.0, 1.0):
        watch = SpikeWatch(GUARD, CPU, backend)
        assert watch.verdict(torch.tensor(1.0), None, torch.tensor([skip])).item() == skip


def test_norm_and_loss_have_windows_of_their_own(backend):
    watch = SpikeWatch(GUARD, CPU, backend)
    for i in range(5):
        watch.verdict(torch.tensor(1.0 + i / 10), torch.tensor(100.0 + i, dtype=torch.bfloat16), None)
    assert watch.verdict(torch.tensor(1.0), torch.tensor(100.0), None).item() == 0
    assert watch.verdict(torch.tensor(1.0), torch.tensor(900.0), None).item() == 1
    assert watch.verdict(torch.tensor(100.0), torch.tensor(100.0), None).item() == 1
    assert watch.report() == {"spikes": 2, "last_spike": 8}


def test_both_backends_hold_the_same_window():
    if not blocks.INTERPRETED.value:
        pytest.skip("the kernels are compiled here")
    numbers = [1.0, 1.1, 0.9, 1.0, 1.05, 50.0, 1.0, 0.95, 1.0, 1.1, 30.0]
    windows = [verdicts(numbers, backend=name)[1].state for name in ("cpu", "triton")]
    torch.testing.assert_close(*windows, rtol=1e-14, atol=0)


def test_equal_values_are_no_spikes():
    assert not any(verdicts([0.1] * 40)[0])


def test_a_spike_does_not_blind_the_guard_to_the_next():
    assert verdicts([1.0, 1.1, 0.9, 1.0, 1e6, 1e6])[0][-2:] == [True, True]


def test_values_that_stay_high_pass_in_the_end():
    found = verdicts([1.0, 1.1, 0.9, 1.0] + [30.0] * 60)[0]
    assert found[4] and not any(found[-20:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_no_spike_and_does_not_enter(bad, backend):
    found, watch = verdicts([1.0, 1.1, 0.9, 1.0, bad], backend=backend)
    without = verdicts([1.0, 1.1, 0.9, 1.0], backend=backend)[1]
    assert not any(found) and torch.equal(watch.state[:18], without.state[:18])


def test_a_norm_that_is_a_spike_can_be_clipped_to_the_limit(backend):
    watch = SpikeWatch(SpikeGuard(window=8, sigmas=6.0, clip=True), CPU, backend)
    norms = [1.0, 1.1, 0.9, 1.0, 1.05, 50.0, 1.0]
    found = []
    for norm in norms:
        assert watch.verdict(torch.tensor(norm), None, None).item() == 0
        found.append(watch.clip_coefficient.item())
    mean = sum(norms[:5]) / 5
    limit = mean + 6 * (sum((x - mean) ** 2 for x in norms[:5]) / 4) ** 0.5
    assert [x for i, x in enumerate(found) if i != 5] == [1.0] * 6
    assert found[5] == pytest.approx(limit / 50.0, rel=1e-6)
    assert watch.report() == {"spikes": 1, "last_spike": 6}


def test_a_loss_that_is_a_spike_skips_a_guard_that_clips_too(backend):
    watch = SpikeWatch(SpikeGuard(window=8, sigmas=6.0, clip=True), CPU, backend)
    skipped = [watch.verdict(torch.tensor(1.0), torch.tensor(x), None).item() for x in (1.0, 1.1, 0.9, 1.0, 50.0)]
    assert skipped == [0, 0, 0, 0, 1] and watch.clip_coefficient.item() == 1


@pytest.mark.parametrize(
    "settings", [{"clip": 1}, {"window": 1}, {"window": 2.5}, {"sigmas": 0.0}, {"sigmas": float("nan")}]
)
def test_a_guard_that_cannot_judge_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SpikeGuard(**settings)


# ---- Lion


def trained(steps, poisoned=(), **options):
    """A parameter after steps on gradients of norm near 1, and of 1000 in the poisoned ones."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(50))
    opt = Lion([param], lr=1e-2, weight_decay=0.1, skip_spikes=GUARD, **options)
    history = []
    for step in range(steps):
        take(param, opt, step, step in poisoned)
        history.append((param.detach().clone(), opt.state[param]["exp_avg"].clone()))
    return param, opt, history


def take(param, opt, step, is_poisoned=False):
    generator = torch.Generator().manual_seed(step)
    param.grad = torch.randn(50, generator=generator) / 50**0.5 * (1000 if is_poisoned else 1)
    opt.step()


def test_a_spike_leaves_weights_and_momentum_and_is_counted():
    _, opt, history = trained(9, poisoned=[7], metrics_every=1)
    assert all(torch.equal(a, b) for a, b in zip(history[6], history[7], strict=True))
    assert not torch.equal(history[7][0], history[8][0])
    metrics = opt.metrics()
    assert (metrics["spikes"], metrics["last_spike"], metrics["skipped_steps"]) == (1, 8, 1)


def test_a_loss_that_is_handed_over_is_judged_once():
    param, opt, _ = trained(6)
    for step in range(6, 12):
        opt.observe(loss=torch.tensor(2.0))
        take(param, opt, step)
    before = param.detach().clone()
    opt.observe(loss=torch.tensor(40.0))
    take(param, opt, 12)
    assert torch.equal(param, before)
    take(param, opt, 13)
    assert not torch.equal(param, before)


def test_a_norm_that_is_handed_over_takes_the_place_of_the_gradients():
    param, opt, _ = trained(6)
    before = param.detach().clone()
    param.grad = torch.full((50,), 1e3)
    opt.observe(grad_norm=torch.nn.utils.clip_grad_norm_([param], 1.0))
    opt.step()
    assert torch.equal(param, before)


def test_the_norm_is_judged_unscaled():
    param, opt, _ = trained(6)
    for step, scale in enumerate([2.0, 2.0**16, 2.0**3]):
        before = param.detach().clone()
        param.grad = torch.randn(50, generator=torch.Generator().manual_seed(step)) / 50**0.5 * scale
        opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)
        opt.step()
        assert not torch.equal(param, before)


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_the_window_is_saved_and_restored_by_bits(way):
    param, opt, _ = trained(11, poisoned=[7])
    if way == "state_dict":
        other = Lion([param], lr=1e-2, skip_spikes=GUARD)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        other = pickle.loads(pickle.dumps(opt)) if way == "pickle" else copy.deepcopy(opt)
    assert torch.equal(other.spike_window, opt.spike_window)
    other._spikes.verdict(torch.tensor(1.0), None, None)
    assert not torch.equal(other.spike_window, opt.spike_window)


def test_a_window_of_another_size_is_refused_and_nothing_is_changed():
    param, opt, _ = trained(5)
    other = Lion([param], lr=1e-2, skip_spikes=SpikeGuard(window=16))
    with pytest.raises(ValueError, match="a window of 16 steps"):
        other.load_state_dict(opt.state_dict())
    assert not other.state


def test_a_state_without_a_window_begins_anew():
    param, opt, _ = trained(5)
    plain = Lion([param], lr=1e-2)
    plain.load_state_dict(opt.state_dict())
    opt.load_state_dict(plain.state_dict())
    assert not opt.spike_window.any()


def test_observe_without_a_guard_is_refused():
    with pytest.raises(RuntimeError, match="construct the optimizer with skip_spikes"):
        Lion([nn.Parameter(torch.ones(3))]).observe(loss=torch.tensor(1.0))


def test_a_float_loss_is_refused():
    with pytest.raises(ValueError, match="loss must be a tensor"):
        Lion([nn.Parameter(torch.ones(3))], skip_spikes=GUARD).observe(loss=1.0)


def test_deepspeed_refuses_the_guard():
    with pytest.raises(ValueError, match='"skip_spikes" does not go with Lion under DeepSpeed'):
        read_params({"skip_spikes": True})


def test_lion_takes_the_step_of_a_spike_with_clipped_gradients():
    weights = [nn.Parameter(torch.zeros(4, dtype=torch.float64).float()) for _ in range(2)]
    guarded = Lion([weights[0]], lr=1e-2, betas=(0.9, 0.5), skip_spikes=SpikeGuard(window=8, clip=True))
    by_hand = Lion([weights[1]], lr=1e-2, betas=(0.9, 0.5))
    for step in range(8):
        grad = torch.tensor([1.0, -2.0, 0.5, 0.25]) * (1 + step % 3 / 10)
        weights[0].grad = grad * (1024 if step == 6 else 1)
        guarded.step()
        weights[1].grad = weights[0].grad * (guarded._spike_watch().clip_coefficient if step == 6 else 1)
        by_hand.step()
    assert torch.equal(*weights) and guarded._spike_watch().clip_coefficient.item() == 1
    momenta = [opt.state[w]["exp_avg"] for opt, w in zip((guarded, by_hand), weights, strict=True)]
    assert torch.equal(*momenta) and guarded._spike_watch().report()["last_spike"] == 7


def test_a_norm_that_is_handed_over_does_not_go_with_clipping():
    opt = Lion([nn.Parameter(torch.ones(3))], skip_spikes=SpikeGuard(clip=True))
    with pytest.raises(ValueError, match=r"observe\(grad_norm=...\) does not go with SpikeGuard\(clip=True\)"):
        opt.observe(grad_norm=torch.tensor(1.0))


# ---- ranks


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 37), nn.ReLU(), nn.Linear(37, 5))


def backward(model, step, rank, is_poisoned=False):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    loss = model(torch.randn(16, 13, generator=generator)).square().mean()
    (loss * (1e4 if is_poisoned else 1)).backward()
    return loss.detach()


STEPS, POISONED = 10, 7


def sharded_skips_with_one_rank(param_sync):
    """The last rank's batch is poisoned: all skip, and the steps after are the same as ever."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model = make_model()
    sharding = ShardingConfig(bucket_numel=300, param_sync=param_sync)
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, sharding=sharding, skip_spikes=GUARD, metrics_every=1)
    for step in range(STEPS):
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, step, rank, is_poisoned=step == POISONED and rank == last)
        if step % 2:
            opt.clip_grad_norm_(0.5)  # the norm before clipping is judged
        opt.step()
        opt.finish_param_sync()
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert same == (step == POISONED), step
    assert opt.skipped_steps() == 1 and opt.taken_steps() == STEPS - 1
    metrics = opt.metrics()
    assert (metrics["spikes"], metrics["last_spike"]) == (1, POISONED + 1)
    return [p.tolist() for p in model.parameters()], opt.spike_window.tolist()


@pytest.mark.parametrize("ranks, param_sync", [(1, "gather"), (2, "gather"), (2, "coded")])
def test_all_ranks_skip_when_one_has_a_spike(gloo, ranks, param_sync):
    first, *others = gloo.run(ranks, sharded_skips_with_one_rank, param_sync)
    assert all(other == first for other in others)


def sharded_clips(max_norm):
    """The step of a spike is that of gradients which clip_grad_norm_() has brought down to the limit, or lower."""
    rank, trained, limit = dist.get_rank(), {}, 0.0
    for clips in (True, False):
        model = make_model()
        guard = SpikeGuard(window=8, sigmas=6.0, clip=True) if clips else None
        opt = ShardedLion(model.parameters(), lr=1e-3, betas=(0.9, 0.5), module=model, skip_spikes=guard)
        for step in range(STEPS):
            backward(model, step, rank, is_poisoned=step == POISONED and rank == 1)
            norm = opt.grad_norm()
            if max_norm is not None:
                opt.clip_grad_norm_(max_norm)
            elif not clips and step == POISONED:
                opt.clip_grad_norm_(limit)
            opt.step()
            if clips and step == POISONED:
                coefficient = opt._gradients.spikes.clip_coefficient
                assert coefficient < 0.1
                limit = (coefficient * norm).item()
        opt.finish_param_sync()
        assert opt.skipped_steps() == 0
        trained[clips] = [p.detach().clone() for p in model.parameters()]
    for p, q in zip(trained[True], trained[False], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [None, 1e-3])
def test_all_ranks_clip_a_spike(gloo, max_norm):
    gloo.run(2, sharded_clips, max_norm)


def sharded_judges_the_mean_loss():
    rank = dist.get_rank()
    model = make_model()
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, skip_spikes=GUARD)
    for step in range(STEPS):
        loss = backward(model, step, rank)
        opt.observe(loss + 1000 * (step == POISONED and rank == 1))
        opt.step()
    return opt.skipped_steps()


def test_the_mean_loss_over_ranks_is_judged(gloo):
    assert gloo.run(2, sharded_judges_the_mean_loss) == [1, 1]


def sharded_under_a_scaler():
    model, scaler = make_model(), GradScaler("cpu", init_scale=2.0**10)
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, skip_spikes=GUARD)
    for step in range(STEPS):
        loss = model(torch.randn(16, 13, generator=torch.Generator().manual_seed(step))).square().mean()
        scaler.scale(loss * (1e4 if step == POISONED else 1)).backward()
        scaler.step(opt)
        scaler.update(2.0 ** (10 + step % 3))
    return opt.skipped_steps()


def test_under_a_grad_scaler_the_unscaled_norm_is_judged(gloo):
    assert gloo.run(2, sharded_under_a_scaler) == [1, 1]


def fsdp2_skips():
    rank = dist.get_rank()
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    opt = Lion(model.parameters(), lr=1e-3, skip_spikes=GUARD)
    changed = []
    for step in range(STEPS):
        before = [p.full_tensor().clone() for p in model.parameters()]
        backward(model, step, rank, is_poisoned=step == POISONED and rank == 1)
        opt.step()
        opt.zero_grad()
        changed.append(
            any(not torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), before, strict=True))
        )
    return changed, opt.spike_window.tolist()


def test_fsdp2_shards_skip_together(gloo):
    first, second = gloo.run(2, fsdp2_skips)
    assert first == second and first[0] == [step != POISONED for step in range(STEPS)]


def refused_under_fsdp1():
    model = FullyShardedDataParallel(nn.Linear(5, 4), device_id=CPU, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="skip_spikes needs the norm over all ranks' gradients"):
        Lion(model.parameters(), skip_spikes=GUARD)


def test_fsdp1_is_refused_with_the_reason(gloo):
    gloo.run(2, refused_under_fsdp1)


def saved_everywhere(path):
    """A checkpoint directory, a state dict of each rank and the consolidated one hold the window by bits."""
    rank, model = dist.get_rank(), make_model()
    opt = ShardedLion(model.parameters(), lr=1e-3, module=model, skip_spikes=GUARD)
    for step in range(STEPS):
        backward(model, step, rank, is_poisoned=step == POISONED)
        opt.step()
    lion_dist.checkpoint.save(path / "saved", model=model, optimizer=opt)
    own = opt.state_dict()
    opt.consolidate_state_dict()
    found = []
    for state in ("directory", own, opt.full_state_dict()):
        other = make_model()
        loaded = ShardedLion(other.parameters(), lr=1e-3, module=other, skip_spikes=GUARD)
        if state == "directory":
            lion_dist.checkpoint.load(path / "saved", model=other, optimizer=loaded)
        else:
            loaded.load_state_dict(state)
        found.append(torch.equal(loaded.spike_window, opt.spike_window))
    other = make_model()
    unguarded = ShardedLion(other.parameters(), lr=1e-3, module=other)
    lion_dist.checkpoint.load(path / "saved", model=other, optimizer=unguarded)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))
    return found


def test_the_window_is_in_every_kind_of_checkpoint(gloo, tmp_path):
    (found,) = gloo.run(1, saved_everywhere, tmp_path)
    assert found == [True] * 3


def test_updates_in_backward_are_refused(gloo):
    gloo.run(1, updates_in_backward)


def updates_in_backward():
    with pytest.raises(ValueError, match="skip_spikes"):
        sharding = ShardingConfig(update_in_backward=True)
        ShardedLion([nn.Parameter(torch.ones(3))], sharding=sharding, skip_spikes=GUARD)


def test_the_kernel_compiles_for_hopper_and_fuses_nothing(compiled_by):
    instructions = compiled_by("tests.compile_guard_ahead")
    assert not [op for op in instructions if op.startswith("fma.")]
    assert instructions["mul.rn.f64"] and instructions["add.rn.f64"]
