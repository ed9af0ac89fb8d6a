"""launch/rounds_study.py: what a round computes, where it has to be Lion's own step."""

import json

import pytest
import torch

import rounds_study
from comparison import study
from lion_dist import Lion, PrecisionPolicy
from rounds_study import Arm, Workers
from train import Transformer

FLAGS = "--layers 1 --dim 16 --heads 2 --seq-len 8 --batch-size 8 --steps 6 --held-out 4 --no-compile --lr 1e-2".split()


@pytest.fixture
def args(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["rounds_study.py", *FLAGS, "--out", str(tmp_path), "--arms", "0", "1", "--seeds", "0"]
    )
    return rounds_study.parse_arguments()


def model_of(args) -> Transformer:
    torch.manual_seed(0)
    return Transformer(args.layers, args.dim, args.heads).bfloat16()


def windows_of(step: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(256, (count, 2, 9), dtype=torch.uint8, generator=generator)


def test_one_worker_in_rounds_of_one_step_is_lion_with_fp32_main_params(args):
    model, twin = model_of(args), model_of(args)
    workers = Workers(model, Arm(1, 1, momentum="kept"), args)
    matrices, others = [p for p in twin.parameters() if p.dim() == 2], [p for p in twin.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others}]
    lion = Lion(groups, lr=args.lr, precision=PrecisionPolicy("fp32", torch.float32))
    for step in range(4):
        workers.step(windows_of(step, 1), torch.tensor(args.lr))
        workers.end_round(args.lr, 1)
        twin(windows_of(step, 1)[0]).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        lion.step()
        lion.zero_grad()
    same = [torch.isclose(p.float(), workers.start[name].bfloat16().float()) for name, p in twin.named_parameters()]
    # But for signs of what is nearly zero: clipping rounds to bf16 there and not here.
    assert sum(x.sum() for x in same) > 0.98 * sum(x.numel() for x in same)


def test_the_batched_model_is_the_transformer_of_each_worker(args):
    torch.manual_seed(0)
    models = [Transformer(2, 16, 2) for _ in range(3)]
    params, _ = torch.func.stack_module_state(models)
    windows = windows_of(0, 3)
    losses = rounds_study.losses_of_all(params, windows, layers=2, heads=2)
    losses.sum().backward()
    for i, model in enumerate(models):
        expected = model(windows[i])
        expected.backward()
        torch.testing.assert_close(losses[i], expected)
        for name, p in model.named_parameters():
            torch.testing.assert_close(params[name].grad[i], p.grad)


def test_a_run_with_a_gradient_that_is_not_finite_measures_nothing(args, monkeypatch):
    real = rounds_study.losses_of_all
    monkeypatch.setattr(rounds_study, "losses_of_all", lambda *given: real(*given) * torch.nan)
    with pytest.raises(FloatingPointError, match="seed 0, synchronous"):
        rounds_study.train(args)


def test_counts_are_integers_within_the_steps_of_the_round(args):
    workers = Workers(model_of(args), Arm(workers=4), args)
    for step in range(5):
        workers.step(windows_of(step, 4), torch.tensor(args.lr))
    counts = torch.cat([x.flatten() for x in workers.counts.values()])
    assert torch.equal(counts, counts.round()) and counts.abs().max() == 5
    assert any(not torch.equal(x[0], x[1]) for x in workers.counts.values())  # workers see batches of their own


@pytest.mark.parametrize(
    ("momentum", "expected"), [("kept", [1.0, 3.0]), ("averaged", [2.0, 2.0]), ("reset", [0.0, 0.0])]
)
def test_momentum_at_a_rounds_end(args, momentum, expected):
    workers = Workers(model_of(args), Arm(workers=2, momentum=momentum), args)
    for x in workers.momenta.values():
        x[0], x[1] = 1.0, 3.0
    workers.end_round(args.lr, 30)
    assert all(x[i].eq(value).all() for x in workers.momenta.values() for i, value in enumerate(expected))


@pytest.mark.parametrize("outer", ["mean", "nesterov", "sign"])
def test_the_outer_step_goes_where_the_mean_of_the_integers_points(args, outer):
    workers = Workers(model_of(args), Arm(workers=2, outer=outer), args)
    args.weight_decay = 0.0
    before = {name: x.clone() for name, x in workers.start.items()}
    for x in workers.counts.values():
        x[0], x[1] = 3.0, -1.0
    workers.end_round(0.5, 30)
    moved = {"mean": 0.5, "nesterov": 0.7 * 0.5 * 1.9, "sign": 0.5}[outer]
    assert all(torch.allclose(x - before[name], torch.tensor(moved)) for name, x in workers.start.items())
    assert not any(x.any() for x in workers.counts.values())


def test_a_study_that_was_cut_off_goes_on_and_reports(args, tmp_path, capsys):
    rounds_study.train(args)
    rounds_study.train(args)
    rows = [json.loads(line) for line in (tmp_path / "seeds-0.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == [str(rounds_study.ARMS[0]), str(rounds_study.ARMS[1])]
    capsys.readouterr()
    study.report(args, rounds_study.BASELINES, "rounds.png")
    assert f"| {rounds_study.ARMS[1]} | 1 |" in capsys.readouterr().out


def test_differences_are_paired_by_seed_and_have_an_interval():
    arm = str(rounds_study.ARMS[1])
    rows = [{"arm": str(rounds_study.BASELINE), "seed": seed, "held_out": 1.0 + seed} for seed in range(3)]
    rows += [{"arm": arm, "seed": seed, "held_out": 1.1 + seed + 0.01 * seed} for seed in range(3)]
    (row,) = [row for row in study.summarize(rows, rounds_study.BASELINES) if row["arm"] == arm]
    assert row["difference"] == pytest.approx(0.11) and row["half_interval"] == pytest.approx(4.303 * 0.01 / 3**0.5)
