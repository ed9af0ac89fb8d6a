"""Flat ranges of full tensors as boxes: every element exactly once, in order."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lion_dist.boxed_tensor import BoxedTensor, Part, can_read, read_box, this_ranks_part
from lion_dist.boxes import Box, boxes_of_range, boxes_over


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
    torch.save(this_ranks_part(boxed), tmp_path / "boxed.pt")
    again = torch.load(tmp_path / "boxed.pt", weights_only=False)
    assert list(again.boxes) == list(boxed.boxes)
    assert all(torch.equal(again.boxes[box], local) for box, local in boxed.boxes.items())


def part_of_a_tensor(start=3, stop=17, part=None) -> tuple[torch.Tensor, BoxedTensor]:
    full = torch.arange(20.0).view(4, 5)
    boxes = boxes_over((4, 5), start, full.flatten()[start:stop].clone())
    return full, BoxedTensor((4, 5), boxes, dtype=full.dtype, device=full.device, part=part)


@given(ranges(), st.data())
def test_a_box_is_read_out_of_other_boxes_exactly_where_they_hold_it(case, data):
    shape, start, stop = case
    full = torch.arange(float(math.prod(shape))).view(shape)
    boxes = boxes_over(shape, start, full.flatten()[start:stop])
    source = BoxedTensor(shape, boxes, dtype=full.dtype, device=full.device)
    low = data.draw(st.integers(0, full.numel()))
    high = data.draw(st.integers(low, full.numel()))
    for box, expected in boxes_over(shape, low, full.flatten()[low:high]).items():
        held = all(start <= int(x) < stop for x in expected.flatten())
        assert can_read(source, box) == held
        assert not held or torch.equal(read_box(source, box), expected)
        assert can_read(full, box) and torch.equal(read_box(full, box), expected)


@pytest.mark.parametrize("dump", [pickle.dumps, lambda boxed: torch.save({"a": [boxed]}, io.BytesIO())])
def test_pickling_a_part_is_refused_with_the_remedy(dump):
    _, boxed = part_of_a_tensor(part=Part(1, 4))
    with pytest.raises(TypeError, match=r"14 of the 20 .*rank 1's part of 4.*consolidate_state_dict.*this_ranks_part"):
        dump(boxed)


def test_pickling_all_of_a_tensor_is_not_refused():
    full, boxed = part_of_a_tensor(0, 20, Part(0, 2))
    again = pickle.loads(pickle.dumps(boxed))
    assert torch.equal(read_box(again, Box((0, 0), (4, 5))), full)


def test_a_part_that_was_asked_for_by_name_comes_back_and_knows_whose_it_is():
    _, boxed = part_of_a_tensor(part=Part(1, 4))
    state = this_ranks_part({"state": {0: {"exp_avg": boxed}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]})
    again = pickle.loads(pickle.dumps(state))
    assert again["groups"] == [{"lr": 0.1, "betas": (0.9, 0.99)}]
    assert str(again["state"][0]["exp_avg"].part) == "rank 1's part of 4"
    pickle.dumps(again)  # a file of it can be copied
    with pytest.raises(TypeError):
        pickle.dumps(boxed)  # which nobody has asked for


def test_deepcopy_copies_a_part_and_leaves_the_live_memory_alone():
    _, boxed = part_of_a_tensor(part=Part(1, 4))
    assert boxed.pieces  # cached: views of the live memory, which are not the copy's
    twin = copy.deepcopy(boxed)
    for view in twin.pieces.values():
        view.zero_()
    assert all(not local.any() for local in twin.boxes.values())
    assert all(local.all() for local in boxed.boxes.values()) and twin.part == boxed.part
