"""launch/compare_engines.py in which something befalls some rank: python drill.py DRILLS FLAGS...

DRILLS is ATTEMPT,ATTEMPT,... and an attempt is ACT:RANK:STEP+ACT:RANK:STEP+... ("any" is every rank or step): each
attempt of torchrun takes the next one, so that one job that resumes by itself goes through all. Acts that name a phase
of the step kill the rank there with SIGKILL, which no program can prepare for.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import compare_engines
from comparison import engines, resuming
from lion_dist import param_sync, sharded_params
from lion_dist.sharding import collectives

Act = Callable[..., object]  # may be told the step that it belongs to; else it is the present one
now = {"step": 0}


def before(owner: object, name: str, act: Act) -> None:
    """`owner.name` calls act() first."""
    original = getattr(owner, name)

    def acting(*args, **kwargs):
        act()
        return original(*args, **kwargs)

    setattr(owner, name, acting)


def after(owner: object, name: str, act: Act) -> None:
    """`owner.name` calls act() when it has started what it starts."""
    original = getattr(owner, name)

    def acting(*args, **kwargs):
        result = original(*args, **kwargs)
        act()
        return result

    setattr(owner, name, acting)


def in_backward(act: Act) -> None:
    """When the gradient has come half-way through the model."""
    original = engines.ShardedEngine.backward

    def backward(self, loss):
        weight = self.model.blocks[0].mlp_out.weight
        handle = weight.register_hook(lambda grad: grad if act() else None)
        original(self, loss)
        handle.remove()

    engines.ShardedEngine.backward = backward


def in_save(act: Act) -> None:
    """When a file of a checkpoint is written but not yet durable: in the background, maybe during a later step."""
    original = resuming.Checkpoints.save

    def save(self, step):
        self.finish()  # the checkpoint before it has its files made durable
        before(os, "fsync", lambda: act(step))
        original(self, step)

    resuming.Checkpoints.save = save


def with_a_nan_gradient(act: Act) -> None:
    original = engines.ShardedEngine.backward
    engines.ShardedEngine.backward = lambda self, loss: original(self, loss * (float("nan") if act() else 1.0))


def before_the_step(act: Act) -> None:
    before(compare_engines, "train_step", act)


KILLS: dict[str, Callable[[Act], None]] = {
    "backward": in_backward,
    "reduce-scatter": lambda act: after(collectives, "reduce_scatter", act),
    "step": lambda act: before(param_sync, "lion_update_", act),
    "all-gather": lambda act: after(collectives, "all_gather", act),
    "save": in_save,
}


def construction_error() -> None:
    raise ValueError("this rank alone cannot be set up")


OTHERS: dict[str, tuple[Callable[[Act], None], Act]] = {
    "nan": (with_a_nan_gradient, lambda: True),
    "error": (lambda act: before(sharded_params, "check_param", act), construction_error),
    "stuck": (before_the_step, lambda: time.sleep(3600)),
    "slow": (before_the_step, lambda: time.sleep(0.25)),
    "SIGTERM": (before_the_step, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "SIGUSR1": (before_the_step, lambda: os.kill(os.getpid(), signal.SIGUSR1)),
}


def say(line: str) -> None:
    """One write, which nothing that other threads and ranks print to the same pipe comes between."""
    sys.stdout.flush()
    os.write(sys.stdout.fileno(), line.encode())


def install(drill: str) -> None:
    name, rank, step = drill.split(":")
    if rank not in ("any", os.environ.get("RANK", "0")):
        return
    if name in KILLS:
        where, act = KILLS[name], lambda: os.kill(os.getpid(), signal.SIGKILL)
    else:
        where, act = OTHERS[name]

    one_at_a_time = threading.Lock()  # several threads of a save may come here, and the first one's act may be the last

    def at_its_step(of: int | None = None):
        if step not in ("any", str(now["step"] if of is None else of)):
            return False
        with one_at_a_time:
            if step != "any":
                say(f"drill: rank {rank}, {name}, step {step}\n")
            return act()

    where(at_its_step)


def note_steps() -> None:
    original = compare_engines.global_batch

    def global_batch(text, batch_size, seq_len, seed, step):
        now["step"] = step
        return original(text, batch_size, seq_len, seed, step)

    compare_engines.global_batch = global_batch


if __name__ == "__main__":
    attempt, drills = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), sys.argv.pop(1).split(",")
    note_steps()
    if attempt < len(drills):
        for drill in drills[attempt].split("+"):
            install(drill)
    sys.exit(compare_engines.main())
