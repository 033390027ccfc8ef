"""Flat slices as rectangles of their parameter, which otherwise behave as plain tensors."""

import copy
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from sharded_lamb.sharding.dcp_tensors import Region, SlicedState, Stamp, boxes
from tests import training


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_boxes_cover_every_element_of_the_slice_once(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    length = data.draw(st.integers(0, numel - start))
    order = data.draw(st.permutations(range(len(shape))))
    strides = [0] * len(shape)
    expected = 1
    for axis in reversed(order):  # the last of ``order`` is the fastest
        strides[axis] = expected
        expected *= shape[axis]
    whole = torch.arange(numel).as_strided(shape, strides)
    flat = torch.arange(start, start + length)
    region = Region(tuple(shape), tuple(strides), start)
    covered = []
    for box in region.boxes(length):
        view = whole
        for axis, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            view = view.narrow(axis, offset, size)
        assert torch.equal(region.view(flat, box), view)
        covered += view.flatten().tolist()
    assert sorted(covered) == list(range(start, start + length))
    assert len(region.boxes(length)) <= max(1, 2 * len(shape) - 1)


def test_boxes_match_the_picture_in_the_docstring() -> None:
    actual = [(box.offsets, box.sizes, box.at) for box in boxes((5, 4), 5, 13)]
    assert actual == [((1, 1), (1, 3), 0), ((2, 0), (2, 4), 3), ((4, 0), (1, 2), 11)]


def test_sliced_state_behaves_as_a_plain_tensor() -> None:
    memory = torch.arange(10.0)
    sliced = SlicedState.of(memory[2:7], Region((5, 4), (4, 1), 5))
    assert sliced.shape == (5,)
    assert sliced.numel() == 5
    assert sliced.size() == (5, 4)
    assert [sliced.size(0), sliced.size(1)] == [5, 4]
    assert type(sliced + 1) is type(sliced.clone()) is type(sliced.detach()) is torch.Tensor
    sliced.zero_()
    assert not memory[2:7].any()
    for duplicate in (copy.deepcopy(sliced), training.through_bytes(sliced)):
        assert type(duplicate) is torch.Tensor
        assert torch.equal(duplicate, memory[2:7])
        duplicate += 1
    assert not memory[2:7].any()
    converted = sliced.to(torch.float64)
    assert isinstance(converted, SlicedState)
    assert converted.region == sliced.region


def test_a_stamp_holds_its_numbers() -> None:
    stamp = Stamp.of([3, 1, 4])
    assert stamp.tolist() == [3, 1, 4]
    assert stamp.shape == (3,)
    assert stamp.size() == (1,)
    assert training.through_bytes(stamp).tolist() == [3, 1, 4]
