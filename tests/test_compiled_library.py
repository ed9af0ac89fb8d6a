"""The cache of compiled C: nothing damaged or foreign is loaded; whatever fails, training goes on, with a warning."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from lion_dist.coded_sync import codes_native
from lion_dist.coded_sync.shard_codec import CodedSlice, ShardCodec
from lion_dist.cpu_backend import compiled_library, native
from lion_dist.kernels.backends import choose_backend

CPU = torch.device("cpu")
LAST_IS_OUTPUT = 'for out in "$@"; do :; done\n'  # in a script, the last argument
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


def forget() -> None:
    """As a new process."""
    native.library.cache_clear()
    codes_native.library.cache_clear()
    compiled_library._warn_uncached.cache_clear()


@pytest.fixture(scope="module")
def compiler(once) -> str:
    """``cc``, which takes seconds for a source and compiles each once for all tests here."""
    return once("compiler", compiler_that_keeps)


def compiler_that_keeps(folder: Path) -> str:
    asked = 'for arg in "$@"; do [ "$arg" = "$out" ] || { [ -f "$arg" ] && cat "$arg" || echo "$arg"; }; done'
    text = f"""kept={folder}/$({{ {asked}; }} | cksum | tr ' ' -).so
[ -f "$kept" ] || {{ cc "$@" && cp "$out" "$kept.$$" && mv "$kept.$$" "$kept"; exit; }}
cp "$kept" "$out"
"""
    return compiler_that(folder, LAST_IS_OUTPUT + text)


@pytest.fixture
def cache(monkeypatch, tmp_path, compiler):
    """An empty cache; the folder is made by the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", compiler)
    forget()
    yield tmp_path / "cache" / "lion_dist"
    forget()


def load() -> tuple[str, list[str]]:
    """(backend chosen, warnings), as in a new process."""
    forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backend = choose_backend(CPU, None)
        choose_backend(CPU, None)
    return backend, [str(warning.message) for warning in caught]


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def compiler_that(tmp_path: Path, compiles: str) -> str:
    return str(script(tmp_path / "odd-cc", f'#!/bin/sh\n[ "$1" = --version ] && exec cc --version\n{compiles}\n'))


# ---- damage


def damaged(library: Path, kind: str) -> bytes:
    whole = library.read_bytes()
    middle = len(whole) // 2
    return {
        "one bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "cut": whole[:middle],
        "empty": b"",
        "longer": whole + b"\0",
    }[kind]


def put_in_place_of(library: Path, content: bytes) -> None:
    """Another file of that name: this process has loaded the library, and ends with it."""
    other = library.with_name("other")
    other.write_bytes(content)
    other.replace(library)


@pytest.mark.parametrize("kind", ["one bit", "cut", "empty", "longer"])
def test_a_damaged_library_is_compiled_again(cache, kind):
    assert load() == ("cpu_native", [])
    (kept,) = cache.iterdir()
    sound = kept.read_bytes()
    put_in_place_of(kept, damaged(kept, kind))
    assert load() == ("cpu_native", [])
    assert [path.read_bytes() for path in cache.iterdir()] == [sound]


def test_a_damaged_library_is_never_opened(cache, monkeypatch):
    load()
    (kept,) = cache.iterdir()
    put_in_place_of(kept, b"")
    opened = []
    monkeypatch.setattr(compiled_library.ctypes, "CDLL", lambda path: opened.append(path))
    with pytest.raises(compiled_library.NoLibraryError):
        compiled_library.load(native.SOURCE, symbols=["lion_update"])
    assert all("building-" in path for path in opened)


