"""The sum of squares of many tensors: on a CPU in Triton's interpreter, else on the GPU."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lion_dist.triton_backend.squares import BLOCK, SumOfSquares

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMELS = [0, 1, 64, 1000, BLOCK, BLOCK + 64, 3 * BLOCK + 5]


def expected(tensors):
    return sum((tensor.double().square().sum() for tensor in tensors), torch.zeros((), dtype=torch.float64))


@settings(max_examples=60)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(NUMELS), st.sampled_from(DTYPES)), min_size=1, max_size=6),
    misaligned=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_equals_the_sum_in_fp64(kinds, misaligned, seed):
    generator = torch.Generator().manual_seed(seed)
    skipped = int(misaligned)  # elements, so that no access of 16 bytes is aligned
    tensors = [torch.randn(numel + skipped, generator=generator).to(DEVICE, dtype)[skipped:] for numel, dtype in kinds]
    found = SumOfSquares()(tensors)
    assert found.dtype == torch.float64 and found.shape == ()
    torch.testing.assert_close(found.cpu(), expected(t.cpu() for t in tensors), rtol=1e-13, atol=0)


def test_squares_beyond_fp32_neither_overflow_nor_vanish():
    extremes = {torch.bfloat16: (3e38, 1e-38), torch.float32: (3e38, 1e-45), torch.float16: (6e4, 6e-8)}
    for dtype, value in ((dtype, value) for dtype, values in extremes.items() for value in values):
        tensor = torch.full((100,), value, dtype=dtype, device=DEVICE)
        found = SumOfSquares()([tensor]).cpu()
        torch.testing.assert_close(found, expected([tensor.cpu()]), rtol=1e-13, atol=0)


def test_is_finite_exactly_when_every_element_is():
    tensor = torch.ones(BLOCK + 10, device=DEVICE)
    for position in (0, BLOCK - 1, BLOCK + 9):
        for bad in (torch.inf, -torch.inf, torch.nan):
            wrong = tensor.clone()
            wrong[position] = bad
            assert not SumOfSquares()([tensor, wrong]).isfinite()


def test_remembered_addresses_are_not_trusted_when_tensors_change():
    squares = SumOfSquares()
    first, second = torch.ones(100, device=DEVICE), torch.full((200,), 2.0, device=DEVICE)
    assert squares([first]) == 100 and squares([first]) == 100
    assert squares([second]) == 800 and squares([first, second]) == 900
    first.fill_(3.0)
    assert squares([first, second]) == 1700


class Searches(TorchDispatchMode):
    """How often sizes were laid out in blocks: what a list of tensors costs when it is new."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.searchsorted.Tensor
        return func(*args, **(kwargs or {}))


def test_lists_that_take_turns_are_each_laid_out_once():
    """As those of several groups of ranks do in each step. A CUDA graph cannot be captured over a new upload."""
    squares = SumOfSquares()
    lists = [[torch.full((numel,), 2.0, device=DEVICE)] for numel in (100, 200, 300)]
    with Searches() as searches:
        for _ in range(3):
            assert [squares(tensors).item() for tensors in lists] == [400, 800, 1200]
    assert searches.count == 3


def test_lists_without_end_are_not_all_remembered():
    squares = SumOfSquares()
    for numel in range(1, 3 * SumOfSquares.LISTS):
        assert squares([torch.ones(numel, device=DEVICE)]) == numel
        assert len(squares._tables) <= SumOfSquares.LISTS


def test_the_same_from_run_to_run():
    tensor = torch.randn(5 * BLOCK + 3, device=DEVICE)
    assert len({SumOfSquares()([tensor]).item() for _ in range(5)}) == 1
