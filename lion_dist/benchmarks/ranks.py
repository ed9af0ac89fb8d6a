"""The ranks of a benchmark: torchrun's, or one of some that are pretended."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def join(pretended: int | None = None) -> torch.device:
    """Make the default process group; return this rank's device, which is the current one.

    Args:
        pretended: be rank 0 of so many, of which the others do not exist (torch's fake process group): collectives take
            no time and move nothing. None: the ranks are torchrun's.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if pretended:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=pretended)
    elif device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return device
