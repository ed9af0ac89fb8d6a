"""The update codes on a GPU: the reference's digits and escapes, and messages that CPU and GPU replay alike."""

import pytest
import torch

from lion_dist.coded_sync import codes
from lion_dist.coded_sync.codes import INTEGER
from lion_dist.coded_sync.shard_codec import CodedSlice, ShardCodec
from lion_dist.kernels.reference import random_bits
from tests.kernels.cases import BF16, FP16, FP32, troubled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

NUMEL = 1 << 20
SLICES = [
    [CodedSlice(0, 0, 700_001, 2**32 - 100), CodedSlice(1, 700_032, NUMEL - 64, 5)],
    [CodedSlice(0, 64, 70, 12345)],
    [CodedSlice(0, 0, NUMEL, 0)],
]
LR, DECAY, STEPS = torch.tensor([1e-3, 3e-4]), torch.tensor([0.9999, 1.0]), torch.tensor([3, 2**33])
STORAGES = pytest.mark.parametrize("dtype, has_main", [(BF16, True), (FP16, True), (FP32, False), (BF16, False)])
GPU, CPU = ("cuda", "triton"), ("cpu", "cpu")


def codec(dtype, has_main, shard: int, device: str, backend: str) -> ShardCodec:
    return ShardCodec(dtype, has_main, NUMEL, SLICES, shard, torch.device(device), seed=7, backend=backend)


def one_step(dtype, has_main) -> tuple[torch.Tensor, torch.Tensor]:
    """Old and new parameters: every digit there is, and a hundredth of elements that none foresees."""
    generator = torch.Generator().manual_seed(3)
    layout = codes.digits_for(dtype, has_main)
    old, new = torch.zeros(2, NUMEL, dtype=dtype)
    for s in SLICES[0]:
        numel = s.stop - s.start
        part = torch.randn(numel, generator=generator) * 0.02
        part[::20] = troubled(numel, FP32, generator)[::20]
        part = part.to(dtype)
        bits = random_bits(torch.arange(numel) + s.index_start, 7, STEPS[s.row])
        digits = torch.randint(layout.radix, (numel,), generator=generator)
        moved = codes.replay(part, digits, LR[s.row], DECAY[s.row], layout, bits)
        moved[::100] = 5.0
        old[s.start : s.stop], new[s.start : s.stop] = part, moved
    return old, new


def encode(codec: ShardCodec, old: torch.Tensor, new: torch.Tensor) -> tuple[set[int], torch.Tensor, torch.Tensor]:
    """(places of the escapes, packed digits, the message)."""
    device = codec.device
    codec.begin(LR.to(device), DECAY.to(device), STEPS.to(device), old.to(device))
    count = int(codec.encode(new.to(device)))
    assert 0 < count <= codec.capacity
    places = set(codec.escape_index[:count].tolist())
    return places, codec.packed_of(codec.fixed).cpu(), codec.message(codec.capacity)


@STORAGES
def test_a_gpu_encodes_as_the_reference_does(dtype, has_main):
    old, new = one_step(dtype, has_main)
    places, packed, _ = encode(codec(dtype, has_main, 0, *GPU), old, new)
    expected_places, expected_packed, _ = encode(codec(dtype, has_main, 0, *CPU), old, new)
    assert places == expected_places
    assert torch.equal(packed, expected_packed)


@STORAGES
@pytest.mark.parametrize("owner, replica", [(CPU, GPU), (GPU, CPU), (GPU, GPU)])
def test_a_message_is_replayed_alike_on_a_gpu_and_a_cpu(dtype, has_main, owner, replica):
    old, new = one_step(dtype, has_main)
    _, _, message = encode(codec(dtype, has_main, 0, *owner), old, new)
    message, mine = message.to(replica[0]), torch.ones(NUMEL, dtype=dtype)
    flat = torch.cat([old, mine, old]).to(replica[0])
    nothing = torch.zeros_like(message)
    codec(dtype, has_main, 1, *replica).replay(flat, torch.stack([message, nothing, nothing]))
    integer = INTEGER[dtype]
    assert torch.equal(flat[:NUMEL].cpu().view(integer), new.view(integer))
    assert torch.equal(flat[NUMEL : 2 * NUMEL].cpu(), mine)
