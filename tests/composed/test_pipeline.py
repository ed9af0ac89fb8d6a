"""Pipeline stages with an optimizer each: one norm, one clip factor, one verdict over all of the job."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lion_dist import GradScaler, ModelParallel, PrecisionPolicy, ShardedLion, ShardingConfig
from lion_dist.sharding import collectives
from tests.composed.jobs import LR, SHAPES, OneProcess, gradients, mesh_of, place_on
from tests.models import GivenGradients

POLICIES = {
    "fp32": (torch.float32, PrecisionPolicy()),
    "split": (torch.bfloat16, PrecisionPolicy("split")),
    "none, stochastic": (torch.bfloat16, PrecisionPolicy("none", torch.bfloat16, "stochastic", seed=5)),
}


class Stage:
    """This rank's stage of two, of the model of ``SHAPES``, on PP 2 x DP 2."""

    def __init__(self, dtype: torch.dtype = torch.float32, stage_config: int = 2, **settings):
        mesh = mesh_of(pp=2, dp=2)
        self.number, self.dp = place_on(mesh, "pp"), place_on(mesh, "dp")
        self.own = slice(0, 2) if self.number == 0 else slice(2, 4)
        whole = GivenGradients(*SHAPES, dtype=dtype)
        self.model = GivenGradients(*SHAPES[self.own], dtype=dtype)
        for mine, theirs in zip(self.model.weights, whole.weights[self.own], strict=True):
            mine.data.copy_(theirs.data)
        self.dtype = dtype
        self.opt = ShardedLion(
            self.model.parameters(),
            module=self.model,
            process_group=mesh["dp"],
            model_parallel=ModelParallel(pipeline=mesh["pp"]),
            sharding=ShardingConfig(stage_config, bucket_numel=64),
            **settings,
        )

    def backward(self, step: int, poison: float | None = None) -> None:
        grads = gradients(step, self.dp, dtype=self.dtype)[self.own]
        if poison is not None:
            grads[0].view(-1)[0] = poison
        self.model.loss(grads).backward()

    def assert_equals(self, one: OneProcess) -> None:
        self.opt.finish_param_sync()
        for mine, theirs in zip(self.model.weights, one.model.weights[self.own], strict=True):
            assert torch.equal(mine, theirs)


def train(policy: str, stage: int, clip: float | None) -> None:
    dtype, precision = POLICIES[policy]
    settings = dict(lr=LR, weight_decay=0.1, precision=precision)
    job, one = Stage(dtype, stage, **settings), OneProcess(2, dtype=dtype, **settings)
    for step in range(3):
        job.backward(step)
        norm = job.opt.grad_norm() if clip is None else job.opt.clip_grad_norm_(clip)
        assert torch.equal(norm, one.step(step, clip))
        job.opt.step()
    job.assert_equals(one)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_stages_clip_by_the_norm_of_all_and_equal_one_process(gloo, policy, stage):
    gloo.run(4, train, policy, stage, 1.0)


def test_stages_without_clipping_equal_one_process(gloo):
    gloo.run(4, train, "fp32", 2, None)


def skip_everywhere(poison: float) -> list[int]:
    job = Stage(lr=LR)
    before = [p.detach().clone() for p in job.model.weights]
    job.backward(0, poison if (job.number, job.dp) == (1, 0) else None)
    job.opt.step()
    job.opt.finish_param_sync()
    assert all(map(torch.equal, job.model.weights, before))
    job.backward(1)
    job.opt.step()
    job.opt.finish_param_sync()
    assert not any(map(torch.equal, job.model.weights, before))
    return [job.opt.skipped_steps(), job.opt.taken_steps()]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_on_one_rank_of_one_stage_skips_the_step_everywhere(gloo, poison):
    assert gloo.run(4, skip_everywhere, poison) == [[1, 1]] * 4


def skip_under_a_scaler() -> tuple[int, float]:
    job = Stage(lr=LR)
    scaler = GradScaler("cpu", init_scale=8.0)
    job.backward(0, float("inf") if (job.number, job.dp) == (0, 1) else None)
    scaler.scale(torch.ones(()))
    scaler.unscale_(job.opt)
    scaler.step(job.opt)
    scaler.update()
    return job.opt.skipped_steps(), scaler.get_scale()


def test_a_scaler_backs_off_on_every_stage(gloo):
    assert gloo.run(4, skip_under_a_scaler) == [(1, 4.0)] * 4


def count_messages() -> list[tuple[int, int]]:
    job = Stage(lr=LR)
    sent = []
    all_reduce = collectives.all_reduce

    def counted(tensor: Tensor, group) -> None:
        sent.append((tensor.numel(), group.size()))
        all_reduce(tensor, group)

    job.backward(0)
    collectives.all_reduce = counted
    try:
        job.opt.clip_grad_norm_(1.0)
        job.opt.step()
    finally:
        collectives.all_reduce = all_reduce
    return [size for size in sent if size[1] > 1]


