"""``lion-dist plan``, ``plot`` and ``doctor`` given files that are anything: one line on stderr, and no traceback."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from lion_dist import cli
from lion_dist.cli import collective_check
from lion_dist.cli.findings import OK, Finding
from lion_dist.cpu_backend import compiled_library, native
from tests import preloaded
from tests.seeds import fuzz_seed
from tests.test_compiled_library import put_in_place_of

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
ROW = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 10}
ODD_BYTES = {
    "empty": b"",
    "binary": bytes(range(256)) * 4 + b"\n",
    "utf-16 without a mark": '{"step": 1}\n'.encode("utf-16-le"),
    "deep": b"[" * 100_000 + b"\n",
    "deep objects": b'{"a":' * 100_000 + b"\n",
    "long number": b'{"step": ' + b"9" * 5000 + b"}\n",
    "zeros": b"\0" * 4096 + b"\n",
    "null": b"null\n",
    "a string": b'"step"\n',
    "half": b'{"step": 1',
    "two": b'{"step": 1} {"step": 2}\n',
    "surrogate": b'{"model_type": "\\ud800", "step": "\\ud800"}\n',
}
ODD_NAMES = [b"a$b$\\foo", b"_hidden", b"\xff\xfe", b"two\nlines", b"%s {0}"]
ODD_VALUES = [None, True, "", "x", -1, 0, 1.5, 10**400, 1e308, [], [1], {}, {"a": 1}, "\ud800", 10**12, "a\nb"]


def says_one_line(arguments: list[str], capsys) -> str:
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2, (code, said)
    assert said.count("\n") == 1 and said.startswith("lion-dist: ") and len(said) < 1000, said
    return said


def make_special(path: Path, kind: str) -> None:
    {
        "folder": lambda: path.mkdir(),
        "fifo": lambda: os.mkfifo(path),
        "ring": lambda: path.symlink_to(path),
        "dangling": lambda: path.symlink_to(path.with_name("nowhere")),
        "device": lambda: path.symlink_to("/dev/null"),
    }[kind]()


@pytest.mark.parametrize("content", ODD_BYTES.values(), ids=ODD_BYTES)
def test_plan_of_a_file_that_is_no_config(content, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert str(path) in says_one_line(["plan", "--params", str(path), "--ranks", "2"], capsys)


@pytest.mark.parametrize("kind", ["folder", "fifo", "ring", "dangling", "device"])
def test_plan_of_what_is_no_file(kind, tmp_path, capsys):
    make_special(tmp_path / "config.json", kind)
    says_one_line(["plan", "--params", str(tmp_path / "config.json"), "--ranks", "2"], capsys)


@pytest.mark.parametrize("installed", [True, False], ids=["transformers", "formula"])
@pytest.mark.parametrize("name", [*LLAMA, "tie_word_embeddings", "head_dim", "num_key_value_heads"])
def test_plan_of_a_config_with_an_odd_value_ends_or_says_one_line(name, installed, tmp_path, monkeypatch, capsys):
    if installed:
        pytest.importorskip("transformers")
    else:
        monkeypatch.setattr("lion_dist.planning.model_shapes.importlib.util.find_spec", lambda name: None)
    path = tmp_path / "config.json"
    for value in ODD_VALUES:
        path.write_text(json.dumps(LLAMA | {name: value}))
        code = cli.main(["plan", "--params", str(path), "--ranks", "2"])
        said = capsys.readouterr().err
        assert code in (0, 2) and said.count("\n") == (1 if code else 0), (value, said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ranks", "9" * 400],
        ["--ranks", "2", "--micro-batch", "9" * 30],
        ["--ranks", "2", "--seq-len", "9" * 400],
        ["--ranks", "2", "--accumulate", "9" * 400],
        ["--ranks", "2", "--nodes", "9" * 400],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_plan_of_a_job_that_cannot_be(arguments, capsys):
    says_one_line(["plan", "--params", "1b", *arguments], capsys)


@pytest.mark.parametrize(
    "arguments", [["--gpu-mem", "9" * 400], ["--bandwidth", "inf/1"], ["--bandwidth", "nan/1"], ["--ranks", "1e3"]]
)
def test_plan_of_an_odd_number_is_argparses_own_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--params", "1b", "--ranks", "2", *arguments])
    assert stop.value.code == 2 and f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("content", ODD_BYTES.values(), ids=ODD_BYTES)
def test_plot_of_a_file_that_is_no_log(content, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(content)
    out = tmp_path / "runs.png"
    said = says_one_line(["plot", str(tmp_path / "run"), "--out", str(out)], capsys)
    assert str(tmp_path / "run") in said and not out.exists()


@pytest.mark.parametrize("kind", ["folder", "fifo", "ring", "dangling", "device"])
def test_plot_of_what_is_no_file(kind, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    make_special(tmp_path / "run" / "metrics.jsonl", kind)
    says_one_line(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "runs.png")], capsys)


def test_plot_of_a_ring_of_links(tmp_path, capsys):
    make_special(tmp_path / "run", "ring")
    says_one_line(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "runs.png")], capsys)


@pytest.mark.parametrize("column", ["step", "loss", "grad_norm", "mfu"])
@pytest.mark.parametrize("value", ["x", True, [], {}, 10**400, 1e308, -1e308], ids=lambda value: str(value)[:9])
def test_plot_names_the_line_and_the_column_of_a_value_that_is_no_number(column, value, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    rows = [ROW, ROW | {"step": 2, column: value}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = says_one_line(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "runs.png")], capsys)
    assert f'line 2: "{column}" must be a number, got ' in said


@pytest.mark.parametrize("value", [*map(float, ("nan", "inf", "-inf")), 0, -1, 3e38, -3e38, 1e-300, None], ids=str)
def test_plot_draws_what_a_run_may_have_come_to(value, tmp_path, capsys, recwarn):
    (tmp_path / "run").mkdir()
    rows = [ROW, dict.fromkeys(ROW, value) | {"step": 2, "update_ratio": value}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "runs.png")]) == 0
    assert (tmp_path / "runs.png").stat().st_size > 1000


def run_named(name: bytes, tmp_path: Path) -> bytes:
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    with open(os.path.join(folder, b"metrics.jsonl"), "w") as file:
        file.write(json.dumps(ROW) + "\n")
    return folder


@pytest.mark.parametrize("name", ODD_NAMES, ids=repr)
def test_plot_of_a_run_with_an_odd_name(name, tmp_path, capsys):
    """Whose name is the title of the picture."""
    folder = os.fsdecode(run_named(name, tmp_path))
    assert cli.main(["plot", folder, "--out", str(tmp_path / "runs.png")]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "runs.png").stat().st_size > 1000


def test_plot_of_runs_with_odd_names_into_a_pipe(tmp_path):
    """In a process of its own, whose arguments are bytes and whose stdout is a pipe."""
    folders = [run_named(name, tmp_path) for name in ODD_NAMES]
    command = [preloaded.python(), "-m", "lion_dist.cli", "plot", *folders, "--out", tmp_path / "runs.png"]
    result = subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr
    assert (tmp_path / "runs.png").stat().st_size > 1000


def test_random_damage_never_ends_in_a_traceback(tmp_path, capsys, recwarn):
    """A few bytes of a config and of a log are changed at random, for a bounded time."""
    pytest.importorskip("matplotlib")
    seed = fuzz_seed()
    chosen, stop = random.Random(seed), time.monotonic() + 5.0
    config, run = tmp_path / "config.json", tmp_path / "run"
    run.mkdir()
    log = "".join(json.dumps(ROW | {"step": step}) + "\n" for step in range(1, 4)).encode()
    for _ in range(60):
        if time.monotonic() > stop:
            break
        config.write_bytes(damaged(json.dumps(LLAMA).encode(), chosen))
        (run / "metrics.jsonl").write_bytes(damaged(log, chosen))
        for arguments in (["plan", "--params", str(config), "--ranks", "2"], ["plot", str(run), "--out", f"{run}.png"]):
            code = cli.main(arguments)
            said = capsys.readouterr().err
            assert code in (0, 2) and said.count("\n") == (1 if code else 0), f"seed {seed}: {said}"


def damaged(whole: bytes, chosen: random.Random) -> bytes:
    result = bytearray(whole)
    for _ in range(chosen.randint(1, 3)):
        place = chosen.randrange(len(result))
        result[place : place + chosen.randint(0, 2)] = chosen.randbytes(chosen.randint(0, 2))
    return bytes(result)


# ---- doctor


@pytest.fixture
def doctor(monkeypatch, tmp_path):
    monkeypatch.setattr(collective_check, "on_own_ranks", lambda: [Finding("collectives", OK, "as they should be")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield lambda: cli.main(["doctor"])
    forget()


def forget() -> None:
    native.library.cache_clear()
    compiled_library._warn_uncached.cache_clear()


def the_line(printed: str, what: str) -> str:
    (line,) = [line for line in printed.splitlines() if what in line]
    return line


def test_doctor_with_a_damaged_cache_repairs_it(doctor, tmp_path, capsys):
    doctor()
    (kept,) = (tmp_path / "cache" / "lion_dist").iterdir()
    put_in_place_of(kept, b"\x7fELF damaged")
    forget()
    capsys.readouterr()
    doctor()
    line = the_line(capsys.readouterr().out, "CPU step")
    assert line.startswith("ok") and "compiled C" in line


def test_doctor_says_that_the_cache_is_refused(doctor, tmp_path, capsys):
    (tmp_path / "cache" / "lion_dist").mkdir(parents=True)
    (tmp_path / "cache" / "lion_dist").chmod(0o777)
    doctor()
    line = the_line(capsys.readouterr().out, "CPU step")
    assert line.startswith("note") and "compiled C, again in every process" in line
    assert "may be written by others" in line


def test_doctor_puts_what_a_compiler_says_into_one_line(doctor, tmp_path, monkeypatch, capsys):
    compiler = tmp_path / "odd-cc"
    compiler.write_text("#!/bin/sh\nprintf 'first\\nsecond\\n\\351\\n' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    doctor()
    assert "first second \ufffd" in the_line(capsys.readouterr().out, "CPU step")


def test_doctor_with_an_unbalanced_quote_in_cc(doctor, monkeypatch, capsys):
    monkeypatch.setenv("CC", "gcc '")
    doctor()
    assert "is no command (No closing quotation)" in the_line(capsys.readouterr().out, "CPU step")


def test_doctor_with_an_nvidia_smi_that_prints_anything(doctor, tmp_path, monkeypatch, capsys):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '\\377\\376'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    doctor()
    assert "Traceback" not in capsys.readouterr().out
