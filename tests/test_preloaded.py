"""A program that is forked from a process with torch in it is what it would be if Python had started it."""

import os
import resource
import signal
import subprocess
import time

import pytest

from tests import preloaded

IS_FORKED = "import sys; print('torch._dynamo' in sys.modules)"


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([preloaded.python(), *arguments], capture_output=True, text=True, timeout=60, **options)


def test_a_program_has_torch_before_it_begins_and_not_the_package():
    done = run("-c", "import sys; print('torch._dynamo' in sys.modules, 'lion_dist' in sys.modules)")
    assert done.stdout == "True False\n"


def test_it_has_the_folder_the_environment_and_the_arguments_of_whoever_asked(tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['COLOUR'], sys.argv, input())"
    done = run("-c", code, "a", "b", cwd=tmp_path, env=os.environ | {"COLOUR": "blue"}, input="line\n")
    assert done.stdout == f"{tmp_path} blue ['-c', 'a', 'b'] line\n"


def test_a_script_is_main_beside_its_folder(tmp_path):
    (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'")
    script = tmp_path / "script.py"
    script.write_text("import neighbour; print(__name__, __file__, neighbour.NAME)")
    assert run("-u", str(script)).stdout == f"__main__ {script} neighbour\n"


def test_it_prefers_modules_of_its_own_pythonpath(tmp_path):
    (tmp_path / "hypothesis.py").write_text("")
    done = run("-c", "import hypothesis; print(hypothesis.__file__)", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.stdout == f"{tmp_path / 'hypothesis.py'}\n"


@pytest.mark.parametrize("code, expected", [("import sys; sys.exit(3)", 3), ("raise ValueError('no')", 1)])
def test_it_ends_with_its_own_exit_code(code, expected):
    assert run("-c", code).returncode == expected


def test_it_ends_as_it_was_killed():
    assert run("-c", "import os; os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL


SLEEPING = "import os, signal, sys, time; {}; print(os.getpid(), flush=True); time.sleep(60)"


def test_signals_reach_it():
    command = [preloaded.python(), "-c", SLEEPING.format("signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 7


def test_it_dies_with_what_stands_in_for_it():
    with subprocess.Popen([preloaded.python(), "-c", SLEEPING.format("pass")], stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        process.kill()
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{pid}"):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_files_that_are_passed_on_keep_their_numbers():
    read, write = os.pipe()
    done = run("-c", f"import os; os.write({write}, b'through')", pass_fds=[write])
    os.close(write)
    assert done.returncode == 0 and os.read(read, 100) == b"through"
    os.close(read)


@pytest.mark.parametrize(
    "options",
    [
        {"env": os.environ | {"OMP_NUM_THREADS": "3"}},
        {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))},
    ],
    ids=["a variable that is read while torch is imported", "another limit"],
)
def test_what_cannot_be_passed_on_is_left_to_a_new_interpreter(options):
    assert run("-c", IS_FORKED).stdout == "True\n"
    assert run("-c", IS_FORKED, **options).stdout == "False\n"


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_a_folder_that_is_looked_up_when_it_is_used_is_passed_on(name):
    """torch sets it in any process that has once asked for it, and not in what was read of the environment before."""
    for environment in (os.environ | {name: "/tmp/somewhere"}, {k: v for k, v in os.environ.items() if k != name}):
        assert run("-c", IS_FORKED, env=environment).stdout == "True\n"


def test_options_of_python_are_left_to_a_new_interpreter():
    assert run("-W", "error", "-c", IS_FORKED).stdout == "False\n"


def test_what_it_starts_with_its_own_python_has_torch_too():
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {IS_FORKED!r}], check=True)"
    assert run("-c", code).stdout == "True\n"


def test_frameworks_are_imported_ahead_where_they_are_asked_for():
    code = "import sys; print('accelerate' in sys.modules, 'lion_dist' in sys.modules)"
    command = [preloaded.python("accelerate"), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | preloaded.ON_CPUS)
    assert done.stdout == "True False\n"


def test_what_a_framework_reads_while_it_is_imported_is_left_to_a_new_interpreter():
    environment = os.environ | preloaded.ON_CPUS | {"HF_HOME": "/tmp/somewhere"}
    command = [preloaded.python("accelerate"), "-c", IS_FORKED]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment).stdout == "False\n"


def test_it_is_in_the_network_of_whoever_asked():
    network = "import os, sys; print('torch._dynamo' in sys.modules, os.readlink('/proc/self/ns/net'))"
    command = ["unshare", "--net", "--mount", preloaded.python(), "-c", network]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unshare failed" in done.stderr:
        pytest.skip(f"needs network namespaces: {done.stderr.strip()}")
    is_forked, where = done.stdout.split()
    assert is_forked == "True" and where != os.readlink("/proc/self/ns/net")
