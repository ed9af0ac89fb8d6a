"""A plan against the tensors of real runs, and its arithmetic on jobs that no test could run."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.benchmarks.llama import Llama
from lion_dist.planning import estimates, model_shapes
from lion_dist.planning.estimates import PRECISIONS, Job, plan
from lion_dist.planning.model_shapes import ModelShapes, preset, read_shapes, shapes_of
from lion_dist.sharding import collectives
from lion_dist.sharding.layout import ALIGNMENT

SIZES = {
    "wide": {"layers": 2, "dim": 64, "heads": 4, "ffn": 176, "vocab": 300},
    "deep": {"layers": 5, "dim": 32, "heads": 2, "ffn": 88, "vocab": 64},  # more buckets than pooled buffers
}
BUCKET_NUMEL = {"wide": None, "deep": 16_000}
STEPS = {"wide": 3, "deep": 1}  # until every pooled buffer has been taken
COUNTED = ("params", "main_params", "exp_avg", "grads")


def make(size: str, dtype: torch.dtype) -> Llama:
    torch.manual_seed(0)
    return Llama(**SIZES[size]).to(dtype)


@functools.cache
def shapes(size: str) -> ModelShapes:
    s = SIZES[size]
    with torch.device("meta"):
        model = Llama(**s)
    return shapes_of(model, size, "test", hidden=s["dim"], layers=s["layers"], vocab=s["vocab"])


def groups(model: nn.Module) -> list[dict]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def planned(size: str, precision: str, job: Job, engine: str) -> dict[str, int]:
    found = {p.engine: p for p in plan(shapes(size), job, precision)}[engine]
    return {kind: found.memory[kind] for kind in COUNTED}


# ---- ShardedLion: equal to what opt.memory_bytes() counts


def memory_of_sharded(size: str, stage: int, micro_batches: int, replicas: int) -> dict[str, dict]:
    """{precision: the most of each kind in a step} on this rank."""
    mesh = None
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas))
    found = {}
    for name, precision in list(PRECISIONS.items())[:: 1 if dist.get_world_size() < 3 else 3]:
        model = make(size, precision.param_dtype)
        opt = ShardedLion(
            groups(model),
            module=model,
            process_group=mesh,
            precision=precision.policy,
            sharding=ShardingConfig(stage, bucket_numel=BUCKET_NUMEL[size]),
        )
        tokens = torch.randint(64, (1, 9))
        for _ in range(STEPS[size]):
            for _ in range(micro_batches - 1):
                with opt.no_sync():
                    model(tokens).backward()
            local = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            model(tokens).backward()
            opt.grad_norm()  # every reduction is complete
            found[name] = opt.memory_bytes()
            found[name]["grads"] += local
            opt.step()
    return found


@pytest.mark.parametrize(
    ("ranks", "size", "stage", "micro_batches", "replicas"),
    [(1, "wide", 2, 1, 1), (2, "deep", 1, 2, 1), (3, "wide", 1, 1, 1), (4, "deep", 2, 2, 1), (4, "wide", 2, 1, 2)],
)
def test_plan_of_sharded_lion_is_what_its_tensors_take(gloo, ranks, size, stage, micro_batches, replicas):
    sharding = ShardingConfig(bucket_numel=BUCKET_NUMEL[size], ordered_sum=ranks > 1)  # gloo's default
    job = Job(ranks, replicas, micro_batches, sharding)
    engine = f"ShardedLion stage {stage}" + (", hybrid" if replicas > 1 else "")
    for measured in gloo.run(ranks, memory_of_sharded, size, stage, micro_batches, replicas):
        for precision, memory in measured.items():
            assert {k: memory[k] for k in COUNTED} == planned(size, precision, job, engine), precision


def grads_over_a_16_bit_wire() -> int:
    model = make("deep", torch.bfloat16)
    opt = ShardedLion(groups(model), module=model, sharding=ShardingConfig(ordered_sum=False))
    for _ in range(3):
        for _ in range(2):
            model(torch.randint(64, (1, 9))).backward()
        opt.grad_norm()
        most = opt.memory_bytes()["grads"]
        opt.step()
    return most


def test_plan_counts_the_fp32_accumulator_of_micro_batches(gloo):
    job = Job(2, micro_batches=2)
    assert gloo.run(2, grads_over_a_16_bit_wire) == [
        planned("deep", "bf16-split", job, "ShardedLion stage 2")["grads"]
    ] * 2  # fmt: skip


def bytes_through_collectives(micro_batches: int, replicas: int) -> dict[str, int]:
    """What this rank sends in the second step, by what the collectives are given."""
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas)) if replicas > 1 else None
    model = make("deep", torch.bfloat16)
    opt = ShardedLion(groups(model), module=model, process_group=mesh, sharding=ShardingConfig(ordered_sum=False))
    sent = {"reduce-scatter gradients": 0, "all-gather parameters": 0, "all-reduce gradient shards": 0}
    originals = collectives.reduce_scatter, collectives.all_gather, collectives.all_reduce

    def reduce_scatter(output, flat, group, **kwargs):
        sent["reduce-scatter gradients"] += flat.nbytes - output.nbytes
        return originals[0](output, flat, group, **kwargs)

    def all_gather(flat, shard, group):
        sent["all-gather parameters"] += flat.nbytes - shard.nbytes
        return originals[1](flat, shard, group)

    def all_reduce(tensor, group):
        if group is not None and tensor.dtype == torch.bfloat16:  # the norm's is fp64
            sent["all-reduce gradient shards"] += 2 * tensor.nbytes * (group.size() - 1) // group.size()
        return originals[2](tensor, group)

    collectives.reduce_scatter, collectives.all_gather, collectives.all_reduce = reduce_scatter, all_gather, all_reduce
    try:
        for _ in range(micro_batches):
            model(torch.randint(64, (1, 9))).backward()
        opt.step()
        opt.finish_param_sync()
    finally:
        collectives.reduce_scatter, collectives.all_gather, collectives.all_reduce = originals
    return {what: count for what, count in sent.items() if count}


@pytest.mark.parametrize(("ranks", "micro_batches", "replicas"), [(2, 2, 1), (4, 1, 2)])
def test_plan_sends_what_the_collectives_are_given(gloo, ranks, micro_batches, replicas):
    engine = "ShardedLion stage 2" + (", hybrid" if replicas > 1 else "")
    plans = plan(shapes("deep"), Job(ranks, replicas, micro_batches), "bf16-split")
    traffic = {c.what: c.sent for p in plans if p.engine == engine for c in p.traffic}
    for sent in gloo.run(ranks, bytes_through_collectives, micro_batches, replicas):
        assert sent == traffic


def bytes_of_codes() -> tuple[int, int]:
    """(bytes that this rank sends to make parameters whole, in the third step; elements of the model)"""
    model = make("wide", torch.bfloat16)
    opt = ShardedLion(groups(model), module=model, sharding=ShardingConfig(param_sync="coded"))
    sent, original = [], collectives.all_gather

    def all_gather(flat, shard, group):
        sent.append(flat.nbytes - shard.nbytes)
        return original(flat, shard, group)

    collectives.all_gather = all_gather
    try:
        for _ in range(3):
            sent.clear()
            model(torch.randint(64, (1, 9))).backward()
            opt.step()
            opt.finish_param_sync()
    finally:
        collectives.all_gather = original
    return sum(sent), sum(p.numel() for p in model.parameters())


def test_plan_of_coded_param_sync_is_what_is_sent_but_for_escapes(gloo):
    plans = {p.engine: p for p in plan(shapes("wide"), Job(2), "bf16-split")}
    codes = next(c.sent for c in plans["ShardedLion stage 2, coded"].traffic if "codes" in c.what)
    for sent, numel in gloo.run(2, bytes_of_codes):
        assert codes <= sent <= 1.1 * codes
        assert codes < 0.2 * numel  # a half of the elements at a third of a byte


# ---- FSDP2 and one rank


def memory_of_fsdp(size: str) -> dict[str, dict]:
    found = {}
    for name, precision in PRECISIONS.items():
        model = make(size, precision.param_dtype)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        opt = Lion(groups(model), precision=precision.policy)
        model(torch.randint(64, (1, 9))).backward()
        opt.step()
        memory = dict.fromkeys(COUNTED, 0)
        for param in model.parameters():
            memory["params"] += param.to_local().nbytes
            memory["grads"] += param.grad.to_local().nbytes
            for key, state in opt.state[param].items():
                if key in ("exp_avg", "main_param"):
                    local = state.to_local() if hasattr(state, "to_local") else state
                    memory["exp_avg" if key == "exp_avg" else "main_params"] += local.nbytes
        found[name] = memory
    return found


@pytest.mark.parametrize(("ranks", "size"), [(2, "wide"), (3, "deep")])
def test_plan_of_fsdp2_is_what_the_fullest_rank_holds(gloo, ranks, size):
    by_rank = gloo.run(ranks, memory_of_fsdp, size)
    for precision in PRECISIONS:
        most = {kind: max(found[precision][kind] for found in by_rank) for kind in COUNTED}
        assert most == planned(size, precision, Job(ranks), "FSDP2 + Lion"), precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plan_of_lion_on_one_rank_is_what_its_tensors_take(precision):
    chosen = PRECISIONS[precision]
    model = make("wide", chosen.param_dtype)
    opt = Lion(groups(model), precision=chosen.policy)
    model(torch.randint(64, (1, 9))).backward()
    opt.step()
    state = {kind: sum(s[kind].nbytes for s in opt.state.values() if kind in s) for kind in ("exp_avg", "main_param")}
    assert planned("wide", precision, Job(1), "Lion") == {
        "params": sum(p.nbytes for p in model.parameters()),
        "main_params": state["main_param"],
        "exp_avg": state["exp_avg"],
        "grads": sum(p.grad.nbytes for p in model.parameters()),
    }


def memory_of_averages(engine: str) -> dict[str, int]:
    model = make("deep", torch.bfloat16)
    policy = PrecisionPolicy("split", ema_dtype=torch.bfloat16)
    if engine == "sharded":
        sharding = ShardingConfig(bucket_numel=BUCKET_NUMEL["deep"])
        return ShardedLion(groups(model), precision=policy, sharding=sharding, ema_decay=0.9).memory_bytes()
    fully_shard(model)
    opt = Lion(groups(model), precision=policy, ema_decay=0.9)
    model(torch.randint(64, (1, 9))).backward()
    opt.step()
    return {"weight_avg": sum(opt.state[p]["weight_avg"].to_local().nbytes for p in model.parameters())}


def planned_average(job: Job, engine: str) -> int:
    found = {p.engine: p for p in plan(shapes("deep"), job, "bf16-split", torch.bfloat16)}
    assert not any("DeepSpeed" in name for name in found)
    return found[engine].memory["weight_avg"]


def test_plan_of_an_average_of_the_weights_is_what_it_takes(gloo):
    job = Job(2, sharding=ShardingConfig(bucket_numel=BUCKET_NUMEL["deep"]))
    for memory in gloo.run(2, memory_of_averages, "sharded"):
        assert memory["weight_avg"] == planned_average(job, "ShardedLion stage 2")
    assert max(m["weight_avg"] for m in gloo.run(2, memory_of_averages, "fsdp2")) == planned_average(
        job, "FSDP2 + Lion"
    )
    assert planned_average(Job(1), "Lion") == 2 * shapes("deep").numel
    adamw = {p.engine: p for p in plan(shapes("deep"), job, "fp32", torch.bfloat16)}["DDP + AdamW"]
    assert "weight_avg" not in adamw.memory


# ---- shapes


@pytest.mark.parametrize(
    ("name", "numel"),
    [
        ("1b", 1_235_814_400),
        ("3b", 3_212_749_824),
        ("7b", 6_738_415_616),
        ("8b", 8_030_261_248),
        ("13b", 13_015_864_320),
        ("70b", 68_976_648_192),
        ("405b", 405_853_388_800),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, numel):
    assert preset(name).numel == numel


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True}, {"head_dim": 32}])
def test_formula_gives_the_parameters_of_transformers(tmp_path, monkeypatch, more):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | more | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}))
    by_transformers = read_shapes(str(path))
    assert "transformers" in by_transformers.source and "meta device" in by_transformers.source
    monkeypatch.setattr(model_shapes.importlib.util, "find_spec", lambda name: None)
    by_formula = read_shapes(str(path))
    assert "formula" in by_formula.source
    assert by_formula.params == by_transformers.params
    assert (by_formula.hidden, by_formula.layers, by_formula.vocab) == (64, 3, 100)


def test_blocks_are_the_numbered_layers_and_the_rest_is_the_roots():
    blocks = preset("7b").blocks()
    assert len(blocks) == 33
    assert all(len(block) == 9 for block in blocks[:-1])
    assert blocks[-1] == [(32_000, 4096), (4096,), (32_000, 4096)]


# ---- arithmetic


def test_a_plan_of_70_b_parameters_on_4096_ranks_covers_every_element():
    model = preset("70b")
    for precision in PRECISIONS:
        for found in plan(model, Job(4096, 512), precision):
            if found.engine.startswith("ShardedLion") and "hybrid" not in found.engine:
                assert found.memory["exp_avg"] * 4096 >= model.numel * PRECISIONS[precision].momentum_bytes
                assert found.memory["exp_avg"] * 4096 <= 1.01 * model.numel * PRECISIONS[precision].momentum_bytes


@settings(max_examples=50)
@given(
    rows=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    ranks=st.integers(1, 300),
    stage=st.sampled_from([1, 2]),
)
def test_padding_of_a_plan_is_less_than_a_shard_of_alignment_a_bucket(rows, ranks, stage):
    model = ModelShapes("any", "test", tuple((f"layers.{i}.w", (n, 8)) for i, n in enumerate(rows)), 8, len(rows), 1)
    memory, _ = estimates.plan_sharded(model, PRECISIONS["bf16-split"], Job(ranks), stage=stage)
    buckets = len(estimates.bucket_layouts(model, ranks, None))
    most = model.numel + (len(rows) + buckets * ranks) * ALIGNMENT
    assert 2 * model.numel <= memory["params"] <= 2 * most
    assert memory["exp_avg"] == memory["main_params"] == memory["params"] // ranks


def test_a_group_that_spans_nodes_goes_at_the_slower_link():
    plans = {p.engine: p for p in plan(preset("7b"), Job(16, 2), "bf16-split")}
    everywhere, hybrid = plans["ShardedLion stage 2"], plans["ShardedLion stage 2, hybrid"]
    assert everywhere.seconds(300e9, 30e9) == pytest.approx(everywhere.sent / 30e9)
    across = sum(c.sent for c in hybrid.traffic if c.crosses)
    assert 0 < across < hybrid.sent / 8
    assert hybrid.seconds(300e9, 30e9) == pytest.approx(across / 30e9 + (hybrid.sent - across) / 300e9)


def test_one_rank_sends_nothing():
    assert all(found.sent == 0 for found in plan(preset("1b"), Job(1), "fp32"))


def test_deepspeed_has_no_plan_without_its_fp32_main_params():
    engines = {precision: [p.engine for p in plan(preset("1b"), Job(8), precision)] for precision in PRECISIONS}
    for precision, names in engines.items():
        assert ("DeepSpeed stage 2" in names) == (precision.startswith(("fp32", "bf16-fp32")))


def test_a_job_that_does_not_spread_over_its_nodes_is_refused():
    with pytest.raises(ValueError, match="10 ranks do not spread evenly over 3 nodes"):
        Job(10, 3)


# ---- DDP, and AdamW to compare with


def memory_of_ddp(bucket_view: bool, zero: bool) -> dict[str, int]:
    """Gradients with DDP's buckets, and the state of AdamW on this rank."""
    model = make("wide", torch.float32)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    if zero:
        opt = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW)
    else:
        opt = torch.optim.AdamW(ddp.parameters())
    ddp(torch.randint(64, (1, 9))).backward()
    opt.step()
    grads = sum(param.grad.nbytes for param in model.parameters())
    buckets = sum(map(int, str(ddp._get_ddp_logging_data()["bucket_sizes"]).split(",")))
    moments = [v for state in (opt.optim if zero else opt).state.values() for key, v in state.items() if key != "step"]
    return {"grads": buckets if bucket_view else grads + buckets, "exp_avg": sum(v.nbytes for v in moments)}


