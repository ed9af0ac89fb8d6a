"""What a step may do beyond plain Lion: cautious_factor, cautious_wd, corrected_weight_decay, maximize.

The equations are tested on every backend in ``tests/kernels``; here, that optimizers and engines apply them.
"""

import copy
import io
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from lion_pytorch.cautious_lion import Lion as CautiousLionPytorch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lion_dist.checkpoint
from lion_dist import Lion, PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.integrations.deepspeed_config import read_params

LR, DECAY = 1e-2, 0.5


@dataclass(frozen=True)
class Rule:
    name: str
    options: dict
    sharding: dict = field(default_factory=dict)


CORRECTED = {"corrected_weight_decay": True}
RULES = [
    Rule("factor", {"cautious_factor": 0.25}),
    Rule("decay", {"cautious_wd": True}, {"update_in_backward": True}),
    Rule("corrected", {**CORRECTED, "decoupled_weight_decay": True}),
    Rule("maximize", {"maximize": True, "cautious": True}),
    Rule("decays-up", {"cautious_wd": True, "maximize": True, **CORRECTED}, {"param_sync": "coded"}),
    Rule("all", {"cautious_factor": 0.25, "cautious_wd": True, "maximize": True, **CORRECTED}),
]
POLICIES = {"fp32": (torch.float32, "auto"), "split": (torch.bfloat16, "auto"), "none": (torch.bfloat16, "none")}


def model_and_batches(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 37), nn.ReLU(), nn.Linear(37, 5)).to(dtype)
    return model, [torch.randn(4, 13, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)]


def settings_of(rule, main_params="auto"):
    return {"lr": LR, "weight_decay": DECAY, "precision": PrecisionPolicy(main_params=main_params)} | rule.options


def train(pairs, batches):
    """The same batches through every (model, optimizer), with the learning rate of a schedule."""
    for i, batch in enumerate(batches):
        for model, opt in pairs:
            for group in opt.param_groups:
                group["lr"] = LR * (1 - i / 8)
            model(batch).square().mean().backward()
            opt.step()
            opt.zero_grad()


# ---- one process


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("cautious_wd", [False, True])
def test_a_cautious_step_is_that_of_lion_pytorch(factor, cautious_wd):
    """Which divides by the mean of what steps count for, where the paper adds one to their sum: 1 / 4000 of a step."""
    torch.manual_seed(0)
    mine = nn.Parameter(torch.randn(4000))
    theirs = nn.Parameter(mine.detach().clone())
    options = {"lr": LR, "weight_decay": DECAY, "cautious_factor": factor, "cautious_wd": cautious_wd}
    opts = Lion([mine], **options), CautiousLionPytorch([theirs], **options)
    for _ in range(5):
        mine.grad = torch.randn(4000)
        theirs.grad = mine.grad.clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=5 * 4 * LR / 1000 + 1e-6)
    assert ((mine - theirs).abs() < LR / 2).all()  # no element has taken another step


def test_a_factor_of_one_is_the_plain_step():
    models = [model_and_batches(torch.float32)[0] for _ in range(2)]
    opts = [Lion(m.parameters(), lr=LR, **o) for m, o in zip(models, ({}, {"cautious_factor": 1.0}), strict=True)]
    train(zip(models, opts, strict=True), model_and_batches(torch.float32)[1][:1])
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_maximize_is_a_step_of_the_negated_gradient(policy):
    dtype, main_params = POLICIES[policy]
    models = [model_and_batches(dtype)[0] for _ in range(2)]
    precision = PrecisionPolicy(main_params=main_params)
    up = Lion(models[0].parameters(), lr=LR, weight_decay=DECAY, precision=precision, maximize=True)
    down = Lion(models[1].parameters(), lr=LR, weight_decay=DECAY, precision=precision)
    for batch in model_and_batches(dtype)[1]:
        models[0](batch).square().mean().backward()
        models[1](batch).square().mean().neg().backward()
        for opt in (up, down):
            opt.step()
            opt.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_corrected_decay_is_in_proportion_to_the_square_of_lr(decoupled, on_device):
    """By bits that of a plain step whose weight decay is scaled by lr / max_lr."""
    models = [model_and_batches(torch.float32)[0] for _ in range(2)]
    lr = torch.tensor(LR) if on_device else LR
    corrected = Lion(models[0].parameters(), lr, weight_decay=DECAY, decoupled_weight_decay=decoupled, **CORRECTED)
    plain = Lion(models[1].parameters(), lr=LR)
    max_lr = float(lr)
    assert corrected.param_groups[0]["max_lr"] == max_lr
    for i, batch in enumerate(model_and_batches(torch.float32)[1]):
        now = float(torch.tensor(LR * (1 - i / 4))) if on_device else LR * (1 - i / 4)
        corrected.param_groups[0]["lr"] = torch.tensor(now) if on_device else now
        decay = DECAY / max_lr if decoupled else DECAY
        plain.param_groups[0].update(lr=now, weight_decay=decay * (now / max_lr))
        train_once(zip(models, (corrected, plain), strict=True), batch)
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def train_once(pairs, batch):
    for model, opt in pairs:
        model(batch).square().mean().backward()
        opt.step()
        opt.zero_grad()


