"""Update codes: what the reference promises, over every bf16 value there is, and that every backend sends the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lion_dist.coded_sync import codes
from lion_dist.coded_sync.codes import INTEGER, SENARY, TERNARY
from lion_dist.coded_sync.shard_codec import LARGEST_SHARD, CodedSlice, ShardCodec
from lion_dist.kernels.reference import StepScalars, lion_step, random_bits, split_main
from tests.kernels.cases import BF16, FP16, FP32, troubled

CPU = torch.device("cpu")
BACKENDS = ["cpu", "cpu_native", "triton"]
LRS = [1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 0.1, 1.0]
ALL_BF16 = torch.arange(2**16).to(torch.int16).view(BF16)
# Of a main param: the ends of what rounds to its bf16 value, around it, and the middle of each half.
REMAINDERS = [-0x8000, -0x7FFF, -0x4000, -1, 0, 1, 0x4000, 0x7FFF]
SIGNS = [-1, 0, 1]
IN_CACHE = 2**17  # elements; of more at once, every operation goes through memory and takes twice as long


@functools.cache
def all_splits() -> tuple[Tensor, Tensor, Tensor]:
    """([n] bf16, [n] remainders, [n] signs): every main param that rounds to every bf16 value, near enough.

    A remainder below zero does not go with a zero: the main param would be a NaN.
    """
    param, remainder, sign = (
        x.flatten()
        for x in torch.meshgrid(torch.arange(2**16), torch.tensor(REMAINDERS), torch.tensor(SIGNS), indexing="ij")
    )
    param, remainder = param.to(torch.int16).view(BF16), remainder.to(torch.int16)
    exists = (param != 0) | (remainder >= 0)
    return param[exists], remainder[exists], sign[exists].float()


def move(param, main, sign, lr, weight_decay, bits=None, cautious_wd=False) -> Tensor:
    """One step of the reference implementation, whose update has the given signs."""
    scalars = StepScalars.from_group(lr, (0.9, 0.99), weight_decay)
    return lion_step(param, main, torch.zeros_like(param), sign, scalars, bits=bits, cautious_wd=cautious_wd)[0]


def codecs(dtype, has_main, slices, shard_numel, backend, seed=7, cautious_wd=False) -> tuple[ShardCodec, ShardCodec]:
    """The owner's and a replica's; the replica's own shard is the second."""
    rows = [slices, [CodedSlice(0, 0, 1, 0)]]
    return tuple(ShardCodec(dtype, has_main, shard_numel, rows, i, CPU, seed, backend, cautious_wd) for i in (0, 1))