def test_plan_of_ddp_has_its_buckets_beside_the_gradients(gloo):
    plans = {p.engine: p.memory for p in plan(shapes("wide"), Job(2), "fp32")}
    for engine, bucket_view in (("DDP + Lion", False), ("DDP + Lion, bucket view", True), ("DDP + AdamW", False)):
        for found in gloo.run(2, memory_of_ddp, bucket_view, False):
            assert plans[engine]["grads"] == found["grads"]
    assert plans["DDP + AdamW"]["exp_avg"] == found["exp_avg"] == 2 * plans["DDP + Lion"]["exp_avg"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_plan_of_zero_1_adamw_is_what_the_fullest_rank_holds(gloo, ranks):
    planned = {p.engine: p.memory for p in plan(shapes("wide"), Job(ranks), "fp32")}["DDP + ZeRO-1 AdamW"]
    assert planned["exp_avg"] == max(found["exp_avg"] for found in gloo.run(ranks, memory_of_ddp, False, True))


def test_adamw_has_no_plan_with_main_params_or_a_momentum_of_another_dtype():
    for precision in PRECISIONS:
        engines = {p.engine for p in plan(shapes("deep"), Job(8), precision)}
        assert ("FSDP2 + AdamW" in engines) == (precision in ("bf16-none", "fp32"))


def test_the_published_example_of_ddp_counts_its_buckets():
    """7 B parameters on 8 ranks: bf16 gradients are 12.55 GiB, and DDP's default holds them twice."""
    plans = {p.engine: p.total for p in plan(preset("7b"), Job(8), "bf16-split")}
    assert (plans["DDP + Lion"] - plans["DDP + Lion, bucket view"]) / 2**30 == pytest.approx(12.55, abs=0.005)
