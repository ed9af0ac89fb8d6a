"""A Python that has imported torch before it starts: for the programs that tests start by the dozen.

    process = subprocess.Popen([preloaded.python(), "-m", "torch.distributed.run", ...])

An interpreter that imports torch, makes an optimizer (which imports torch._dynamo) and ends takes 3 to 5 s of a core; a
program under torchrun on two ranks three times that, whatever it does. Here one process has imported what all need. A
program's process is forked from it, with the arguments, the folder, the environment and the open files of whoever
asked: a process of its own, that can be killed and whose exit code is its own. What stands in for it, and is what
``Popen`` holds, passes signals on and ends as it does.

A program that uses a framework takes ``preloaded.python(*preloaded.DEEPSPEED)``, which has imported that, too: one more
process, forked from the first. The package under test is never imported ahead.

What cannot be passed on to a process that is forked is left to a new interpreter: limits of memory, variables that are
read while torch or a framework is imported, options of Python but ``-u``, ``-c`` and ``-m``.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import os
import pickle
import random
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path

IMPORTED = (
    "matplotlib.pyplot",
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.elastic.multiprocessing.errors",
    "torch.optim.lr_scheduler",
    "torch.utils.data",
)
# Read while torch is imported, or before Python starts.
READ_AT_IMPORT = tuple("PYTHON MPL OMP_ MKL_ KMP_ LD_ MALLOC_ TORCH_LOGS TORCHDYNAMO TORCHINDUCTOR TRITON_".split())
# Of these, what is read later. (torch sets the inductor's folder itself in a process that has once asked for it, as the
# collection of all tests does: without this, no program was forked in a whole run.)
PASSED_ON = ("PYTHON", "PYTHONPATH", "PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
DEEPSPEED = ("tests.integrations.deepspeed_ahead",)
TRAINER = (*DEEPSPEED, "transformers.trainer")  # and Accelerate, which imports DeepSpeed where it is installed
ON_CPUS = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# Read while frameworks are imported.
READ_BY_FRAMEWORKS = tuple("CUDA_VISIBLE_DEVICES DS_ HF_ TRANSFORMERS_ ACCELERATE_".split())
ABOVE = 512  # so many open files are neither the server's nor a program's at its start
ANSWER = struct.Struct("i")  # an exit code; minus a signal
ENTERED = ("net", "mnt")  # namespaces that a process enters after it has been forked, in this order
NAMESPACES = (*ENTERED, "pid", "user")
ROOT = Path(__file__).parents[1]

# A new interpreter without any import of its own but these: 20 ms. ``{...}`` are filled in.
STAND_IN = """#!{executable} -SE
import array, os, pickle, signal, socket, struct, sys

def ask():
    request = dict(argv=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ), pid=os.getpid(),
                   namespaces=[os.readlink("/proc/self/ns/" + kind) for kind in {namespaces!r}],
                   limits=open("/proc/self/limits").read())
    is_open = lambda file: os.path.exists("/proc/self/fd/%d" % file)
    request["files"] = [file for file in map(int, os.listdir("/proc/self/fd")) if is_open(file)]
    line = socket.socket(socket.AF_UNIX)
    line.connect({address!r})
    message = pickle.dumps(request)
    files = array.array("i", request["files"])
    line.sendmsg([struct.pack("i", len(message))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    line.sendall(message)
    return line, line.recv(1)

passed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # the program may run before this does
try:
    line, agrees = ask()
except OSError:
    agrees = b""
if agrees != b"y":
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    os.execv({executable!r}, [{executable!r}, *sys.argv[1:]])
for number in passed_on:
    signal.signal(number, lambda number, _frame: line.send(bytes([number])))
signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
answer = line.recv(4)
code = struct.unpack("i", answer)[0] if len(answer) == 4 else -signal.SIGKILL
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def python(*modules: str) -> str:
    """The path of what is started in place of ``sys.executable``; the process behind it starts with the first call.

    ``modules``: frameworks that have been imported as well, on CPUs.
    """
    folder = Path(tempfile.mkdtemp(prefix="preloaded"))
    address, stand_in = folder / "socket", folder / "python"
    stand_in.write_text(STAND_IN.format(executable=sys.executable, address=str(address), namespaces=NAMESPACES))
    stand_in.chmod(0o755)
    start = python() if modules else sys.executable
    command = [start, "-m", "tests.preloaded", str(address), str(stand_in), *modules]
    environment = os.environ | (ON_CPUS if modules else {})
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.stdin.close)  # it ends with us
    if server.stdout.read(1) != b"y":
        raise RuntimeError(f"{' '.join(command)} has ended with {server.wait()}")
    return str(stand_in)


# ---------------------------------------------------------------------------------------------------------------
# The process that has imported torch.


class Started:
    """A program's process, and the line to its stand-in."""

    def __init__(self, line: socket.socket, pid: int):
        self.line, self.pid, self.ended = line, pid, os.pidfd_open(pid)


def serve(address: str, stand_in: str, *frameworks: str) -> None:
    """Fork a process for each stand-in that asks, until standard input ends. Returns in those that are forked."""
    own = {"environment": dict(os.environ), "namespaces": namespaces(), "limits": Path("/proc/self/limits").read_text()}
    own["early"] = READ_AT_IMPORT + (READ_BY_FRAMEWORKS if frameworks else ())
    for name in (*IMPORTED, *frameworks):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b"y")
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                os._exit(0)
            elif key.fileobj is not listener:
                attend(key, selector)
            elif start(listener.accept()[0], selector, own, stand_in):
                return


