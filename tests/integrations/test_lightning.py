"""``ShardedLionStrategy`` against Lightning's own DDP with ``Lion``: the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("lightning.pytorch")

from lion_dist import GradScaler, ShardedLion  # noqa: E402
from lion_dist.integrations.lightning import ShardedLionStrategy  # noqa: E402
from tests.integrations.lightning_ranks import (
    Forwarding,
    Regression,
    StageOne,
    Watching,
    WatchingForward,
    batches,
    fit,
    trainer_for,
)  # noqa: E402

CASES = {
    "plain": {},
    "clip and accumulate": {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    "a forward of its own": {"module": Forwarding, "gradient_clip_val": 0.5},
    "manual optimization": {"manual": True},
    "bf16-mixed": {"precision": "bf16-mixed", "gradient_clip_val": 0.5},
    "16-mixed": {"scaler": {"init_scale": 1024.0}},
    "16-mixed, the first steps overflow": {"scaler": {"init_scale": 2.0**18}, "steps": 8},
}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def compare(case: str) -> None:
    theirs, ours = (fit(sharded, **CASES[case]) for sharded in (False, True))
    assert_same(ours["params"], theirs["params"])
    if case in ("plain", "clip and accumulate", "bf16-mixed"):  # the others' are scaled, or clipped already
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
    assert ours["shown"]["grad_norm"] == pytest.approx(ours["norms"][-1], nan_ok=True)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_bit_equal_to_lightnings_ddp_with_lion(gloo, case):
    gloo.run(2, compare, case)


def fit_compiled() -> None:
    """``fit(torch.compile(module))`` under both strategies: eager operations in the same order give the same bits."""
    for sharded in (False, True):
        eager, compiled = (fit(sharded, 3, backend=backend)["params"] for backend in (None, "aot_eager"))
        assert_same(compiled, eager)


def test_a_compiled_module_has_the_bits_of_one_that_is_not(gloo):
    gloo.run(2, fit_compiled)


def accumulate_on_ranks() -> None:
    settings = {"module": StageOne, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    theirs, ours = (fit(sharded, **settings) for sharded in (False, True))
    assert_same(ours["params"], theirs["params"])
    assert ours["kept"] == [True, False] * 4


def test_micro_batches_stay_on_their_rank_in_stage_1(gloo):
    gloo.run(2, accumulate_on_ranks)


@pytest.mark.parametrize("module", [Watching, WatchingForward])
def test_a_layer_computes_while_the_next_ones_parameters_arrive(gloo, module):
    for found in gloo.run(2, fit, True, 4, module):
        assert found["kept"] == [True, False, False, False]  # nothing is in flight in the first


def clip_scaled() -> None:
    """Whatever the scale, the same norms and weights."""
    one, other = (fit(True, scaler={"init_scale": scale}, gradient_clip_val=0.5) for scale in (1.0, 1024.0))
    assert_same(one["params"], other["params"])
    assert one["norms"] == pytest.approx(other["norms"], rel=1e-3)


def test_sixteen_bits_are_unscaled_before_they_are_clipped_and_shown(gloo):
    gloo.run(2, clip_scaled)


def train_by_hand() -> None:
    """bf16 parameters, against a loop without Lightning."""
    model = Regression("ShardedLion").to(torch.bfloat16)
    (opt,), (schedule,) = model.configure_optimizers()
    for batch in itertools.islice(batches(8, 2), 4):
        model.loss(batch.to(torch.bfloat16)).backward()
        opt.clip_grad_norm_(0.5)
        opt.step()
        schedule["scheduler"].step()
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    opt.close()
    found = fit(True, precision="bf16-true", gradient_clip_val=0.5)["params"]
    assert found["body.weight"].dtype == torch.bfloat16
    assert_same(found, expected)


def test_bf16_true_is_a_loop_by_hand_over_bf16_parameters(gloo):
    gloo.run(2, train_by_hand)


# ---- checkpoints


def params_after(sharded: bool, steps: int, settings: dict) -> dict:
    return fit(sharded, steps, **settings)["params"]


@pytest.mark.parametrize("settings", [{}, {"scaler": {"growth_interval": 2}}], ids=["32-true", "16-mixed"])
def test_a_resumed_run_has_the_bits_of_one_that_ddp_and_lion_resume(gloo, tmp_path, settings):
    resumed = []
    for sharded in (False, True):
        path = tmp_path / f"{sharded}.ckpt"
        gloo.run(2, params_after, sharded, 3, settings | {"save": path})
        resumed.append(gloo.run(2, params_after, sharded, 6, settings | {"resume": path})[0])
    assert_same(*resumed)


def test_a_checkpoint_of_lightnings_ddp_with_lion_is_resumed(gloo, tmp_path):
    path = tmp_path / "lion.ckpt"
    gloo.run(2, params_after, False, 3, {"save": path})
    theirs, ours = (gloo.run(2, params_after, sharded, 6, {"resume": path})[0] for sharded in (False, True))
    assert_same(ours, theirs)


def test_another_number_of_ranks_resumes_lion(gloo, tmp_path):
    saved = gloo.run(2, params_after, False, 3, {"save": tmp_path / "last.ckpt"})[0]
    assert_same(gloo.run(1, params_after, False, 3, {"resume": tmp_path / "last.ckpt"})[0], saved)


def state_after_resume(path) -> dict:
    model = Regression("ShardedLion")
    trainer = trainer_for(ShardedLionStrategy(), 3)
    trainer.fit(model, batches(8, 1), ckpt_path=path)  # all of its steps are done
    opt = trainer.optimizers[0]
    opt.consolidate_state_dict()
    params = {name: param.detach().clone() for name, param in model.named_parameters()}
    return {"params": params, "exp_avg": [state["exp_avg"] for state in opt.full_state_dict()["state"].values()]}


def test_another_number_of_ranks_resumes(gloo, tmp_path):
    saved = gloo.run(2, params_after, True, 3, {"save": tmp_path / "last.ckpt"})[0]
    (found,) = gloo.run(1, state_after_resume, tmp_path / "last.ckpt")
    assert_same(found["params"], saved)
    written = torch.load(tmp_path / "last.ckpt")["optimizer_states"][0]["state"]
    assert all(map(torch.equal, found["exp_avg"], [state["exp_avg"] for state in written.values()]))


# ---- what is refused, and what is put in its place


def refuse_another_optimizer() -> None:
    with pytest.raises(TypeError, match="got AdamW: nobody would reduce its gradients"):
        trainer_for(ShardedLionStrategy(), 1).fit(Regression("AdamW"), batches(2, 2))


def test_another_optimizer_is_refused(gloo):
    gloo.run(2, refuse_another_optimizer)


def refuse_clipping_by_value() -> None:
    with pytest.raises(ValueError, match="needs whole gradients"):
        fit(True, gradient_clip_val=0.5, gradient_clip_algorithm="value")


def test_clipping_by_value_is_refused(gloo):
    gloo.run(2, refuse_clipping_by_value)


class OwnScaler(torch.amp.GradScaler):
    """Somebody else's."""


