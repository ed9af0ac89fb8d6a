"""State on a GPU: through host memory to disk and back, and to a CPU."""

import pytest
import torch
from torch import nn

from lion_dist import Lion, ShardedLion, checkpoint
from tests.checkpoint.engines import assert_same_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE = "cuda"


def made(make, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32)).to(device, torch.bfloat16)
    return {"model": model, "optimizer": make(model.parameters(), lr=1e-3, weight_decay=0.1)}


def train(made, steps):
    for step in steps:
        for param in made["model"].parameters():
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
            param.grad = grad.to(param.device, param.dtype)
        made["optimizer"].step()


@pytest.mark.parametrize("make", [Lion, ShardedLion])
def test_a_gpu_goes_on_where_a_gpu_stopped_and_so_does_a_cpu(tmp_path, make):
    first = made(make, DEVICE)
    train(first, range(3))
    checkpoint.save(tmp_path / "saved", **first)
    train(first, range(3, 6))
    checkpoint.save(tmp_path / "never stopped", **first)
    for device in (DEVICE, "cpu"):
        other = made(make, device)
        checkpoint.load(tmp_path / "saved", **other)
        train(other, range(3, 6))
        checkpoint.save(tmp_path / f"resumed on {device}", **other)
        assert_same_tensors(tmp_path / "never stopped", tmp_path / f"resumed on {device}")


@pytest.mark.parametrize("make", [Lion, ShardedLion])
def test_a_save_in_the_background_is_of_the_moment_of_the_call(tmp_path, make):
    first = made(make, DEVICE)
    train(first, range(3))
    checkpoint.save(tmp_path / "at once", **first)
    pending = checkpoint.save_async(tmp_path / "later", **first)
    train(first, range(3, 6))
    pending.wait()
    assert_same_tensors(tmp_path / "at once", tmp_path / "later")
