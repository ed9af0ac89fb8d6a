"""The update and its codes in one launch: the bits and the message of the update followed by the encoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from lion_dist.coded_sync.shard_codec import CodedSlice, ShardCodec
from lion_dist.kernels.reference import random_bits, split_main
from lion_dist.kernels.update import LionTensors, lion_update_
from tests.kernels.cases import BF16, FP32, GRAD_DTYPES, STORAGES, Case, differing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # there in Triton's interpreter
PADDED = 64  # slices begin on multiples of it


class Shard:
    """The tensors of a case as slices of one shard, as ``ShardedLion`` keeps them; zeros between them."""

    def __init__(self, case: Case, padding: int):
        numels = [len(param) for param in case.params]
        self.starts, end = [], 0
        for numel in numels:
            self.starts.append(end)
            end += -(-numel // PADDED) * PADDED
        self.case, self.numel = case, max(PADDED, end + PADDED * padding)
        self.param, self.exp_avg, self.grad = map(self.flat, (case.params, case.exp_avgs, case.grads))
        self.main = None if case.mains is None else self.flat(case.mains)
        self.steps = case.steps.clone().to(DEVICE) if case.storage.is_stochastic else None
        lrs = torch.full((len(numels),), case.scalars.lr)
        decays = torch.full((len(numels),), case.scalars.decay)
        self.moves = torch.tensor([case.takes_part(i) for i in range(len(numels))])
        self.rates = torch.where(self.moves, lrs, 0.0).to(DEVICE), torch.where(self.moves, decays, 1.0).to(DEVICE)

    def flat(self, tensors: list[Tensor]) -> Tensor:
        result = torch.zeros(self.numel, dtype=tensors[0].dtype)
        for start, tensor in zip(self.starts, tensors, strict=True):
            result[start : start + len(tensor)] = tensor
        return result.to(DEVICE)

    def codec(self, backend: str) -> ShardCodec:
        rows = enumerate(zip(self.starts, self.case.params, self.case.index_starts, strict=True))
        slices = [CodedSlice(i, start, start + len(param), index) for i, (start, param, index) in rows]
        has_main = self.main is not None
        how = (self.case.seed, backend, self.case.cautious_wd)
        return ShardCodec(self.param.dtype, has_main, self.numel, [slices], 0, DEVICE, *how)

    def slices_of(self, flat: Tensor) -> list[Tensor]:
        return [flat[start : start + len(p)] for start, p in zip(self.starts, self.case.params, strict=True)]

    def update_then_encode(self) -> tuple[int, Tensor, Tensor | None]:
        """By the PyTorch backends."""
        codec, case = self.codec("cpu"), self.case
        codec.begin(*self.rates, self.steps, self.param)
        tensors = LionTensors(
            self.slices_of(self.param),
            self.slices_of(self.exp_avg),
            None if self.main is None else self.slices_of(self.main),
            case.index_starts,
            self.steps,
            case.storage.stochastic_momentum,
        )
        arguments = case.to(DEVICE).arguments() | {"grads": self.slices_of(self.grad)}
        lion_update_(tensors, backend="chunked_reference", **arguments)
        return self.sent(codec)

    def update_and_encode(self) -> tuple[int, Tensor, Tensor | None]:
        codec, case = self.codec("triton"), self.case
        codec.begin(*self.rates, self.steps, None)
        codec.update_and_encode(
            self.param,
            self.main,
            self.exp_avg,
            self.grad,
            case.scalars,
            grad_scale=case.grad_scale.to(DEVICE),
            moves=self.moves.to(DEVICE),
            steps=self.steps,
            stochastic_momentum=case.storage.stochastic_momentum,
        )
        return self.sent(codec)

    def sent(self, codec: ShardCodec) -> tuple[int, Tensor, Tensor | None]:
        """(escapes, digits, message or None where they do not fit). Escapes come in no certain order: by place here."""
        count = int(codec.encode(self.param))
        digits = codec.packed_of(codec.fixed).clone()
        if count > codec.capacity:
            return count, digits, None
        order = codec.escape_index.argsort(stable=True)
        codec.escape_index, codec.escape_bits = codec.escape_index[order], codec.escape_bits[order]
        return count, digits, codec.message(codec.capacity)


def in_training(case: Case) -> Case:
    """``case`` with numbers of a training run, few escapes among them, and trouble left in the gradients."""
    generator = torch.Generator().manual_seed(7)
    params = [(torch.randn(len(p), generator=generator) * 0.02) for p in case.params]
    exp_avgs = [(torch.randn(len(p), generator=generator) * 1e-3).to(case.storage.exp_avg) for p in params]
    mains = case.mains
    if case.storage.main == FP32:
        mains = params
    elif mains is not None:
        params, mains = map(list, zip(*map(split_main, params), strict=True))
    return replace(case, params=[p.to(case.storage.param) for p in params], mains=mains, exp_avgs=exp_avgs)


def check(case: Case, padding: int) -> None:
    expected, actual = Shard(case, padding), Shard(case, padding)
    expected_escapes, expected_digits, expected_message = expected.update_then_encode()
    escapes, digits, message = actual.update_and_encode()
    for name in ("param", "main", "exp_avg"):
        mine, theirs = getattr(actual, name), getattr(expected, name)
        assert mine is None or not len(differing(mine, theirs)), name
    assert escapes == expected_escapes
    assert torch.equal(digits, expected_digits)
    assert message is None or torch.equal(message, expected_message)


@settings(max_examples=25)
@given(
    storage=st.sampled_from(STORAGES),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    numels=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    active=st.lists(st.sampled_from([1.0, 1.0, 0.0]), min_size=5, max_size=5),
    skip=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
    padding=st.integers(0, 3),
    index_start=st.sampled_from([0, 12345, 2**32 - 100]),
    seed=st.integers(0, 2**31),
    cautious_wd=st.booleans(),
)
def test_one_launch_updates_and_encodes(
    storage, grad_dtype, numels, active, skip, padding, index_start, seed, cautious_wd
):
    case = Case.make(
        storage, grad_dtype, numels, data_seed=seed, index_start=index_start, step=seed, seed=seed,
        grad_scale=torch.tensor(0.25), skip=torch.tensor(skip), active=torch.tensor(active[: len(numels)]),
        cautious_wd=cautious_wd,
    )  # fmt: skip
    check(in_training(case), padding)


def test_a_shard_of_several_programs_is_encoded_like_one():
    case = Case.make(STORAGES[9], BF16, [70_001, 5, 300_000], grad_scale=torch.tensor(1.0))
    check(in_training(case), padding=1)


def test_a_shard_without_a_slice_sends_an_empty_message():
    codec = ShardCodec(BF16, True, 256, [[], [CodedSlice(0, 0, 9, 0)]], 0, DEVICE, 0, "triton")
    none = torch.empty(0, device=DEVICE)
    param, exp_avg, grad = torch.zeros(3, 256, dtype=BF16, device=DEVICE)
    main = torch.zeros(256, dtype=torch.int16, device=DEVICE)
    codec.begin(none, none, None, None)
    codec.update_and_encode(
        param, main, exp_avg, grad, Case.scalars,
        grad_scale=torch.ones((), device=DEVICE), moves=none.bool(), steps=None, stochastic_momentum=False,
    )  # fmt: skip
    assert int(codec.encode(param)) == 0
    assert not codec.packed_of(codec.fixed).any() and not param.any()


def test_random_bits_are_those_of_the_reference():
    """The case that a wrong key would pass by chance half of the time is too small to be trusted: 4,096 elements."""
    storage = next(s for s in STORAGES if s.param == BF16 and s.main is None and s.stochastic_momentum)
    case = in_training(Case.make(storage, BF16, [4096], step=2**33, seed=2**40 + 3, grad_scale=torch.tensor(1.0)))
    shard = Shard(case, 0)
    shard.update_and_encode()
    (expected,) = case.expected().params
    assert torch.equal(shard.param.cpu(), expected)
    assert len(random_bits(torch.arange(4096), case.seed, case.steps[0]).unique()) > 4000