def send(owner, replica, old, new, lr, decay, steps=None) -> tuple[Tensor, int]:
    """What the replica makes of ``old`` (bits; None when the codes do not fit) and the number of escapes."""
    owner.begin(lr, decay, steps, old)
    escapes = int(owner.encode(new))
    if escapes > owner.capacity:
        owner.abandon()
        return None, escapes
    message = owner.message(-(-escapes // 16) * 16)
    assert len(message) == owner.message_nbytes(-(-escapes // 16) * 16)
    mine = torch.full_like(old, 3.0)
    flat = torch.cat([old, mine])
    replica.replay(flat, torch.stack([message, torch.zeros_like(message)]))
    assert torch.equal(flat[len(old) :], mine)
    return flat[: len(old)].view(INTEGER[old.dtype]), escapes


def as_rates(lr: float, weight_decay: float) -> tuple[Tensor, Tensor]:
    scalars = StepScalars.from_group(lr, (0.9, 0.99), weight_decay)
    return torch.tensor([scalars.lr]), torch.tensor([scalars.decay])


# ---- the reference implementation


def test_the_order_of_16_bit_values_is_theirs_and_undoes_itself():
    order = codes.ordered(ALL_BF16)
    assert torch.equal(codes.from_ordered(order, BF16).view(torch.int16), ALL_BF16.view(torch.int16))
    numbers = ALL_BF16[~ALL_BF16.isnan()]
    by_order = numbers[codes.ordered(numbers).argsort()].float()
    assert (by_order[1:] >= by_order[:-1]).all()
    assert codes.ordered(torch.tensor([-0.0, 0.0], dtype=BF16)).tolist() == [-1, 0]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_least_main_rounds_to_its_parameter_and_what_lies_below_does_not(dtype):
    magnitude = torch.arange(0x0401 if dtype == FP16 else 1, 0x7C00 if dtype == FP16 else 0x7F80).to(torch.int16)
    magnitude = magnitude.view(dtype)
    least = codes.least_main(magnitude)
    below = (least.view(torch.int32) - 1).view(torch.float32)
    above = (least.view(torch.int32) + 1).view(torch.float32)  # fp16 rounds ties to even: not always the least itself
    assert torch.equal(codes.round_main(above, dtype), magnitude)
    assert (codes.round_main(below, dtype) < magnitude).all()


@pytest.mark.parametrize(
    "weight_decay, cautious_wd", [(0.0, False), (0.1, False), (1.0, False), (0.1, True), (1.0, True)]
)
@pytest.mark.parametrize("lr", LRS)
def test_every_step_of_every_bf16_parameter_is_coded_exactly_or_escapes(lr, weight_decay, cautious_wd):
    """And escapes are only what the reference says: it ends many times closer to zero than it began, or is a NaN."""
    for old, remainder, sign in zip(*(x.split(IN_CACHE) for x in all_splits()), strict=True):
        step_is_coded_exactly_or_escapes(old, remainder, sign, lr, weight_decay, cautious_wd)


def step_is_coded_exactly_or_escapes(old, remainder, sign, lr: float, weight_decay: float, cautious_wd: bool) -> None:
    new = move(old, remainder, sign, lr, weight_decay, cautious_wd=cautious_wd)
    rates = as_rates(lr, weight_decay)
    digits, escapes = codes.encode(old, new, *rates, SENARY, cautious_wd=cautious_wd)
    replayed = codes.replay(old, digits, *rates, SENARY, cautious_wd=cautious_wd)
    assert torch.equal(replayed.view(torch.int16)[~escapes], new.view(torch.int16)[~escapes])
    if lr * weight_decay < 2**-9:  # else the decay alone moves by more than half an ulp
        escaped = escapes & ~new.isnan() & (sign != 0)
        assert (new.abs()[escaped] * 2 <= old.abs()[escaped] * 1.01).all()
        stayed = escapes & ~new.isnan() & (sign == 0)
        ulps = codes.ordered(old.abs()[stayed]) - codes.ordered(new.abs()[stayed])
        assert (ulps == 1).all()  # the decay carried it over a boundary
    assert escapes[new.isnan()].all()


@pytest.mark.parametrize("cautious_wd", [False, True])
@pytest.mark.parametrize("lr", LRS)
def test_every_step_of_a_parameter_without_main_params_is_coded(lr, cautious_wd):
    old, sign = (x.flatten() for x in torch.meshgrid(torch.arange(2**16), torch.tensor(SIGNS), indexing="ij"))
    old, sign = old.to(torch.int16).view(BF16), sign.float()
    bits = random_bits(torch.arange(len(old)), 3, torch.tensor(5))
    new = move(old, None, sign, lr, 0.1, bits, cautious_wd)
    _, escapes = codes.encode(old, new, *as_rates(lr, 0.1), TERNARY, bits, cautious_wd)
    assert torch.equal(escapes, new.isnan())


@given(lr=st.floats(1e-7, 1.0), weight_decay=st.floats(0.0, 1.0), seed=st.integers(0, 2**32), cautious_wd=st.booleans())
def test_every_step_of_an_fp32_parameter_is_coded(lr, weight_decay, seed, cautious_wd):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32).view(FP32)
    sign = torch.randint(-1, 2, (4096,), generator=generator).float()
    new = move(old, None, sign, lr, weight_decay, cautious_wd=cautious_wd)
    _, escapes = codes.encode(old, new, *as_rates(lr, weight_decay), TERNARY, cautious_wd=cautious_wd)
    assert torch.equal(escapes, new.isnan())


@pytest.mark.parametrize("layout", [TERNARY, SENARY])
def test_what_a_skipped_step_leaves_alone_is_coded(layout):
    bits = random_bits(torch.arange(2**16), 3, torch.tensor(5))
    _, escapes = codes.encode(ALL_BF16, ALL_BF16, torch.tensor(0.0), torch.tensor(1.0), layout, bits)
    assert torch.equal(escapes, ALL_BF16.isnan())


def test_untouched_zeros_stay_zeros():
    """Rows of an embedding that no batch has used yet."""
    zeros = torch.tensor([0.0, -0.0], dtype=BF16)
    for lr, decay in zip(*as_rates(1e-3, 0.1), strict=True):
        digits, escapes = codes.encode(zeros, zeros, lr, decay, SENARY)
        assert digits.tolist() == [5, 5] and not escapes.any()


def test_escapes_are_rare_where_weights_are_large_beside_the_step():
    generator = torch.Generator().manual_seed(0)
    old, remainder = split_main(torch.randn(1 << 18, generator=generator) * 0.02)
    sign = torch.randn(1 << 18, generator=generator)
    shares = {}
    for lr in (1e-5, 1e-4, 1e-3):
        _, escapes = codes.encode(old, move(old, remainder, sign, lr, 0.1), *as_rates(lr, 0.1), SENARY)
        shares[lr] = escapes.float().mean().item()
    assert shares[1e-5] < 5e-4 and shares[1e-4] < 2e-3 and shares[1e-3] < 2e-2


# ---- the backends


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", [1e-7, 1e-3, 1.0])
def test_every_bf16_value_arrives_through_every_backend(backend, lr):
    old, remainder, sign = all_splits()
    old, remainder, sign = (x[3::11] if backend == "triton" else x for x in (old, remainder, sign))
    new = move(old, remainder, sign, lr, 0.1)
    _, escapes = codes.encode(old, new, *as_rates(lr, 0.1), SENARY)
    kept = ~escapes
    old, new = (torch.nn.functional.pad(x[kept], (0, -int(kept.sum()) % 64)) for x in (old, new))
    slices = [CodedSlice(0, 0, int(kept.sum()), 0)]
    received, escaped = send(*codecs(BF16, True, slices, len(old), backend), old, new, *as_rates(lr, 0.1))
    assert escaped == 0
    assert torch.equal(received, new.view(torch.int16))


@dataclass(frozen=True)
class Layout:
    slices: list[CodedSlice]
    shard_numel: int


@st.composite
def layouts(draw) -> Layout:
    """Slices of any size, some with padding behind them, in a shard of any multiple of 64."""
    numels = draw(st.lists(st.integers(1, 300), min_size=1, max_size=5))
    slices, start = [], 0
    for row, numel in enumerate(numels):
        index = draw(st.sampled_from([0, 12345, 2**32 - 100, 2**45 + 7]))
        slices.append(CodedSlice(row, start, start + numel, index))
        start += -(-numel // 64) * 64
    return Layout(slices, start + 64 * draw(st.integers(0, 2)))


@settings(max_examples=60)
@given(
    layout=layouts(),
    storage=st.sampled_from([(BF16, True), (FP16, True), (FP32, False), (BF16, False)]),
    backend=st.sampled_from(BACKENDS),
    lrs=st.lists(st.sampled_from([0.0, *LRS]), min_size=5, max_size=5),
    weight_decay=st.sampled_from([0.0, 0.1, 3.0]),
    trouble=st.booleans(),
    seed=st.integers(0, 2**31),
    cautious_wd=st.booleans(),
)
def test_any_new_values_arrive_bit_for_bit(layout, storage, backend, lrs, weight_decay, trouble, seed, cautious_wd):
    """Those that the codes foresee and those that they do not, in slices with rates of their own."""
    (dtype, has_main), numel = storage, layout.shard_numel
    generator = torch.Generator().manual_seed(seed)
    rows = len(layout.slices)
    lr = torch.tensor(lrs[:rows])
    decay = (1.0 - lr.double() * weight_decay).float()
    steps = torch.arange(rows) + seed
    old, new = torch.zeros(numel, dtype=dtype), torch.zeros(numel, dtype=dtype)
    for s in layout.slices:
        part, count = slice(s.start, s.stop), s.stop - s.start
        main = troubled(count, FP32, generator) if trouble else torch.randn(count, generator=generator) * 0.02
        sign = torch.randint(-1, 2, (count,), generator=generator).float()
        bits = random_bits(torch.arange(count) + s.index_start, 7, steps[s.row])
        scalars = StepScalars(lr[s.row], decay[s.row], 0.9, 0.99)
        old[part] = codes.round_main(main, dtype) if dtype != FP32 else main
        main = main if has_main else None
        step = lion_step(old[part], main, torch.zeros(count), sign, scalars, bits=bits, cautious_wd=cautious_wd)
        new[part] = step[0]
    surprises = torch.randint(numel, (3,), generator=generator)
    surprises = surprises[[any(s.start <= i < s.stop for s in layout.slices) for i in surprises]]
    new[surprises] = 0.123
    how = {"cautious_wd": cautious_wd}
    message = old, new, lr, decay, steps
    received, escapes = send(*codecs(dtype, has_main, layout.slices, numel, backend, **how), *message)
    _, expected_escapes = send(*codecs(dtype, has_main, layout.slices, numel, "cpu", **how), *message)
    assert escapes == expected_escapes
    if received is not None:
        assert torch.equal(received, new.view(INTEGER[dtype]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_escapes_than_fit_are_counted(backend):
    """The count is what ranks agree on a plain gather by."""
    old, new = torch.full((640,), 1.0, dtype=BF16), torch.full((640,), 5.0, dtype=BF16)
    owner, replica = codecs(BF16, True, [CodedSlice(0, 0, 640, 0)], 640, backend)
    received, escapes = send(owner, replica, old, new, *as_rates(1e-3, 0.1))
    assert escapes == 640 > owner.capacity and received is None


@pytest.mark.parametrize("storage", [(BF16, True), (FP16, True), (FP32, False), (BF16, False)])
def test_the_cpu_backends_send_the_same_bytes(storage):
    dtype, has_main = storage
    generator = torch.Generator().manual_seed(1)
    old = (torch.randn(1 << 17, generator=generator) * 0.02).to(dtype)
    new = (old.float() * 0.9999 + 1e-3 * torch.randn(1 << 17, generator=generator).sign()).to(dtype)
    messages = []
    for backend in ("cpu", "cpu_native"):
        slices = [CodedSlice(0, 0, 70_000, 5), CodedSlice(1, 70_016, 1 << 17, 0)]
        owner, _ = codecs(dtype, has_main, slices, 1 << 17, backend)
        owner.begin(torch.tensor([1e-3, 1e-3]), torch.tensor([0.9999, 0.9999]), torch.tensor([3, 4]), old)
        owner.encode(new)
        messages.append(owner.message(owner.capacity))
    assert torch.equal(*messages)


def test_a_shard_beyond_32_bit_places_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="Use param_sync='gather'"):
        ShardCodec(BF16, True, LARGEST_SHARD + 64 - LARGEST_SHARD % 64, [[]], 0, CPU, 0, "cpu")


def test_slices_that_do_not_begin_a_group_are_refused():
    with pytest.raises(ValueError, match="multiples of 64"):
        ShardCodec(BF16, True, 128, [[CodedSlice(0, 3, 70, 0)]], 0, CPU, 0, "cpu")
