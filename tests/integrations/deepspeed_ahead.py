"""DeepSpeed as ``preloaded.python`` imports it: without half a minute of compiling a shared-memory all-reduce."""

import sys

import deepspeed  # noqa: F401

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
