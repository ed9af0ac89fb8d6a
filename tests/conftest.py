import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported, here and in spawned workers
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of spawned workers
torch.set_num_threads(1)  # several ranks share the cores
hypothesis.settings.load_profile("ci")  # the same examples everywhere, and no deadline: the machine may be busy


@pytest.fixture(scope="session")
def gloo():
    """``gloo.run(world_size, function, *args)``: see ``gloo_workers.py``. Processes start when first needed."""
    from tests.gloo_workers import GlooPool

    pool = GlooPool()
    yield pool
    pool.stop()
