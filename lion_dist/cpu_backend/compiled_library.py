"""C sources of this package, compiled by the machine's own compiler at first use, and kept in the user's cache.

The cache holds code that is loaded into the process, so it is trusted only as far as it can be checked: the folder and
the library belong to this user and nobody else may write to them, and the name of a library carries the checksum of
its bytes. A library that is damaged (a disk, a power cut) is removed and compiled again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

# No contraction: the reference rounds every operation. Nothing here reads the floating-point environment.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
FLAGS += ("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
if platform.machine() == "x86_64":
    FLAGS += ("-mprefer-vector-width=512",)  # 12% on a bf16 momentum where there is AVX-512; nothing elsewhere
VERSION_TIMEOUT, COMPILE_TIMEOUT = 30.0, 180.0  # seconds; a loaded machine takes a tenth of them
LEFTOVER_AGE = 3600.0  # seconds; no build takes so long, so its process was killed
MAX_MESSAGE = 1000  # characters that are passed on of what a compiler prints


class NoLibraryError(RuntimeError):
    """Why there is no compiled library, as a clause: "no C compiler was found"."""


def load(source: Path, *included: Path, symbols: Sequence[str]) -> ctypes.CDLL:
    """The library of ``source``, from the cache or compiled now, with its functions ``symbols``.

    Where the cache cannot be used the library is compiled for this process alone, and a warning says so once.

    Raises:
        NoLibraryError: the compiler is missing or fails, or what it makes is not the library.
    """
    compiler = find_compiler()
    stem = f"{source.stem}-{_key(compiler, source, *included)}"
    folder, problem = _usable_cache()
    if folder is not None:
        _remove_leftovers(folder)
        kept = _load_kept(folder, stem, symbols)
        if kept is not None:
            return kept
        try:
            return _build(compiler, source, stem, symbols, folder)
        except OSError as error:
            problem = f"the cache folder {folder} cannot be written ({error.strerror})"
    try:
        built = _build(compiler, source, stem, symbols, None)
    except OSError as error:
        raise NoLibraryError(f"{problem}, nor can a temporary folder be written ({error})") from error
    _warn_uncached(problem)
    return built


def find_compiler() -> list[str]:
    """The command, which may be several words (``CC="ccache gcc"``)."""
    chosen = os.environ.get("CC", "")
    try:
        words = shlex.split(chosen)
    except ValueError as error:
        raise NoLibraryError(f"CC={chosen!r} is no command ({error})") from error
    words = words or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    if not words:
        raise NoLibraryError("no C compiler was found")
    return words


# ---- the cache folder


def cache_folder() -> Path | None:
    """Where libraries are kept; None where neither XDG_CACHE_HOME nor the home directory is an absolute path.

    A relative one would mean another folder in each working directory, which may be anybody's.
    """
    home = os.path.expanduser("~")  # stays "~" without HOME and without an entry in the password database
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), os.path.join(home, ".cache")):
        if os.path.isabs(folder):
            return Path(folder) / "lion_dist"
    return None


def _usable_cache() -> tuple[Path | None, str]:
    """The folder, made when it is not there; or None and the reason."""
    folder = cache_folder()
    if folder is None:
        return None, "neither XDG_CACHE_HOME nor HOME is an absolute path"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        return None, f"the cache folder {folder} cannot be made ({error.strerror})"
    if not stat.S_ISDIR(status.st_mode):
        return None, f"the cache folder {folder} is a link, and what it leads to may be changed by others"
    if status.st_uid != os.geteuid():
        return None, f"the cache folder {folder} belongs to user {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & 0o022:
        return None, f"the cache folder {folder} may be written by others (chmod go-w {folder})"
    return folder, ""


@functools.cache
def _warn_uncached(problem: str) -> None:
    warnings.warn(
        f"lion_dist: {problem}, so the C code is compiled again in every process. Set XDG_CACHE_HOME to a folder of "
        "your own to keep it.",
        stacklevel=4,
    )


def _remove_leftovers(folder: Path) -> None:
    """Remove the folders of builds that were killed."""
    for left in [*folder.glob("building-*"), *folder.glob("tmp????????")]:
        try:
            status = left.lstat()
        except FileNotFoundError:
            continue  # another rank has removed it
        if stat.S_ISDIR(status.st_mode) and time.time() - status.st_mtime > LEFTOVER_AGE:
            shutil.rmtree(left, ignore_errors=True)  # in a read-only cache it stays


# ---- one library


def _key(compiler: Sequence[str], *sources: Path) -> str:
    """Of all that decides what the compiler makes."""
    version = _run([*compiler, "--version"], VERSION_TIMEOUT)
    texts = [path.read_bytes() for path in sources]
    return hashlib.sha256(b"\n".join([*texts, *map(str.encode, FLAGS), version, _machine()])).hexdigest()[:24]


def _machine() -> bytes:
    """What -march=native looks at, so that machines that share a home directory do not share a binary."""
    try:
        text = Path("/proc/cpuinfo").read_bytes()
    except OSError:
        return (platform.machine() + platform.processor()).encode()
    wanted = (b"flags", b"model name", b"Features")
    return b"".join(sorted({line for line in text.splitlines() if line.startswith(wanted)}))


def _load_kept(folder: Path, stem: str, symbols: Sequence[str]) -> ctypes.CDLL | None:
    for kept in sorted(folder.glob(f"{stem}-*.so")):
        try:
            status = kept.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                continue  # somebody else could have put it there
            if kept.name != _name(stem, kept):
                kept.unlink()
                continue
            return _open(kept, symbols)
        except (OSError, NoLibraryError):
            continue  # removed by another rank, unreadable, or made where another C library was: build one
    return None


def _name(stem: str, library: Path) -> str:
    return f"{stem}-{hashlib.sha256(library.read_bytes()).hexdigest()[:32]}.so"


def _open(library: Path, symbols: Sequence[str]) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise NoLibraryError(f"the compiled library cannot be loaded ({error})") from error
    missing = [symbol for symbol in symbols if not hasattr(loaded, symbol)]
    if missing:
        raise NoLibraryError(f"the compiled library lacks {', '.join(missing)}")
    return loaded


def _build(
    compiler: Sequence[str], source: Path, stem: str, symbols: Sequence[str], folder: Path | None
) -> ctypes.CDLL:
    """Compile, try, and keep it in ``folder`` if given. Ranks that build at once each put a whole file in place."""
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as building:
        made = Path(building) / f"{stem}.so"
        _run([*compiler, *FLAGS, str(source), "-o", str(made)], COMPILE_TIMEOUT)
        if not made.is_file():
            raise NoLibraryError(f"{shlex.quote(compiler[0])} did not compile it (neither an error nor a library)")
        loaded = _open(made, symbols)
        if folder is not None:
            made.chmod(0o700)  # whatever the umask: one that others may write to would not be loaded again
            _sync(made)
            made.replace(folder / _name(stem, made))
            _sync(folder)
    return loaded


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _run(command: Sequence[str], timeout: float) -> bytes:
    """What ``command`` prints.

    Raises:
        NoLibraryError: it cannot be started, fails, or takes longer than ``timeout`` seconds.
    """
    compiler = shlex.quote(command[0])
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that all that it starts can be ended
        )
    except OSError as error:
        raise NoLibraryError(f"{compiler} did not compile it ({error})") from error
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        if isinstance(error, subprocess.TimeoutExpired):
            raise NoLibraryError(f"{compiler} did not compile it (it had not ended after {timeout:g} s)") from error
        raise
    if process.returncode:
        said = errors.decode(errors="replace").strip() or f"exit status {process.returncode}"
        raise NoLibraryError(f"{compiler} did not compile it ({said[:MAX_MESSAGE]})")
    return output