def test_one_small_message_an_axis(gloo):
    """Two parameters a stage: [squares, hash, used, used] to the data-parallel rank, [squares] to the other stage."""
    assert gloo.run(4, count_messages) == [[(4, 2), (1, 2)]] * 4


def measure() -> dict:
    job = Stage(lr=LR, metrics_every=1)
    job.backward(0)
    job.opt.step()
    return job.opt.metrics()


def test_metrics_are_those_of_all_stages(gloo):
    one = OneProcess(2, lr=LR, metrics_every=1)
    one.step(0)
    expected = one.lion.metrics()
    for found in gloo.run(4, measure):
        for key in ("param_norm", "exp_avg_norm", "update_norm", "flipped_share"):
            assert found[key] == pytest.approx(expected[key], rel=1e-6), key
        assert len(found["rank_ms"]) == 4


# ---- tied parameters


def train_tied(policy: str) -> None:
    """The first stage's first parameter is the last stage's second."""
    dtype, precision = POLICIES[policy]
    mesh = mesh_of(pp=2, dp=2)
    stage, dp = place_on(mesh, "pp"), place_on(mesh, "dp")
    shapes = (SHAPES[0], SHAPES[1]) if stage == 0 else (SHAPES[2], SHAPES[0])
    tied = stage  # its position on this stage
    one = OneProcess(2, shapes=SHAPES[:3], dtype=dtype, lr=LR, precision=precision)
    model = GivenGradients(*shapes, dtype=dtype)
    for mine, i in zip(model.weights, (0, 1) if stage == 0 else (2, 0), strict=True):
        mine.data.copy_(one.model.weights[i].data)
    opt = ShardedLion(
        model.named_parameters(),
        lr=LR,
        process_group=mesh["dp"],
        model_parallel=ModelParallel(pipeline=mesh["pp"], tied={"embedding": f"weights.{tied}"}),
        precision=precision,
    )
    for step in range(3):
        grads = gradients(step, dp, SHAPES[:3], dtype)
        mine = [grads[0] / 2, grads[1]] if stage == 0 else [grads[2], grads[0] / 2]  # each use has half of it
        model.loss(mine).backward()
        param = model.weights[tied]
        total = opt.full_grad(param)
        torch.distributed.all_reduce(total, group=mesh["pp"].get_group())
        opt.set_full_grad(param, total)
        assert torch.equal(opt.clip_grad_norm_(1.0), one.step(step, 1.0))
        opt.step()
        opt.finish_param_sync()
        assert torch.equal(param, one.model.weights[0])
    assert torch.equal(model.weights[1 - tied], one.model.weights[1 if stage == 0 else 2])


@pytest.mark.parametrize("policy", ["fp32", "none, stochastic"])
def test_a_tied_parameter_counts_once_and_stays_equal(gloo, policy):
    gloo.run(4, train_tied, policy)


def make_with(tied_name: str, value: float) -> str:
    mesh = mesh_of(pp=2, dp=1)
    model = GivenGradients((4,))
    model.weights[0].data.fill_(value if rank_of(mesh) else 1.0)
    tied = {"embedding": tied_name if rank_of(mesh) else "weights.0"}
    with pytest.raises(ValueError) as raised:
        ShardedLion(
            model.named_parameters(),
            process_group=mesh["dp"],
            model_parallel=ModelParallel(pipeline=mesh["pp"], tied=tied),
        )
    return str(raised.value)


def rank_of(mesh) -> int:
    return place_on(mesh, "pp")


def test_tied_parameters_that_differ_are_refused_on_every_stage(gloo):
    assert all("tied as 'embedding' differs" in text for text in gloo.run(2, make_with, "weights.0", 2.0))


def test_a_tied_name_that_a_stage_does_not_have_is_refused_on_every_stage(gloo):
    assert all("'head' on pipeline stage 1" in text for text in gloo.run(2, make_with, "head", 1.0))


def disagree() -> str:
    mesh = mesh_of(pp=2, dp=1)
    model = GivenGradients((4,))
    with pytest.raises(ValueError) as raised:
        ShardedLion(
            model.parameters(),
            process_group=mesh["dp"],
            model_parallel=ModelParallel(pipeline=mesh["pp"]),
            sharding=ShardingConfig(1 + place_on(mesh, "pp")),
        )
    return str(raised.value)


def test_stages_of_other_settings_are_refused(gloo):
    assert all("'ShardedLion'" in text for text in gloo.run(2, disagree))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tensor": 3}, "tensor must be a ProcessGroup"),
        ({"cut_dim": 1}, "cut_dim must be a function"),
        ({"tied": ["head"]}, "tied must be a dict"),
        ({"tied": {"a": "b"}}, "pass pipeline as well"),
    ],
)
def test_what_cannot_be_model_parallel(arguments, words):
    with pytest.raises(ValueError, match=words):
        ModelParallel(**arguments)
