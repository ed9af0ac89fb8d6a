"""Checkpoints through torch.distributed.checkpoint, as named boxes of full tensors. See docs/checkpoints.md."""

from lion_dist.checkpoint.errors import CheckpointError
from lion_dist.checkpoint.load import load, newest, verify
from lion_dist.checkpoint.save import PendingSave, keep_last, save, save_async

__all__ = ["CheckpointError", "PendingSave", "keep_last", "load", "newest", "save", "save_async", "verify"]
