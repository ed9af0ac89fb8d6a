"""The program itself: verbs, help, exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lion_dist import __version__, cli
from lion_dist.cli.errors import UsageError
from tests import preloaded

VERBS = ("checkpoint", "doctor", "plan", "plot", "suggest")


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^    (\w+)", printed, re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: lion-dist {verb}" in capsys.readouterr().out


def test_no_verb_and_an_unknown_verb_are_refused(capsys):
    for arguments in ([], ["fly"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_a_usage_error_is_one_line_on_stderr_and_exit_code_2(monkeypatch, capsys):
    def refuse(_args):
        raise UsageError("no such thing: 3. Pass 2.")

    monkeypatch.setattr("lion_dist.cli.plot.run", refuse)
    assert cli.main(["plot", "somewhere"]) == 2
    said = capsys.readouterr()
    assert said.err == "lion-dist: no such thing: 3. Pass 2.\n" and said.out == ""


def test_module_and_script_are_the_same_program():
    script = Path(sys.executable).parent / "lion-dist"
    commands = [["-m", "lion_dist.cli"]] + ([[str(script)]] if script.exists() else [])
    for command in commands:
        done = subprocess.run([preloaded.python(), *command, "--version"], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, f"lion-dist {__version__}\n"), done.stderr


def test_a_reader_that_has_read_enough_is_no_traceback():
    command = [preloaded.python(), "-m", "lion_dist.cli", *"plan --params 1b --ranks 8".split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_help_imports_nothing_that_a_verb_might_need():
    code = (
        "import sys, contextlib\nheavy = {'transformers', 'matplotlib', 'deepspeed', 'triton', 'tensorboard'}\n"
        "for name in heavy & set(sys.modules): del sys.modules[name]  # imported ahead\n"
        "from lion_dist.cli import main\nwith contextlib.suppress(SystemExit): main(['--help'])\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([preloaded.python(), "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "", done.stdout + done.stderr
