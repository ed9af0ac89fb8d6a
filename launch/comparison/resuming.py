"""Checkpoints of a run: written while it trains, kept by number, and gone on from."""

import itertools
import warnings
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from comparison.engines import PlainEngine
from comparison.ranks import say
from comparison.report import RESULTS
from lion_dist.checkpoint import CheckpointError

# What a resumed run must share with the first one to land on the same losses.
TRAJECTORY = "steps batch_size micro_batches seq_len lr weight_decay warmup clip seed replicate".split()


class Checkpoints:
    """The checkpoints OUT/step-NNNNNN of one run. Every rank calls every method."""

    def __init__(self, args: Namespace, engine: PlainEngine, scheduler: LambdaLR, text: str):
        self.folder, self.keep_last = args.out, args.keep_last
        self.engine, self.scheduler = engine, scheduler
        self.settings = {name: getattr(args, name) for name in TRAJECTORY}
        self.last_failed = False
        self.settings |= {"text": text, "ranks": dist.get_world_size()}

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save(self, step: int) -> None:
        """Starts the checkpoint of `step`, after the one before it has been written.

        If that one failed (a disk that was full for a while) the run goes on, for this one will be newer. Two in a row
        end the run: it would train on with nothing to resume from.
        """
        try:
            self.finish()
            self.last_failed = False
        except CheckpointError as error:
            if self.last_failed:
                raise
            self.last_failed = True
            say(f"a checkpoint failed, training goes on and the next one is tried: {error}")
        extra = {"step": step, "scheduler": self.scheduler.state_dict(), "settings": self.settings}
        self.engine.save(self.path(step), extra)

    def finish(self) -> None:
        """Waits until the checkpoint that was started is whole, and removes those that are not to be kept."""
        self.engine.finish_save()
        if self.keep_last:
            self.engine.keep_last(self.folder, self.keep_last)

    def resume(self, how: str | None) -> int:
        """Returns the number of completed steps: of the newest whole checkpoint, or 0 for a run that begins.

        `how` is --resume; with "auto" a checkpoint with damaged files is left out, for nobody may be there to choose
        another. A run that begins where an earlier one was sets its checkpoints aside in OUT/earlier-N, so
        that they are not taken for its own when it is resumed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = [self.engine.newest(self.folder) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(newest)  # one rank's look decides: another's may come a moment later
        found = self._verified() if how == "auto" else newest[0]
        if found is not None and how is not None:
            return self._load(found)
        if newest[0] is not None and dist.get_rank() == 0:
            _set_aside(self.folder)
        dist.barrier()
        return 0

    def _verified(self) -> Path | None:
        with warnings.catch_warnings(record=True) as left_out:
            warnings.simplefilter("always")
            found = self.engine.newest_verified(self.folder)
        for warning in left_out:
            say(str(warning.message))
        return found

    def _load(self, path: Path) -> int:
        extra = self.engine.load(path)
        self.scheduler.load_state_dict(extra["scheduler"])
        saved, now = extra["settings"], self.settings
        changed = [f"{name} {saved.get(name)} -> {now[name]}" for name in now if saved.get(name) != now[name]]
        if changed:
            say("other settings than the first run's, so its losses will not repeat: " + ", ".join(changed))
        say(f"resumed from {path}, {extra['step']} steps done")
        return extra["step"]


def _set_aside(folder: Path) -> None:
    aside = next(path for n in itertools.count(1) if not (path := folder / f"earlier-{n}").exists())
    aside.mkdir()
    results = [folder / name for name in RESULTS if (folder / name).exists()]
    for path in [*results, *sorted(folder.glob("step-*"))]:  # while a checkpoint is left, a killed move is begun again
        path.rename(aside / path.name)
    say(f"checkpoints and metrics of an earlier run are in {aside} now; --resume would have gone on from them")
