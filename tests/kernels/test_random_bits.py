"""The random bits of stochastic rounding: uniform, and independent of their neighbours in every direction.

Thresholds are five standard deviations; the bits are a pure function of their keys, so a test passes always or never.
"""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lion_dist.kernels.reference import as_int32, average_bits, mix32, random_bits, random_keys, random_keys_int

N = 1 << 18
OFFSETS = [0, 12345, 2**32 - N // 2, 2**45]


@functools.lru_cache(8)  # the next case asks for the same
def bits(start=0, seed=1, step=0, numel=N) -> torch.Tensor:
    return random_bits(torch.arange(start, start + numel), seed, torch.tensor(step))


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What rounds the parameter, and what rounds the momentum."""
    return x & 0xFFFF, (x >> 16) & 0xFFFF


def assert_uniform(values: torch.Tensor, bins: int) -> None:
    """Chi-square of ``values`` in [0, bins)."""
    counts = torch.bincount(values.long(), minlength=bins).double()
    expected = values.numel() / bins
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - (bins - 1)) < 5 * (2 * (bins - 1)) ** 0.5


def assert_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    """Of the values, and of every pair of bits."""
    assert abs(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1]) < 5 / a.numel() ** 0.5
    shifts = torch.arange(16, dtype=torch.int32)[:, None]
    signs_a, signs_b = (((x.int() >> shifts) & 1).float() * 2 - 1 for x in (a, b))  # [16, elements]
    assert ((signs_a @ signs_b.T) / a.numel()).abs().max() < 6 / a.numel() ** 0.5  # 256 pairs


@pytest.mark.parametrize("start", OFFSETS)
@pytest.mark.parametrize("step", [0, 1, 2**33])
def test_both_halves_are_uniform(start, step):
    for half in halves(bits(start, step=step)):
        for shift in range(0, 16, 4):
            assert_uniform((half >> shift) & 0xF, 16)
        assert_uniform(half >> 4, 2**12)


def test_pairs_of_neighbours_are_uniform():
    for half in halves(bits()):
        pairs = ((half[:-1] >> 10) << 6) | (half[1:] >> 10)
        assert_uniform(pairs, 2**12)


@pytest.mark.parametrize("distance", [1, 2, 3, 7, 8, 64, 100, 1000, 2049, 2**16])
def test_elements_are_uncorrelated_with_their_neighbours(distance):
    for half in halves(bits()):
        assert_uncorrelated(half[distance:], half[:-distance])


@pytest.mark.parametrize("distance", [2**k for k in range(8, 15)])
def test_elements_whose_indices_differ_in_one_middle_bit_are_uncorrelated(distance):
    """Two rounds of mixing left 3% here."""
    for seed in range(5):
        for half in halves(bits(seed=seed)):
            assert_uncorrelated(half[distance:], half[:-distance])


@pytest.mark.parametrize("later", [1, 2, 100, 2**16, 2**32])
def test_steps_are_uncorrelated(later):
    """Also at a distance in both: the keys of two steps must not shift one stream of numbers along the elements."""
    for now, then in zip(halves(bits(step=5)), halves(bits(step=5 + later)), strict=True):
        assert_uncorrelated(now, then)
        assert_uncorrelated(now[1:], then[:-1])


def test_seeds_and_the_upper_half_of_the_index_are_uncorrelated():
    for other in (bits(seed=2), bits(seed=1 + 2**32), bits(start=2**32), bits(start=2**40)):
        for a, b in zip(halves(bits()), halves(other), strict=True):
            assert_uncorrelated(a, b)


def test_the_halves_are_uncorrelated():
    assert_uncorrelated(*halves(bits()))


def test_the_average_shares_no_bits_with_parameter_and_momentum():
    for half in halves(bits()):
        assert_uncorrelated(half, average_bits(bits()))
    param, momentum = (half >> 12 for half in halves(bits()))
    assert_uniform((param << 8) | (momentum << 4) | (average_bits(bits()) >> 12), 2**12)


@pytest.mark.parametrize("distance", [1, 2, 7, 64, 2**16])
def test_the_averages_bits_are_uniform_and_uncorrelated_with_neighbours_and_steps(distance):
    of_average = average_bits(bits())
    assert_uniform(of_average >> 4, 2**12)
    assert_uncorrelated(of_average[distance:], of_average[:-distance])
    assert_uncorrelated(of_average, average_bits(bits(step=distance)))


def test_an_elements_bits_depend_on_its_index_alone():
    whole = bits(2**32 - 500, numel=1000)
    for a, b in ((0, 1), (3, 499), (499, 501), (17, 1000)):
        assert torch.equal(bits(2**32 - 500 + a, numel=b - a), whole[a:b])


def test_rounding_over_steps_follows_the_expected_spread():
    """Sums over steps of one element's numbers have a binomial's variance: no element is favoured for long."""
    steps, numel = 256, 4096
    ups = sum(((bits(step=step, numel=numel) & 0xFFFF) >= 0x8000).double() for step in range(steps))
    variance = ups.var().item() / (steps / 4)
    assert abs(variance - 1) < 5 * (2 / numel) ** 0.5


@given(seed=st.integers(-(2**63), 2**63 - 1), step=st.integers(0, 2**63 - 1))
def test_keys_made_on_the_host_are_the_references(seed, step):
    expected = [key.item() for key in random_keys(seed, torch.tensor(step))]
    assert [as_int32(key) for key in random_keys_int(seed, step)] == expected


def test_mix32_is_a_bijection():
    """Sampled: no collision among 2**20 inputs, where a random function would have 128."""
    x = torch.arange(1 << 20, dtype=torch.int32) * 4099
    assert mix32(x).unique().numel() == x.numel()