def replace_scaler() -> None:
    settings = {"init_scale": 2.0**10, "growth_interval": 7}
    for scaler in (torch.amp.GradScaler("cpu", **settings), GradScaler("cpu", **settings)):
        strategy = ShardedLionStrategy()
        trainer_for(strategy, 1, scaler).fit(Regression("ShardedLion"), batches(2, 2))
        found = strategy.precision_plugin.scaler
        assert type(found) is GradScaler and found.get_scale() == 2.0**10 and found.get_growth_interval() == 7
    with pytest.raises(TypeError, match="has a OwnScaler, which finds no gradients"):
        trainer_for(ShardedLionStrategy(), 1, OwnScaler("cpu")).fit(Regression("ShardedLion"), batches(2, 2))


def test_the_scaler_becomes_one_that_finds_gradients_and_another_class_is_refused(gloo):
    gloo.run(2, replace_scaler)


def clip_scaled_by_hand() -> None:
    with pytest.raises(ValueError, match="comes before the gradients are unscaled"):
        fit(True, manual=True, scaler={})


def test_clipping_before_unscaling_in_manual_optimization_is_refused(gloo):
    gloo.run(2, clip_scaled_by_hand)


def fit_twice() -> None:
    model = Regression("ShardedLion")
    for _ in range(2):
        trainer = trainer_for(ShardedLionStrategy(), 2)
        trainer.fit(model, batches(4, 2))
        trainer.optimizers[0].close()
    trainer = trainer_for(ShardedLionStrategy(), 2)
    trainer.fit(model, batches(4, 2))
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(model, batches(4, 2))
    assert isinstance(trainer.optimizers[0], ShardedLion)


def test_the_same_module_can_be_fitted_again(gloo):
    gloo.run(2, fit_twice)
