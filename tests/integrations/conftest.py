import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported, here and in spawned workers


@pytest.fixture(scope="package")
def gloo():
    """Ranks of their own, gone afterwards: once DeepSpeed has run in a process, its bf16 products round differently."""
    from tests.gloo_workers import GlooPool

    pool = GlooPool()
    yield pool
    pool.stop()
