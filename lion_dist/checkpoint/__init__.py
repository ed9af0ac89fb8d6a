"""Checkpoints through torch.distributed.checkpoint, as named boxes of full tensors."""

from lion_dist.checkpoint.save_load import CheckpointError, load, save

__all__ = ["CheckpointError", "load", "save"]
