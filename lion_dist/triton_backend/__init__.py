"""The step on a GPU, in Triton: one launch for all tensors of a group."""

from lion_dist.triton_backend.cautious import count_aligned
from lion_dist.triton_backend.launch import update

__all__ = ["count_aligned", "update"]
