"""The programs in launch/ as a user starts them: processes, their output, and the losses that they leave."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import torch.distributed as dist

from tests import preloaded

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
COMPARE = ROOT / "launch" / "compare_engines.py"  # with --engine sharded where nothing is said
DRILL = Path(__file__).with_name("drill.py")
HANG = 600  # seconds after which a program is taken to hang, on however slow a machine
TINY = "--layers 1 --dim 16 --heads 2 --seq-len 16 --batch-size 8 --warmup 2 --lr 1e-2".split()
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see launch/comparison/ranks.py
}


def torchrun(ranks: int, *flags: object, frameworks: tuple[str, ...] = ()) -> list[str]:
    """``frameworks``: that the program imports (see ``preloaded.python``)."""
    python = preloaded.python(*frameworks)
    start = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, *map(str, flags)]


def start(command: list[str], environment: dict[str, str] = ENVIRONMENT) -> subprocess.Popen:
    """In a session of its own, so that whatever it leaves behind can be ended."""
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen, timeout: float = HANG) -> subprocess.CompletedProcess:
    """Its exit code and what it printed. Raises TimeoutExpired, having ended it and its children."""
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as late:
        process.terminate()  # torchrun ends its workers, which are in sessions of their own
        try:
            late.output, _ = process.communicate(timeout=40)
        finally:
            end(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, printed)


def end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: list[str]) -> subprocess.CompletedProcess:
    return finish(start(command))


def meeting_place() -> tuple[dist.TCPStore, dict[str, str]]:
    """A store for ranks that no torchrun starts, to be held while they run, and the environment that leads them there.

    Its port is in use from the start: one that is looked for and let go may be another's when a rank listens on it.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, where


def rows(out: Path) -> list[dict]:
    """The lines of metrics.jsonl so far."""
    metrics = out / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def losses(out: Path) -> list[tuple]:
    """(step, loss, lr, grad norm) of each step so far: what a resumed run repeats bit for bit."""
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows(out)]


def wait_for_steps(process: subprocess.Popen, out: Path, count: int, seconds: float = HANG) -> None:
    """Until so many steps are in metrics.jsonl."""
    deadline = time.monotonic() + seconds
    while len(rows(out)) < count:
        assert time.monotonic() < deadline and process.poll() is None, finish(process, 40).stdout
        time.sleep(0.1)
