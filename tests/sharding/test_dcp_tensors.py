"""Flat slices as rectangles of their parameter, and as tensors that are plain otherwise."""

import copy
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from sharded_lamb.sharding.dcp_tensors import Region, SlicedState, Stamp, boxes
from tests import training


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_boxes_are_the_elements_of_the_slice_once(shape: list[int], data: st.DataObject) -> None:
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
    seen = []
    for box in region.boxes(length):
        place = whole
        for axis, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            place = place.narrow(axis, offset, size)
        assert torch.equal(region.view(flat, box), place)
        seen += place.flatten().tolist()
    assert sorted(seen) == list(range(start, start + length))
    assert len(region.boxes(length)) <= max(1, 2 * len(shape) - 1)


def test_the_picture_in_the_docstring() -> None:
    found = [(box.offsets, box.sizes, box.at) for box in boxes((5, 4), 5, 13)]
    assert found == [((1, 1), (1, 3), 0), ((2, 0), (2, 4), 3), ((4, 0), (1, 2), 11)]


def test_it_is_a_plain_tensor_to_everybody_else() -> None:
    memory = torch.arange(10.0)
    piece = SlicedState.of(memory[2:7], Region((5, 4), (4, 1), 5))
    assert piece.shape == (5,)
    assert piece.numel() == 5
    assert piece.size() == (5, 4)
    assert [piece.size(0), piece.size(1)] == [5, 4]
    assert type(piece + 1) is type(piece.clone()) is type(piece.detach()) is torch.Tensor
    piece.zero_()
    assert not memory[2:7].any()
    for other in (copy.deepcopy(piece), training.through_bytes(piece)):
        assert type(other) is torch.Tensor
        assert torch.equal(other, memory[2:7])
        other += 1
    assert not memory[2:7].any()
    moved = piece.to(torch.float64)
    assert isinstance(moved, SlicedState)
    assert moved.region == piece.region


def test_a_stamp_is_its_numbers() -> None:
    stamp = Stamp.of([3, 1, 4])
    assert stamp.tolist() == [3, 1, 4]
    assert stamp.shape == (3,)
    assert stamp.size() == (1,)
    assert training.through_bytes(stamp).tolist() == [3, 1, 4]
