"""What ``lion-dist plan`` says of DeepSpeed, against the tensors of engines."""

from __future__ import annotations

import pytest
import torch

from lion_dist.planning.estimates import Job, plan
from lion_dist.planning.model_shapes import ModelShapes, shapes_of
from tests.models import mlp

pytest.importorskip("deepspeed")
WIDTHS = [256] * 9
PRECISION = {"bf16": "bf16-fp32", "fp32": "fp32, bf16 momentum"}


def memory_of_deepspeed(stage: int, precision: str) -> dict[str, int]:
    from tests.integrations.deepspeed_ranks import ds_config, make_engine

    engine = make_engine(mlp(*WIDTHS), ds_config(stage, precision))
    inputs = torch.randn(4, WIDTHS[0]).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    engine.backward(engine(inputs).float().square().mean())
    engine.step()
    params = set(engine.module.parameters())
    states = engine.basic_optimizer.state
    return {
        "params": sum(p.nbytes + (p.ds_tensor.nbytes if hasattr(p, "ds_tensor") else 0) for p in params),
        "main_params": sum(main.nbytes for main in states if main not in params),
        "exp_avg": sum(state["exp_avg"].nbytes for state in states.values()),
    }


def shapes() -> ModelShapes:
    return shapes_of(mlp(*WIDTHS), "mlp", "test", hidden=WIDTHS[0], layers=len(WIDTHS) - 1, vocab=1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("stage", range(4))
def test_plan_of_deepspeed_is_what_its_tensors_take(gloo, stage, precision):
    plans = plan(shapes(), Job(2), PRECISION[precision])
    planned = next(p.memory for p in plans if p.engine == f"DeepSpeed stage {stage}")
    if precision == "fp32" and stage == 0:
        assert planned["main_params"] == 0  # the parameters are their own
    for measured in gloo.run(2, memory_of_deepspeed, stage, precision):
        assert measured == {kind: pytest.approx(planned[kind], rel=0.03) for kind in measured}
