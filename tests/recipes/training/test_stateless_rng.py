import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_lamb.recipes.training.stateless_rng import Permutation, draw, key_of, uniform


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_visits_every_index_once(size: int, key: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, key)(np.arange(size))), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 2**40), key=st.integers(0, 2**63), data=st.data())
def test_a_permutation_of_any_size_stays_inside_and_never_collides(
    size: int, key: int, data: st.DataObject
) -> None:
    index = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=50))))
    out = Permutation(size, key)(index)
    assert ((out >= 0) & (out < size)).all()
    assert len(set(out.tolist())) == len(index)


def test_a_permutation_is_evaluated_at_any_index_alone() -> None:
    permutation = Permutation(1001, 5)
    whole = permutation(np.arange(1001))
    assert [int(permutation(np.array([i]))[0]) for i in (0, 17, 1000)] == whole[[0, 17, 1000]].tolist()


def test_keys_give_different_and_unordered_permutations() -> None:
    size = 5000
    orders = [Permutation(size, key_of(seed, "order", 0))(np.arange(size)) for seed in range(4)]
    for i, one in enumerate(orders):
        # Correlations of independent permutations have a deviation of 1/√5000 = 0.014.
        assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.07
        for other in orders[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.07
            assert (one == other).sum() < 12  # one is expected


def test_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="size=0"):
        Permutation(0, 1)


def test_keys_depend_on_every_part_and_on_where_parts_end() -> None:
    keys = {
        key_of(*parts) for parts in [(1,), (2,), (1, "a"), ("a", 1), (1, "a", "b"), (1, "ab"), (-1,), ("",)]
    }
    assert len(keys) == 8


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    count = 200_000
    values = uniform(key_of("test"), np.arange(count))
    assert abs(values.mean() - 0.5) < 5 * 12**-0.5 / count**0.5
    histogram = np.histogram(values, 20, (0, 1))[0]
    assert abs(histogram - count / 20).max() < 5 * (count / 20) ** 0.5
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / count**0.5
    assert abs(np.corrcoef(values, uniform(key_of("other"), np.arange(count)))[0, 1]) < 5 / count**0.5
    assert len(np.unique(draw(1, np.arange(count)))) == count
