"""Values of tests' parameters in pairs instead of products.

@pairs(world=[1, 2, 3], stage=[1, 2], dtype=[torch.float32, torch.bfloat16])   # 6 cases instead of 12
def test(world: int, stage: int, dtype: torch.dtype) -> None: ...
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch


def pairs(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes with few cases, in which any two values of any two parameters meet; the same cases every time."""
    chosen = covering([len(each) for each in values.values()])
    cases = [tuple(each[place] for each, place in zip(values.values(), case, strict=True)) for case in chosen]
    return pytest.mark.parametrize(tuple(values), cases, ids=_id)


def covering(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Cases of ``sizes[i]`` values of parameter i, in the order of the product, that hold all pairs."""
    product = list(itertools.product(*map(range, sizes)))
    places = list(itertools.combinations(range(len(sizes)), 2))
    held = {case: {(one, two, case[one], case[two]) for one, two in places} for case in product}
    missing, chosen = set().union(*held.values()), []
    while missing:
        chosen.append(max(product, key=lambda case: len(held[case] & missing)))
        missing -= held[chosen[-1]]
    return sorted(chosen)


def _id(value: Any) -> str | None:
    return str(value) if isinstance(value, torch.dtype) else None