def test_max_lr_is_the_groups_own_a_schedulers_or_the_first_lr():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = Lion([{"params": params[:1], "max_lr": 0.5}, {"params": params[1:]}], lr=0.1, **CORRECTED)
    assert [group["max_lr"] for group in opt.param_groups] == [0.5, 0.1]
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.3, total_steps=10, cycle_momentum=False)
    assert [group["max_lr"] for group in opt.param_groups] == [0.3, 0.3]


def test_max_lr_is_saved_and_loaded_with_the_group():
    param = nn.Parameter(torch.ones(3))
    opt = Lion([{"params": [param], "max_lr": 0.5}], lr=0.1, **CORRECTED)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = Lion([param], lr=0.1, **CORRECTED)
    other.load_state_dict(torch.load(file))
    assert other.param_groups[0]["max_lr"] == 0.5


def test_max_lr_is_in_checkpoints(gloo, tmp_path):
    gloo.run(2, saved_and_loaded, tmp_path)


def saved_and_loaded(path):
    model, batches = model_and_batches(torch.float32)
    groups = lambda m, **more: [{"params": list(m.parameters()), **more}]  # noqa: E731
    opt = ShardedLion(groups(model, max_lr=0.5), lr=LR, module=model, **CORRECTED)
    train_once([(model, opt)], batches[0])
    lion_dist.checkpoint.save(path / "saved", model=model, optimizer=opt)
    other = copy.deepcopy(model_and_batches(torch.float32)[0])
    loaded = ShardedLion(groups(other), lr=LR, module=other, **CORRECTED)
    assert loaded.param_groups[0]["max_lr"] == LR
    lion_dist.checkpoint.load(path / "saved", model=other, optimizer=loaded)
    assert loaded.param_groups[0]["max_lr"] == 0.5


@pytest.mark.parametrize(
    "options, match",
    [
        ({"cautious_factor": 1.5}, "cautious_factor must be in"),
        ({"cautious_factor": "0"}, "cautious_factor must be in"),
        ({"maximize": 1}, "maximize must be True or False"),
        (
            {"lr": 0.0, **CORRECTED},
            "max_lr of a param group with corrected_weight_decay=True must be finite",
        ),
        ({"differentiable": True}, "differentiable=True: gradients do not flow"),
        ({"foreach": True, "fused": True}, "foreach=True and fused=True cannot both be"),
    ],
)
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Lion([nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}])
def test_options_of_torch_that_say_how_to_compute_are_accepted_and_leave_no_key(options):
    opt = Lion([nn.Parameter(torch.ones(3))], **options)
    assert opt.param_groups[0].keys() == Lion([nn.Parameter(torch.ones(3))]).param_groups[0].keys()


def test_a_max_lr_that_a_program_breaks_is_refused_before_anything_changes():
    param = nn.Parameter(torch.ones(3))
    opt = Lion([param], lr=LR, weight_decay=DECAY, **CORRECTED)
    opt.param_groups[0]["max_lr"] = 0.0
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="max_lr of a param group"):
        opt.step()
    assert param.tolist() == [1, 1, 1]


