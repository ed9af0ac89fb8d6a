"""``lion-dist plot``: what it draws, and what it says where there is nothing to draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lion_dist import cli
from lion_dist.cli import plot
from lion_dist.cli.run_logs import read_rows


def make_run(folder: Path, steps: int = 5, **more) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"step": s, "loss": 5.0 / s, "grad_norm": 1.0 + s, "lr": 1e-3, "tokens_per_s": 1000} | more
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_several_runs_come_into_one_png(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=7, mfu=0.4)]
    out = tmp_path / "pictures" / "runs.png"
    assert cli.main(["plot", *map(str, runs), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{out}: a 5 steps, b 7 steps\n"


def test_metrics_of_the_optimizer_get_panels_of_their_own():
    plain = [{"step": 1, "loss": 1.0}]
    assert plot.panels_of({"a": plain}) == ["loss", "grad_norm", "lr", "tokens_per_s"]
    measured = plain + [{"step": 2, "lost_share": 0.1, "rank_ms": [1, 2]}]
    assert plot.panels_of({"a": plain, "b": measured})[4:] == ["lost_share"]


def test_a_run_that_is_going_on_may_have_half_a_line(tmp_path):
    run = make_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in read_rows(run, plot.PANELS)] == [1, 2, 3, 4, 5]


def test_gaps_and_values_that_are_not_finite_are_no_obstacle(tmp_path):
    rows = [{"step": 1, "loss": float("nan"), "grad_norm": 0.0}, {"step": 2, "loss": 1.0, "mfu": None}, {"step": 3}]
    plot.draw({"a": rows, "b": [{"step": 1}]}, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 1000


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    folders = [tmp_path / "x" / "sharded", tmp_path / "y" / "sharded", tmp_path / "ddp"]
    assert list(plot._names(folders)) == [str(folders[0]), str(folders[1]), "ddp"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder. Pass the --out folder of a run"),
        (
            lambda path: path.mkdir(),
            "has no metrics.jsonl. launch/train.py writes it into its --out folder, and a Trainer",
        ),
        (lambda path: make_run(path / "inside"), "has no metrics.jsonl. Did you mean"),
        (lambda path: make_run(path, steps=0), "has no line yet"),
        (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text("no json\n")), "line 1 is not JSON"),
        (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text("[1]\n")), 'line 1 has no "step"'),
    ],
)
def test_a_folder_without_metrics_says_what_to_pass(make, message, tmp_path, capsys):
    make(tmp_path / "run")
    assert cli.main(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "runs.png")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs.png").exists()


def test_other_pictures_than_png_are_refused(tmp_path, capsys):
    assert cli.main(["plot", str(make_run(tmp_path / "a")), "--out", str(tmp_path / "runs.svg")]) == 2
    assert "must end in .png" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "runs.png"
    assert cli.main(["plot", str(make_run(tmp_path / "a")), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "file") in said and "Pass a path that can be used." in said and said.count("\n") == 1


def test_without_matplotlib_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plot", str(make_run(tmp_path / "a"))]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def axes_of(rows: dict, tmp_path: Path, monkeypatch, **settings) -> list:
    """The panels that ``draw`` makes, as matplotlib's axes."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot.draw(rows, tmp_path / "runs.png", **settings)
    return figures[0].axes


def test_held_out_losses_of_the_summary_are_points_in_the_loss_panel(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    (run / "summary.json").write_text(json.dumps({"held_out": {"0": 5.5, "5": 1.25}}))
    loss = axes_of({"a": read_rows(run, plot.PANELS)}, tmp_path, monkeypatch)[0]
    (points,) = [line for line in loss.lines if line.get_label() == "a, held out"]
    assert list(points.get_xdata()) == [0, 5] and list(points.get_ydata()) == [5.5, 1.25]


@pytest.mark.parametrize("text", ["[]", "{}", '{"held_out": {"last": 1}}', "{"])
def test_a_summary_of_something_else_is_refused_by_name(text, tmp_path, capsys):
    run = make_run(tmp_path / "a")
    (run / "summary.json").write_text(text)
    assert cli.main(["plot", str(run), "--out", str(tmp_path / "runs.png")]) == 2
    assert "summary.json" in capsys.readouterr().err


def test_the_newest_state_of_a_trainer_is_read(tmp_path):
    for steps in (5, 10):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        rows = [{"step": step, "loss": 5.0 / step, "learning_rate": 1e-4} for step in range(1, steps + 1)]
        history = [*rows, {"step": steps, "eval_loss": 2.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    rows = read_rows(tmp_path, plot.PANELS)
    assert rows[-2:] == [{"step": 10, "loss": 0.5, "lr": 1e-4}, {"step": 10, "held_out_loss": 2.0}]


def test_runs_that_agree_to_the_bit_are_both_seen(tmp_path, monkeypatch):
    rows = read_rows(make_run(tmp_path / "a"), plot.PANELS)
    first, second = axes_of({"a": rows, "b": rows}, tmp_path, monkeypatch)[0].lines
    assert first.get_linewidth() > second.get_linewidth() and second.get_linestyle() == "--"


@pytest.mark.parametrize(("value", "limits"), [(0, (0.0, 1.0)), (1000, (0.0, 1200.0)), (-2.0, (-2.4, 0.0))])
def test_a_constant_has_an_axis_from_zero(value, limits, tmp_path, monkeypatch):
    rows = [{"step": step, "tokens_per_s": value} for step in (1, 2, 3)]
    assert axes_of({"a": rows}, tmp_path, monkeypatch)[3].get_ylim() == pytest.approx(limits)


def test_a_smoothed_loss_is_a_mean_over_the_values_before_it(tmp_path, monkeypatch):
    rows = [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]
    raw, smoothed = axes_of({"a": rows}, tmp_path, monkeypatch, smooth=2)[0].lines
    assert list(raw.get_ydata()) == [1, 2, 3, 4] and list(smoothed.get_ydata()) == [1, 1.5, 2.5, 3.5]


def test_a_mean_of_no_values_is_refused(tmp_path, capsys):
    assert cli.main(["plot", str(make_run(tmp_path / "a")), "--smooth", "0"]) == 2
    assert "--smooth must be at least 1, got 0" in capsys.readouterr().err


def test_the_title_of_a_single_run_says_what_was_run(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "summary.json").write_text(json.dumps({"held_out": {"5": 1.25}}))
    title = plot.title_of(read_rows(run, plot.PANELS))
    assert title == "5 steps, loss 5 to 1, held out 1.25, 1,000 tokens/s"
