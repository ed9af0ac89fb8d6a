"""``ema_decay`` of ``ShardedLion``: averages lie in shards, and the context puts them into every rank's model."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lion_dist.checkpoint
from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.triton_backend import blocks
from tests.oracle import assert_same_on_all_ranks

FP32, BF16 = torch.float32, torch.bfloat16
DECAY, LR = 0.9, 1e-2
POLICIES = {
    "fp32": (FP32, PrecisionPolicy()),
    "fp32 main": (BF16, PrecisionPolicy("fp32", momentum_dtype=FP32)),
    "split, bf16 average": (BF16, PrecisionPolicy("split", ema_dtype=BF16)),
    "none, bf16 average": (BF16, PrecisionPolicy("none", momentum_rounding="stochastic", ema_dtype=BF16, seed=3)),
}
BACKWARD_INSIDE = r"a backward pass inside averaged_parameters\(\).*Leave the context first"
SHARDINGS = {
    "stage 2": {},
    "stage 1": {"zero_stage": 1},
    "coded": {"param_sync": "coded"},
    "in backward": {"update_in_backward": True},
}


def new_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 37), nn.ReLU(), nn.Linear(37, 5), nn.Linear(5, 1)).to(dtype)


def settings(policy: str, **more) -> dict:
    return {"lr": LR, "weight_decay": 0.1, "precision": POLICIES[policy][1], "ema_decay": DECAY} | more


def make(policy: str, sharding: dict | None = None, **more) -> tuple[nn.Module, ShardedLion]:
    model = new_model(POLICIES[policy][0])
    config = ShardingConfig(bucket_numel=300, **(sharding or {}))
    return model, ShardedLion(model.parameters(), module=model, sharding=config, **settings(policy, **more))


def backward(model: nn.Module, step: int) -> None:
    """Every rank has the same batch, so the mean gradient is the same to the bit on 1, 2 and 4 ranks."""
    x = torch.randn(4, 13, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    model(x).float().square().mean().backward()


def train(pairs, steps: range) -> None:
    for step in steps:
        for model, opt in pairs:
            backward(model, step)
            opt.step()
            opt.zero_grad()


def plain(policy: str, steps: range, **more) -> tuple[nn.Module, Lion]:
    model = new_model(POLICIES[policy][0])
    opt = Lion(model.parameters(), **settings(policy, **more))
    train([(model, opt)], steps)
    return model, opt


def bits_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone().view(torch.uint8) for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def assert_averages(opt: ShardedLion, model: nn.Module, lion: Lion, expected: nn.Module) -> None:
    """This rank's slices of the average are the unsharded Lion's."""
    counterpart = dict(zip(model.parameters(), expected.parameters(), strict=True))
    for shard in opt.shards:
        for part, piece in zip(shard.bucket.slices, shard.slices_of(shard.weight_avg), strict=True):
            full = lion.state[counterpart[shard.bucket.params[part.param]]]["weight_avg"]
            assert piece.dtype == full.dtype
            assert torch.equal(piece, full.flatten()[part.param_start : part.param_stop])


def average_and_go_on(policy: str, sharding: dict, use_triton: bool | None = None) -> None:
    model, opt = make(policy, sharding, use_triton=use_triton)
    train([(model, opt)], range(3))
    expected, lion = plain(policy, range(3))
    assert_averages(opt, model, lion, expected)
    opt.finish_param_sync()
    before = bits_of(model)
    with opt.averaged_parameters(), lion.averaged_parameters():
        assert same(bits_of(model), bits_of(expected)) and not same(bits_of(model), before)
        model(torch.zeros(1, 13, dtype=POLICIES[policy][0]))
        assert_same_on_all_ranks(model)
    assert same(bits_of(model), before)
    train([(model, opt), (expected, lion)], range(3, 5))
    opt.finish_param_sync()
    assert same(bits_of(model), bits_of(expected))
    assert_averages(opt, model, lion, expected)


@pytest.mark.parametrize(
    ("policy", "sharding", "world_size"),
    [(policy, "stage 2", 2) for policy in POLICIES]
    + [("none, bf16 average", sharding, 2) for sharding in SHARDINGS if sharding != "stage 2"]
    + [("split, bf16 average", "coded", 2), ("split, bf16 average", "stage 2", 1), ("fp32 main", "stage 2", 4)],
)
def test_averages_are_those_of_lion_and_leave_the_training_as_it_was(gloo, policy, sharding, world_size):
    gloo.run(world_size, average_and_go_on, policy, SHARDINGS[sharding])


def test_codes_follow_an_update_with_averages_by_the_kernels_that_gpus_run(gloo):
    """Codes come from a launch of their own then: the fused one knows no averages."""
    if not blocks.INTERPRETED.value:
        pytest.skip("the kernels are compiled here")
    gloo.run(2, average_and_go_on, "split, bf16 average", SHARDINGS["coded"], True)


def measure_with_an_average() -> None:
    (model, opt), (other, plainly) = make("fp32", metrics_every=1), make("fp32", metrics_every=1, ema_decay=None)
    train([(model, opt), (other, plainly)], range(2))
    found, expected = opt.metrics(), plainly.metrics()
    assert found.keys() == expected.keys() and found["update_norm"] == expected["update_norm"]


def test_metrics_are_those_without_an_average(gloo):
    gloo.run(2, measure_with_an_average)


def hybrid_ranks_hold_the_same() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = new_model(FP32)
    opt = ShardedLion(model.parameters(), module=model, process_group=mesh, **settings("fp32"))
    train([(model, opt)], range(2))
    expected, lion = plain("fp32", range(2))
    with opt.averaged_parameters(), lion.averaged_parameters():
        assert same(bits_of(model), bits_of(expected))
    opt.resync_params()
    assert_averages(opt, model, lion, expected)


def test_replicas_of_a_shard_average_alike(gloo):
    gloo.run(4, hybrid_ranks_hold_the_same)


def accumulate_and_skip() -> None:
    model, opt = make("fp32")
    train([(model, opt)], range(1))
    backward(model, 1)
    before = [shard.weight_avg.clone() for shard in opt.shards]
    backward(model, 2)
    assert all(torch.equal(shard.weight_avg, old) for shard, old in zip(opt.shards, before, strict=True))
    opt.step()
    assert not any(torch.equal(shard.weight_avg, old) for shard, old in zip(opt.shards, before, strict=True))
    before = [shard.weight_avg.clone() for shard in opt.shards]
    (model(torch.ones(1, 13)).sum() * float("nan" if dist.get_rank() == 0 else 1)).backward()
    opt.step()
    assert opt.skipped_steps() == 1
    assert all(torch.equal(shard.weight_avg, old) for shard, old in zip(opt.shards, before, strict=True))


def test_accumulation_moves_the_average_once_and_a_skipped_step_does_not(gloo):
    gloo.run(2, accumulate_and_skip)


def fail_on_one_rank() -> None:
    model, opt = make("split, bf16 average")
    train([(model, opt)], range(2))
    opt.finish_param_sync()
    before = bits_of(model)
    try:
        with opt.averaged_parameters():
            if dist.get_rank() == 1:
                raise KeyError
    except KeyError:
        assert dist.get_rank() == 1
    assert same(bits_of(model), before)
    train([(model, opt)], range(2, 3))


def test_an_exception_on_one_rank_brings_its_parameters_back_without_the_others(gloo):
    gloo.run(2, fail_on_one_rank)


def refuse_inside(tmp_path) -> None:
    model, opt = make("split, bf16 average")
    train([(model, opt)], range(2))
    opt.finish_param_sync()
    before, saved = bits_of(model), opt.state_dict()
    calls = {
        "step": opt.step,
        "state_dict": opt.state_dict,
        "load_state_dict": lambda: opt.load_state_dict(saved),
        "consolidate": opt.consolidate_state_dict,
        "check_replicas": opt.check_replicas,
        "resync": opt.resync_params,
        "refresh": opt.refresh_main_params,
        "save": lambda: lion_dist.checkpoint.save(tmp_path / "c", model=model, optimizer=opt),
        "save_async": lambda: lion_dist.checkpoint.save_async(tmp_path / "c", model=model, optimizer=opt),
        "replay": opt.before_replay,  # of a captured step
        "again": lambda: opt.averaged_parameters().__enter__(),
    }
    for name, call in calls.items():
        with opt.averaged_parameters():
            with pytest.raises(RuntimeError, match=r"inside averaged_parameters\(\), .*Leave the context first"):
                call()
                raise AssertionError(f"{name} is not refused")
        assert same(bits_of(model), before)
    train([(model, opt)], range(2, 3))


def test_what_needs_the_weights_is_refused_inside(gloo, tmp_path):
    gloo.run(2, refuse_inside, tmp_path)


def backward_inside(sharding: dict) -> None:
    (model, opt), (other, untouched) = make("fp32", sharding), make("fp32", sharding)
    train([(model, opt), (other, untouched)], range(2))
    for pair in ((model, opt), (other, untouched)):
        backward(pair[0], 2)
        if pair[1] is opt and "update_in_backward" not in sharding:
            before = [shard.bucket.grad_state for shard in opt.shards]
        if pair[1] is opt:
            with opt.averaged_parameters(), pytest.raises(RuntimeError, match=BACKWARD_INSIDE):
                backward(model, 7)
            if "update_in_backward" not in sharding:
                assert [shard.bucket.grad_state for shard in opt.shards] == before
        pair[1].step()
        pair[1].zero_grad()
    train([(model, opt), (other, untouched)], range(3, 5))
    opt.finish_param_sync()
    untouched.finish_param_sync()
    assert same(bits_of(model), bits_of(other))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_backward_inside_is_refused_and_the_step_goes_on_as_if_nobody_had_tried(gloo, sharding):
    gloo.run(2, backward_inside, SHARDINGS[sharding])


def load_model_after_construction() -> None:
    model, opt = make("fp32")
    torch.manual_seed(5)
    model.load_state_dict({name: torch.randn_like(p) for name, p in model.state_dict().items()})
    loaded = bits_of(model)
    with opt.averaged_parameters():
        assert same(bits_of(model), loaded)
    train([(model, opt)], range(1))
    opt.finish_param_sync()
    start = [p.clone() for p in model.state_dict().values()]
    with torch.no_grad():
        model[0].weight.zero_()  # an average that has begun keeps what it was
    with opt.averaged_parameters():
        assert torch.allclose(model[0].weight, start[0], atol=2 * LR)


def test_the_average_begins_at_a_model_that_is_loaded_before_the_first_step(gloo):
    gloo.run(2, load_model_after_construction)


def bytes_of_averages(dtype: torch.dtype) -> dict[str, int]:
    model = new_model(BF16)
    policy = PrecisionPolicy("split", ema_dtype=dtype)
    opt = ShardedLion(model.parameters(), module=model, precision=policy, ema_decay=DECAY)
    return opt.memory_bytes()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_rank_keeps_the_average_of_its_own_part_only(gloo, dtype):
    for memory in gloo.run(2, bytes_of_averages, dtype):
        assert memory["weight_avg"] == memory["params"] // 2 // 2 * dtype.itemsize


# ---- saved and loaded


def save(path, policy: str) -> None:
    model, opt = make(policy)
    train([(model, opt)], range(3))
    lion_dist.checkpoint.save(path, model=model, optimizer=opt)


def load(path, policy: str, engine: str) -> None:
    if engine == "sharded":
        model, opt = make(policy)
    else:
        model = new_model(POLICIES[policy][0])
        if engine == "fsdp2":
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        opt = Lion(model.parameters(), **settings(policy))
    train([(model, opt)], range(9, 10))
    lion_dist.checkpoint.load(path, model=model, optimizer=opt)
    train([(model, opt)], range(3, 5))
    expected, lion = plain(policy, range(5))
    with opt.averaged_parameters(*([] if engine == "sharded" else [model])), lion.averaged_parameters():
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(mine.full_tensor() if engine == "fsdp2" else mine, theirs)


@pytest.mark.parametrize("policy", ["fp32 main", "none, bf16 average"])
@pytest.mark.parametrize(("ranks", "engine"), [(1, "sharded"), (4, "sharded"), (1, "lion"), (2, "fsdp2")])
def test_a_checkpoint_carries_averages_to_any_number_of_ranks_and_engine(gloo, tmp_path, policy, ranks, engine):
    gloo.run(2, save, tmp_path / "c", policy)
    gloo.run(ranks, load, tmp_path / "c", policy, engine)


def load_without_average(path) -> None:
    model, opt = make("fp32 main")
    with pytest.warns(UserWarning, match="begins at the loaded parameters: the average of the weights"):
        lion_dist.checkpoint.load(path, model=model, optimizer=opt)
    with torch.no_grad():
        loaded = [p.clone() for p in model.parameters()]
    with opt.averaged_parameters():
        assert all(map(torch.equal, model.parameters(), loaded))


def save_plainly(path) -> None:
    model, opt = make("fp32 main", ema_decay=None)
    train([(model, opt)], range(2))
    lion_dist.checkpoint.save(path, model=model, optimizer=opt)


def test_without_one_in_the_checkpoint_the_average_begins_at_the_loaded_parameters(gloo, tmp_path):
    gloo.run(2, save_plainly, tmp_path / "c")
    gloo.run(2, load_without_average, tmp_path / "c")


def load_where_none_is_kept(path) -> None:
    model, opt = make("fp32 main", ema_decay=None)
    with pytest.warns(UserWarning, match="the saved average of the weights is left out"):
        lion_dist.checkpoint.load(path, model=model, optimizer=opt)


def test_a_saved_average_that_nobody_keeps_is_said_to_be_left_out(gloo, tmp_path):
    gloo.run(1, save, tmp_path / "c", "fp32 main")
    gloo.run(1, load_where_none_is_kept, tmp_path / "c")


def through_state_dicts(policy: str) -> None:
    model, opt = make(policy)
    train([(model, opt)], range(3))
    opt.consolidate_state_dict(to=0)
    full = [opt.full_state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(full)
    parts = copy.deepcopy(model.state_dict())
    for state in (full[0], opt.state_dict()):
        other, second = make(policy)
        other.load_state_dict(parts)
        second.load_state_dict(state)
        with opt.averaged_parameters(), second.averaged_parameters():
            assert same(bits_of(model), bits_of(other))
    alone = new_model(POLICIES[policy][0])
    alone.load_state_dict(parts)
    lion = Lion(alone.parameters(), **settings(policy))
    lion.load_state_dict(full[0])
    with opt.averaged_parameters(), lion.averaged_parameters():
        assert same(bits_of(model), bits_of(alone))


@pytest.mark.parametrize("policy", POLICIES)
def test_state_dicts_carry_averages_whole_and_in_parts(gloo, policy):
    gloo.run(2, through_state_dicts, policy)


# ---- FSDP2


def train_fully_sharded(policy: str) -> None:
    model = new_model(POLICIES[policy][0])
    for layer in model:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    opt = Lion(model.parameters(), **settings(policy))
    train([(model, opt)], range(3))
    expected, lion = plain(policy, range(3))
    x = torch.ones(2, 13, dtype=POLICIES[policy][0])
    with torch.no_grad(), opt.averaged_parameters(model), lion.averaged_parameters():
        assert torch.equal(model(x), expected(x))  # the root keeps what it has gathered
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    train([(model, opt), (expected, lion)], range(3, 5))
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine.full_tensor(), theirs)
        assert torch.equal(opt.state[mine]["weight_avg"].full_tensor(), lion.state[theirs]["weight_avg"])
    with pytest.raises(
        ValueError, match=r"needs the model where parameters are DTensors.*averaged_parameters\(model\)"
    ):
        with opt.averaged_parameters():
            pass


def fsdp2_backward_inside(accumulates: bool, forgets: bool) -> None:
    mesh, model = init_device_mesh("cpu", (2,)), new_model(FP32)
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    opt = Lion(model.parameters(), **settings("fp32"))
    train([(model, opt)], range(2))
    if accumulates:
        backward(model, 2)
    before = [p.to_local().clone() for p in model.parameters()]
    said = contextlib.nullcontext() if forgets else pytest.raises(RuntimeError, match=BACKWARD_INSIDE + ".*zero_grad")
    with said, opt.averaged_parameters(model):
        backward(model, 3)
        if forgets:
            opt.zero_grad()
    assert all(map(torch.equal, [p.to_local() for p in model.parameters()], before))
    with opt.averaged_parameters(model), pytest.raises(KeyError):  # of the evaluation, and not another one
        raise KeyError
    with opt.averaged_parameters(model):
        for call in (opt.step, opt.state_dict):
            with pytest.raises(RuntimeError, match=r"inside averaged_parameters\(\), "):
                call()


@pytest.mark.parametrize(("accumulates", "forgets"), [(False, False), (True, False), (True, True)])
def test_a_backward_of_fsdp2_inside_is_refused_at_the_end_unless_it_has_been_forgotten(gloo, accumulates, forgets):
    gloo.run(2, fsdp2_backward_inside, accumulates, forgets)


def tensor_parallel_backward_inside() -> None:
    model = new_model(FP32)
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"2": ColwiseParallel(output_layouts=Replicate())})
    opt = Lion(model.parameters(), **settings("fp32"))
    backward(model, 0)
    opt.step()
    opt.zero_grad()
    with opt.averaged_parameters(model), pytest.raises(RuntimeError, match=BACKWARD_INSIDE):
        model[2](torch.ones(1, 37)).sum().backward()
    assert all(param.grad is None for param in model.parameters())


def test_a_backward_into_tensor_parallel_parameters_is_refused_inside(gloo):
    gloo.run(2, tensor_parallel_backward_inside)


@pytest.mark.parametrize("policy", ["fp32", "none, bf16 average"])
def test_fsdp2_evaluates_the_average_and_trains_on(gloo, policy):
    gloo.run(2, train_fully_sharded, policy)


def refuse_flat_params() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(new_model(FP32), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="ema_decay .* FSDP1's flat parameter.*Use fully_shard"):
        Lion(model.parameters(), ema_decay=DECAY)


def test_fsdp1s_flat_parameters_are_refused(gloo):
    gloo.run(2, refuse_flat_params)


def ranks_differ() -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        make("fp32", ema_decay=0.9 + 0.01 * dist.get_rank())
    with pytest.raises(ValueError, match="ema_dtype=torch.bfloat16, but no average"):
        make("split, bf16 average", ema_decay=None)
    _, opt = make("fp32", ema_decay=None)
    with pytest.raises(RuntimeError, match="is for ema_decay"), opt.averaged_parameters():
        pass


def test_ranks_with_another_decay_are_told_and_a_missing_one_is_refused(gloo):
    gloo.run(2, ranks_differ)
