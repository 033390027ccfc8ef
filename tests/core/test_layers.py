"""Layers: which elements belong to which, as rank after rank cuts them, and the errors of `ratio_blocks`."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sharded_lamb.core.layers import Layers, check_order, count_blocks, repeated, validate_ratio_blocks
from sharded_lamb.core.layout import BLOCK, plan_buckets

parameters = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 400)), min_size=1, max_size=6)
"""(ratio blocks, elements of each) of every parameter."""


@given(parameters, st.integers(1, 5))
def test_pieces_have_the_elements_of_their_layer_in_blocks_that_do_not_depend_on_ranks(
    params: list[tuple[int, int]], world: int
) -> None:
    layers = Layers([count for count, _ in params], [count * numel for count, numel in params])
    owner = [(param, block) for param, (count, _) in enumerate(params) for block in range(count)]
    assert len(layers) == len(owner)
    assert Counter(blocks_of(layers, params, world, owner)) == Counter(blocks_of(layers, params, 1, owner))


def blocks_of(
    layers: Layers, params: list[tuple[int, int]], world: int, owner: list[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """(layer, start in the parameter, length) of the kernels' blocks of all ranks, each piece checked."""
    numels = [count * numel for count, numel in params]
    (bucket,) = plan_buckets(numels, [0] * len(params), [4] * len(params), 1 << 30, world)
    blocks, seen = [], Counter[tuple[int, int]]()
    for rank in range(world):
        segments = bucket.segments(rank)
        pieces, sources = layers.cut(segments)
        for piece, segment in zip(pieces, repeated([*segments], sources), strict=True):
            assert piece.start - segment.start == piece.shard_start - segment.shard_start >= 0
            assert piece.start + piece.length <= segment.start + segment.length
            param, block = owner[piece.param]
            assert param == segment.param
            for element in range(piece.start, piece.start + piece.length):
                assert element // params[param][1] == block
                seen[param, element] += 1
            blocks += [
                (piece.param, start, min(BLOCK, piece.start + piece.length - start))
                for start in range(piece.start, piece.start + piece.length, BLOCK)
            ]
    assert seen == Counter((param, element) for param, numel in enumerate(numels) for element in range(numel))
    return blocks


def test_values_of_parameters_and_layers() -> None:
    layers = Layers([1, 3, 1], [5, 6, 0])
    assert layers.names(["a", "qkv", "b"]) == ["a", "qkv[0]", "qkv[1]", "qkv[2]", "b"]
    assert layers.expand(torch.tensor([1, 2, 3])).tolist() == [1, 2, 2, 2, 3]
    assert layers.expand(torch.tensor(7)).tolist() == 7
    assert [float(layers.total(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), param)) for param in range(3)] == [
        1,
        9,
        5,
    ]
    flags = torch.tensor([False, False, True, True, False])
    assert layers.any_of(flags).tolist() == [False, True, False]


def test_without_blocks_nothing_is_computed() -> None:
    """A step of an optimizer without ratio blocks gets the tensors and segments that it gave."""
    layers = Layers([1, 1], [5, 6])
    values, segments = (
        torch.tensor([1.0, 2.0]),
        plan_buckets([5, 6], [0, 0], [4, 4], 1 << 30, 1)[0].segments(0),
    )
    assert layers.expand(values) is values
    assert layers.any_of(values) is values
    pieces, sources = layers.cut(segments)
    assert pieces is segments
    assert repeated([1, 2], sources) == [1, 2]


BAD: list[tuple[Any, tuple[int, ...], type[Exception], str]] = [
    (
        {"qkv": 5},
        (12, 4),
        ValueError,
        r"'h\.qkv' of shape \(12, 4\): 5 does not divide its first dimension, 12",
    ),
    ({"qkv": 3}, (), ValueError, r"'h\.qkv' of shape \(\): it has no first dimension"),
    ({"qkv": 3, "h": 2}, (12, 4), ValueError, r"\{'h': 2, 'qkv': 3\} .*: patterns disagree"),
    ({"qkv": 3, "h": "dim0"}, (12, 4), ValueError, r"patterns disagree"),
    ({"qkv": 0}, (12, 4), ValueError, r"ratio_blocks\['qkv'\] must be an int >= 1, or \"dim0\".*got 0"),
    ({"qkv": "rows"}, (12, 4), ValueError, r"must be an int >= 1, or \"dim0\""),
    ({"qkv": 1.5}, (12, 4), ValueError, r"must be an int >= 1, or \"dim0\""),
    ({"(": 3}, (12, 4), ValueError, r"'\(' is not a regular expression"),
    ({3: 3}, (12, 4), TypeError, r"ratio_blocks must hold strings, got 3"),
    ([("qkv", 3)], (12, 4), TypeError, r"ratio_blocks must map patterns to numbers"),
]


@pytest.mark.parametrize(("given", "shape", "kind", "message"), BAD, ids=lambda value: str(value)[:30])
def test_errors_name_option_parameter_shape_and_remedy(
    given: Any, shape: tuple[int, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        count_blocks("h.qkv", shape, validate_ratio_blocks(given))


@pytest.mark.parametrize(
    ("given", "shape", "blocks"),
    [
        (None, (12, 4), 1),
        ({"bias": 3}, (12, 4), 1),
        ({"qkv": 3}, (12, 4), 3),
        ({"qkv": 3, r"^h\.": 3}, (12, 4), 3),  # they agree
        ({"qkv": "dim0", "h": 12}, (12, 4), 12),
        ({"qkv": "dim0"}, (0, 4), 1),
        ({"ndim<=1": "dim0"}, (3,), 3),
    ],
)
def test_numbers_of_blocks(given: Any, shape: tuple[int, ...], blocks: int) -> None:
    assert count_blocks("h.qkv", shape, validate_ratio_blocks(given)) == blocks


@pytest.mark.parametrize(
    ("shape", "strides", "fits"),
    [
        ((6, 4), (4, 1), True),
        ((6, 4), (1, 6), False),  # transposed
        ((6, 3, 2, 2), (12, 1, 6, 3), True),  # channels_last
        ((1, 4), (1, 1), True),  # one row: a rank's part
        ((0, 4), (1, 1), True),
    ],
)
def test_blocks_are_contiguous_in_memory(
    shape: tuple[int, ...], strides: tuple[int, ...], fits: bool
) -> None:
    if fits:
        check_order("w", shape, strides, 3)
    else:
        with pytest.raises(
            ValueError, match=r"'w' has 3 ratio blocks .*shape \(6, 4\), strides \(1, 6\).*contiguous"
        ):
            check_order("w", shape, strides, 3)
    check_order("w", shape, strides, 1)