def start(line: socket.socket, selector: selectors.BaseSelector, own: dict, stand_in: str) -> bool:
    """Fork a process for the stand-in at the other end of ``line``, or send it to a new interpreter. Returns whether
    this is the process that has been forked."""
    request, files = receive(line)
    if can_be_forked(request, own):
        pid = os.fork()
        if pid == 0:
            forget(selector, line)
            become(request, files, own, stand_in)
            return True
        started = Started(line, pid)
        selector.register(line, selectors.EVENT_READ, started)
        selector.register(started.ended, selectors.EVENT_READ, started)
        answer(line, b"y")
    else:
        answer(line, b"n")
        line.close()
    for file in files:
        os.close(file)
    return False


def answer(line: socket.socket, message: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # the stand-in has been killed
        line.send(message)


def forget(selector: selectors.BaseSelector, line: socket.socket) -> None:
    """In a process that has been forked: close what is the server's. (Objects that are collected later would close
    files of the program that have got their numbers.)"""
    for key in list(selector.get_map().values()):
        if isinstance(key.fileobj, socket.socket):
            key.fileobj.close()
        elif key.fileobj:  # standard input is replaced
            os.close(key.fileobj)
    selector.close()
    line.close()


def attend(key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
    """A program has ended, or its stand-in says something or has ended."""
    started = key.data
    if key.fileobj is started.line:
        if started.line.fileno() < 0:  # it has ended just now
            return
        with contextlib.suppress(ProcessLookupError):
            numbers = started.line.recv(16)
            for number in numbers:
                os.kill(started.pid, number)
            if not numbers:  # killed
                selector.unregister(started.line)
                os.kill(started.pid, signal.SIGKILL)
        return
    _, status = os.waitpid(started.pid, 0)
    answer(started.line, ANSWER.pack(os.waitstatus_to_exitcode(status)))
    with contextlib.suppress(KeyError):
        selector.unregister(started.line)
    selector.unregister(started.ended)
    os.close(started.ended)
    started.line.close()


def receive(line: socket.socket) -> tuple[dict, list[int]]:
    head, found, _, _ = line.recvmsg(ANSWER.size, socket.CMSG_SPACE(4 * 64))
    files = array.array("i", found[0][2])
    message, (length,) = b"", ANSWER.unpack(head)
    while len(message) < length:
        message += line.recv(length - len(message))
    return pickle.loads(message), list(files)


def namespaces() -> list[str]:
    return [os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES]


def can_be_forked(request: dict, own: dict) -> bool:
    def read_early(environment: dict[str, str]) -> dict[str, str]:
        early = {name: value for name, value in environment.items() if name.startswith(own["early"])}
        return {name: value for name, value in early.items() if name not in PASSED_ON}

    arguments = [argument for argument in request["argv"] if argument != "-u"]
    return (
        bool(arguments)
        and (arguments[0] in ("-c", "-m") or not arguments[0].startswith("-"))
        and request["namespaces"][len(ENTERED) :] == own["namespaces"][len(ENTERED) :]
        and request["limits"] == own["limits"]
        and read_early(request["environment"]) == read_early(own["environment"])
    )


def become(request: dict, files: list[int], own: dict, stand_in: str) -> None:
    """This process is the program's from here on."""
    enter(request, own)
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, ABOVE) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(request["files"], moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    # What Python made of the server's files knows whether one can seek in those.
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", errors=sys.stdout.errors, closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.setpgid(0, 0)
    os.chdir(request["folder"])
    paths = [own["environment"].get("PYTHONPATH", ""), request["environment"].get("PYTHONPATH", "")]
    before, now = ([path for path in text.split(os.pathsep) if path] for text in paths)
    sys.path[:] = [*now, *(path for path in sys.path[1:] if path not in before)]
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    sys.executable = stand_in  # what it starts, starts so, too: ranks
    sys.argv = request["argv"]


def enter(request: dict, own: dict) -> None:
    """The namespaces of the stand-in, which waits for an answer."""
    of_each = zip(NAMESPACES, request["namespaces"], own["namespaces"], strict=True)
    others = [kind for kind, theirs, ours in of_each if theirs != ours]
    files = [os.open(f"/proc/{request['pid']}/ns/{kind}", os.O_RDONLY) for kind in others]
    libc = ctypes.CDLL(None, use_errno=True)
    for file in files:
        if libc.setns(file, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(file)


def run_program() -> None:
    """Run ``sys.argv`` as an interpreter runs its arguments."""
    is_unbuffered = sys.argv[0] == "-u"
    arguments = sys.argv[is_unbuffered:]
    if is_unbuffered or os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(rest[0], None)  # runpy warns of a module that it runs twice
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        source, name = rest[0], "<string>"
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(kind).parent.resolve()))
        source, name = Path(kind).read_text(), kind
        main.__file__ = kind
    exec(compile(source, name, "exec"), main.__dict__)


if __name__ == "__main__":
    serve(*sys.argv[1:])
    run_program()
