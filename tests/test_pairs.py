"""Cases of `tests.pairs` hold every pair of values."""

import itertools

import pytest

from tests.pairs import covering


@pytest.mark.parametrize(
    ("sizes", "most"), [((3, 2), 6), ((3, 2, 2), 6), ((2, 3, 4, 3), 13), ((3, 3, 2, 2), 10), ((4, 1, 2), 8)]
)
def test_any_two_values_meet(sizes: tuple[int, ...], most: int) -> None:
    cases = covering(sizes)
    assert len(cases) == len(set(cases)) <= most
    for one, two in itertools.combinations(range(len(sizes)), 2):
        met = {(case[one], case[two]) for case in cases}
        assert met == set(itertools.product(range(sizes[one]), range(sizes[two])))