def test_lr_0_moves_momentum_and_no_parameter():
    for rule in RULES:
        if "corrected_weight_decay" in rule.options:
            continue
        param = nn.Parameter(torch.ones(3))
        opt = Lion([param], lr=0.0, weight_decay=DECAY, **rule.options)
        param.grad = torch.tensor([1.0, -1.0, 0.0])
        opt.step()
        assert param.tolist() == [1, 1, 1] and opt.state[param]["exp_avg"][0] != 0


def test_the_rule_is_copied_and_pickled():
    opt = Lion([nn.Parameter(torch.ones(3))], cautious_factor=0.25, cautious_wd=True, maximize=True, **CORRECTED)
    assert copy.deepcopy(opt).rule == pickle.loads(pickle.dumps(opt)).rule == opt.rule


def test_groups_of_lion_pytorchs_cautious_class_are_loaded():
    param = nn.Parameter(torch.ones(3))
    theirs = CautiousLionPytorch([param], lr=LR)
    param.grad = torch.ones(3)
    theirs.step()
    mine = Lion([param], lr=LR, cautious=True)
    mine.load_state_dict(theirs.state_dict())
    assert mine.param_groups[0].keys() == Lion([param]).param_groups[0].keys()
    assert torch.equal(mine.state[param]["exp_avg"], theirs.state[param]["exp_avg"])


def test_deepspeed_takes_the_elementwise_rules_and_refuses_the_statistic():
    options = {"cautious_wd": True, "corrected_weight_decay": True, "maximize": True}
    assert {key: read_params(options)[key] for key in options} == options
    for key, value in (("cautious", True), ("cautious_factor", 0.0)):
        with pytest.raises(ValueError, match=f'"{key}" does not go with Lion under DeepSpeed: its statistic'):
            read_params({key: value})
    for key, value in (("ema_decay", 0.999), ("ema_dtype", "fp32")):
        with pytest.raises(ValueError, match=f'"{key}" does not go with Lion under DeepSpeed: .*flat partitions'):
            read_params({key: value})


# ---- ranks


def sharded_equals_plain(rule, policy):
    dtype, main_params = POLICIES[policy]
    model, batches = model_and_batches(dtype)
    plain = copy.deepcopy(model)
    settings = settings_of(rule, main_params)
    sharding = ShardingConfig(bucket_numel=300, **rule.sharding)
    optimizer = ShardedLion(model.parameters(), module=model, sharding=sharding, **settings)
    train([(model, optimizer), (plain, Lion(plain.parameters(), **settings))], batches)
    optimizer.finish_param_sync()
    return [torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_sharded_lion_takes_the_step_of_lion(gloo, rule, policy):
    """Every rank has the same batch, so the mean gradient is the same to the bit on 1 and 2 ranks."""
    ranks = 1 if policy == "fp32" and rule.name == "all" else 2
    for equal in gloo.run(ranks, sharded_equals_plain, rule, policy):
        assert all(equal)


def fsdp2_equals_plain(rule):
    model, batches = model_and_batches(torch.float32)
    plain = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    settings = settings_of(rule)
    train([(m, Lion(m.parameters(), **settings)) for m in (model, plain)], batches)
    return [torch.equal(a.full_tensor(), b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_fsdp2_shards_take_the_step_of_whole_tensors(gloo, rule):
    for equal in gloo.run(2, fsdp2_equals_plain, rule):
        assert all(equal)


def coded_sync_refuses_two_sizes():
    with pytest.raises(ValueError, match="cautious_factor=0.25 takes steps of two sizes"):
        sharding = ShardingConfig(param_sync="coded")
        ShardedLion([nn.Parameter(torch.ones(3))], cautious_factor=0.25, sharding=sharding)


def test_coded_sync_refuses_steps_of_two_sizes(gloo):
    gloo.run(1, coded_sync_refuses_two_sizes)


def ranks_differ_in_max_lr():
    rank = torch.distributed.get_rank()
    with pytest.raises(ValueError, match="max_lr"):
        ShardedLion([{"params": [nn.Parameter(torch.ones(3))], "max_lr": 0.5 + rank}], lr=LR, **CORRECTED)


def test_ranks_that_differ_in_max_lr_are_told(gloo):
    gloo.run(2, ranks_differ_in_max_lr)
