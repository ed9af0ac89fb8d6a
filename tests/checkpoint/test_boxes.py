"""Flat ranges of full tensors as boxes: every element exactly once, in order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lion_dist.sharding.boxes import Box, BoxedTensor, boxes_of_range, boxes_over


@st.composite
def ranges(draw):
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    numel = math.prod(shape)
    start = draw(st.integers(0, numel))
    return shape, start, draw(st.integers(start, numel))


@given(ranges())
def test_boxes_hold_each_element_of_the_range_once_and_in_order(case):
    shape, start, stop = case
    full = torch.arange(math.prod(shape)).view(shape)
    elements = []
    for box in boxes_of_range(shape, start, stop):
        part = full[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
        elements += part.flatten().tolist()
    assert elements == list(range(start, stop))


@given(ranges())
def test_a_range_is_cut_into_few_boxes(case):
    shape, start, stop = case
    assert len(boxes_of_range(shape, start, stop)) <= max(1, 2 * len(shape) - 1)


def test_the_example_of_the_docstring():
    assert boxes_of_range((4, 5), 3, 17) == [Box((0, 3), (1, 2)), Box((1, 0), (2, 5)), Box((3, 0), (1, 2))]


def test_a_scalar_is_one_box_without_dimensions():
    assert boxes_of_range((), 0, 1) == [Box((), ())]


@pytest.mark.parametrize("start, stop", [(-1, 2), (3, 2), (0, 21)])
def test_what_is_not_a_range_of_the_tensor_is_refused(start, stop):
    with pytest.raises(ValueError, match="is not a range of the 20 elements"):
        boxes_of_range((4, 5), start, stop)


def test_boxes_are_views_of_the_local_memory():
    local = torch.zeros(14)
    boxed = BoxedTensor((4, 5), boxes_over((4, 5), 3, local), dtype=local.dtype, device=local.device)
    for value, view in enumerate(boxed.boxes.values(), start=1):
        view.fill_(value)
    assert local.tolist() == [1.0] * 2 + [2.0] * 10 + [3.0] * 2


def test_a_boxed_tensor_survives_torch_save(tmp_path):
    local = torch.arange(14.0)
    boxed = BoxedTensor((4, 5), boxes_over((4, 5), 3, local), dtype=local.dtype, device=local.device)
    torch.save(boxed, tmp_path / "boxed.pt")
    again = torch.load(tmp_path / "boxed.pt", weights_only=False)
    assert list(again.boxes) == list(boxed.boxes)
    assert all(torch.equal(again.boxes[box], local) for box, local in boxed.boxes.items())