def test_the_bytes_reach_the_disk_before_the_name_does(cache, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor):
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(path, target):
        done.append(("rename", str(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    load()
    (kept,) = cache.iterdir()
    (first, written), (second, renamed), (third, folder) = done
    assert (first, second, third) == ("fsync", "rename", "fsync")
    assert written.endswith(".so") and renamed == str(kept) and folder == str(cache)


# ---- folders


def test_an_unreadable_home_does_not_matter_where_the_cache_is_named(cache, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a uid without an entry
    assert load() == ("cpu_native", [])
    assert len(list(cache.iterdir())) == 1


@needs_root
def test_a_user_without_a_home_has_the_compiled_step_and_is_told():
    """In a process of a uid that the password database does not know, with nothing in its environment."""
    program = (
        "import os, torch, lion_dist.cpu_backend\n"  # before: the interpreter's own files may be root's alone
        "from lion_dist.kernels.backends import choose_backend\n"
        "os.setgid(54321); os.setuid(54321)\n"
        "print(choose_backend(torch.device('cpu'), None))\n"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", os.getcwd())}
    result = subprocess.run([sys.executable, "-c", program], env=environment, cwd="/", capture_output=True, text=True)
    assert result.stdout.strip() == "cpu_native", result.stderr
    assert result.stderr.count("neither XDG_CACHE_HOME nor HOME is an absolute path") == 1


@pytest.mark.parametrize("named", ["", "relative", "./also/relative"])
def test_a_cache_that_is_not_absolute_is_the_homes(cache, monkeypatch, tmp_path, named):
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert load() == ("cpu_native", [])
    assert len(list((tmp_path / "home" / ".cache" / "lion_dist").iterdir())) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


def test_a_relative_home_is_not_used(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", ".")
    monkeypatch.chdir(tmp_path)
    backend, (said,) = load()
    assert backend == "cpu_native" and "neither XDG_CACHE_HOME nor HOME is an absolute path" in said
    assert not list(tmp_path.iterdir())


def plant(cache: Path, tmp_path: Path) -> Path:
    """Put a library that leaves a mark when it is loaded in the place of ours, its name and checksum right."""
    load()
    (kept,) = cache.iterdir()
    source, mark = tmp_path / "planted.c", tmp_path / "ran"
    source.write_text(f'''#include <stdio.h>
        __attribute__((constructor)) static void run(void) {{ fclose(fopen("{mark}", "w")); }}
        void lion_update(void) {{}}''')
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(kept)], check=True)
    stem = kept.name.rsplit("-", 1)[0]
    kept.rename(cache / compiled_library._name(stem, kept))
    return mark


def test_a_planted_library_would_run(cache, tmp_path):
    """What the tests below refuse."""
    mark = plant(cache, tmp_path)
    load()
    assert mark.exists()


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_folder_that_others_may_write_to_is_refused(cache, tmp_path, mode):
    mark = plant(cache, tmp_path)
    cache.chmod(mode)
    backend, (said,) = load()
    assert backend == "cpu_native" and "may be written by others (chmod go-w " in said
    assert not mark.exists()


@needs_root
def test_a_folder_of_another_user_is_refused(cache, tmp_path):
    mark = plant(cache, tmp_path)
    os.chown(cache, 12345, -1)
    backend, (said,) = load()
    assert backend == "cpu_native" and "belongs to user 12345, not to 0" in said
    assert not mark.exists()


def test_a_link_in_the_place_of_the_folder_is_refused(cache, tmp_path):
    mark = plant(cache, tmp_path)
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    backend, (said,) = load()
    assert backend == "cpu_native" and "is a link" in said
    assert not mark.exists()


@needs_root
def test_a_file_of_another_user_is_not_loaded(cache, tmp_path):
    mark = plant(cache, tmp_path)
    os.chown(next(cache.iterdir()), 12345, -1)
    assert load() == ("cpu_native", [])
    assert not mark.exists()


def test_a_file_that_others_may_write_to_is_not_loaded(cache, tmp_path):
    mark = plant(cache, tmp_path)
    next(cache.iterdir()).chmod(0o766)
    assert load() == ("cpu_native", [])
    assert not mark.exists()


def test_whatever_the_umask_the_library_is_kept_and_loaded_again(cache, monkeypatch):
    before = os.umask(0)
    try:
        assert load() == ("cpu_native", [])
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (kept,) = cache.iterdir()
    inode = kept.stat().st_ino
    assert load() == ("cpu_native", []) and kept.stat().st_ino == inode


def refuse_to_write(monkeypatch, cache: Path) -> None:
    """As a file system mounted read-only, which root cannot write to either."""
    make = compiled_library.tempfile.TemporaryDirectory

    def make_elsewhere(*args, dir=None, **more):
        if dir is not None:
            raise OSError(30, "Read-only file system", str(dir))
        return make(*args, **more)

    monkeypatch.setattr(compiled_library.tempfile, "TemporaryDirectory", make_elsewhere)


def test_a_read_only_cache_is_said_once(cache, monkeypatch):
    refuse_to_write(monkeypatch, cache)
    backend, (said,) = load()
    assert backend == "cpu_native" and "cannot be written (Read-only file system)" in said
    assert not list(cache.iterdir())


def coded_messages() -> list[torch.Tensor]:
    """What an owner sends, by the backend that is chosen here and by PyTorch operations."""
    old = torch.linspace(-1, 1, 640).to(torch.bfloat16)
    messages = []
    for backend in (choose_backend(CPU, None), "cpu"):
        owner = ShardCodec(torch.bfloat16, True, 640, [[CodedSlice(0, 0, 640, 0)]], 0, CPU, 0, backend)
        owner.begin(torch.tensor([1e-3]), torch.tensor([0.999]), torch.tensor([3]), old)
        owner.encode((old.float() * 0.999 - 1e-3).to(torch.bfloat16))
        messages.append(owner.message(owner.capacity))
    return messages


def test_a_read_only_cache_that_holds_the_step_alone_serves_coded_sync(cache, monkeypatch):
    load()
    refuse_to_write(monkeypatch, cache)
    forget()
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        assert torch.equal(*coded_messages())
    assert len(caught) == 1 and codes_native.library() is not None


def test_codes_that_cannot_be_compiled_are_made_by_pytorch_and_said_once(cache, monkeypatch, tmp_path):
    load()
    monkeypatch.setenv("CC", compiler_that(tmp_path, "echo no room >&2; exit 1"))
    monkeypatch.setattr(compiled_library, "_key", lambda compiler, *sources: "0" * 24)
    library = next(cache.iterdir())
    shutil.copy(library, cache / compiled_library._name("native-" + "0" * 24, library))
    forget()
    with pytest.warns(UserWarning, match="odd-cc did not compile it .no room., so update codes are made") as caught:
        assert torch.equal(*coded_messages())
        assert torch.equal(*coded_messages())
    assert len(caught) == 1


# ---- leftovers


def test_folders_of_killed_builds_are_removed_and_those_of_running_ones_stay(cache):
    cache.mkdir(parents=True, mode=0o700)
    old = time.time() - 2 * compiled_library.LEFTOVER_AGE
    for name in ("building-old", "tmpabcd1234"):
        (cache / name).mkdir()
        (cache / name / "half.so").write_bytes(b"half")
        os.utime(cache / name, (old, old))
    (cache / "building-new").mkdir()
    assert load() == ("cpu_native", [])
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {"building-new"}


# ---- compilers


@pytest.mark.parametrize("when", ["--version", "compiling"])
def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(cache, monkeypatch, tmp_path, when):
    pids = tmp_path / "pids"
    hang = f"sleep 600 & echo $! >> {pids}; wait"
    if when == "--version":
        compiler = str(script(tmp_path / "odd-cc", f"#!/bin/sh\n{hang}\n"))
        monkeypatch.setattr(compiled_library, "VERSION_TIMEOUT", 1.0)
    else:
        compiler = compiler_that(tmp_path, hang)
        monkeypatch.setattr(compiled_library, "COMPILE_TIMEOUT", 1.0)
    monkeypatch.setenv("CC", compiler)
    backend, (said,) = load()
    assert backend == "cpu" and "odd-cc did not compile it (it had not ended after 1 s)" in said
    deadline = time.monotonic() + 30
    while any(is_alive(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not list(cache.glob("*"))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_compiler_that_reads_its_input_ends(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler_that(tmp_path, "cat; echo no input >&2; exit 1"))
    backend, (said,) = load()
    assert backend == "cpu" and "no input" in said


def test_words_that_are_not_utf8_are_passed_on(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler_that(tmp_path, r"printf 'erreur: \351chec\n' >&2; exit 1"))
    backend, (said,) = load()
    assert backend == "cpu" and "erreur: \ufffdchec" in said


def test_a_version_that_is_not_utf8_is_a_version(cache, monkeypatch, tmp_path):
    text = '#!/bin/sh\n[ "$1" = --version ] && { printf \'cc \\351\\n\'; exit 0; }\nexec cc "$@"\n'
    monkeypatch.setenv("CC", str(script(tmp_path / "odd-cc", text)))
    assert load() == ("cpu_native", [])


def test_an_unbalanced_quote_in_cc_is_said(cache, monkeypatch):
    monkeypatch.setenv("CC", 'gcc "-O2')
    backend, (said,) = load()
    assert backend == "cpu" and "CC='gcc \"-O2' is no command (No closing quotation)" in said


def test_a_library_without_its_function_is_not_kept(cache, monkeypatch, tmp_path):
    compiles = 'echo "int other;" > "$out.c"; cc -shared "$out.c" -o "$out"'
    monkeypatch.setenv("CC", compiler_that(tmp_path, LAST_IS_OUTPUT + compiles))
    backend, (said,) = load()
    assert backend == "cpu" and "the compiled library lacks lion_update" in said
    assert not list(cache.iterdir())


def test_a_compiler_that_makes_something_else_is_said(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler_that(tmp_path, LAST_IS_OUTPUT + 'echo "no library" > "$out"'))
    backend, (said,) = load()
    assert backend == "cpu" and "the compiled library cannot be loaded" in said
    assert not list(cache.iterdir())


def test_a_compiler_that_makes_nothing_is_said(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler_that(tmp_path, "exit 0"))
    backend, (said,) = load()
    assert backend == "cpu" and "neither an error nor a library" in said
