from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_lamb.recipes.training.batch import BatchPlan


def plan(
    batch: int, world: int, micro: int = 32, start: int | None = None, ramp: int = 0, steps: int = 50
) -> BatchPlan:
    return BatchPlan(steps, batch, world, micro, start or batch, ramp)


@given(
    share=st.integers(1, 200), world=st.integers(1, 9), micro=st.integers(1, 40), first=st.integers(0, 10**12)
)
def test_ranks_and_micro_batches_cover_the_global_batch_once(
    share: int, world: int, micro: int, first: int
) -> None:
    batches = plan(share * world, world, micro)
    cuts = [cut for rank in range(world) for cut in batches.step_plan(0, first, rank).micro_batches]
    assert cuts[0][0] == first
    assert cuts[-1][1] == first + share * world
    assert all(a[1] == b[0] for a, b in pairwise(cuts))
    sizes = {stop - start for start, stop in cuts}
    assert max(sizes) <= micro
    assert max(sizes) - min(sizes) <= 1
    assert batches.accumulation(0) == -(-share // micro)


def test_an_impossible_split_says_what_fits() -> None:
    with pytest.raises(
        ValueError, match=r"global_batch=64 .* 3 ranks: use \[1, 2, 4\] ranks, or .* of 63 or 66"
    ):
        plan(64, 3)
    with pytest.raises(ValueError, match=r"ramp\.start=8 can't be split evenly over 3 ranks"):
        plan(96, 3, start=8, ramp=4)


def test_a_ramp_grows_to_the_batch_and_counts_its_samples() -> None:
    batches = plan(48, 2, start=12, ramp=10)
    sizes = [batches.batch_at(step) for step in range(14)]
    assert sizes[0] == 12
    assert sizes[10:] == [48] * 4
    assert sizes == sorted(sizes)
    assert all(size % 12 == 0 for size in sizes)
    assert [batches.samples_before(step) for step in range(15)] == [sum(sizes[:step]) for step in range(15)]


@given(step=st.integers(0, 49), world=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_the_ramp_does_not_depend_on_the_world_size(step: int, world: int) -> None:
    assert plan(48, world, start=12, ramp=10).batch_at(step) == plan(48, 1, start=12, ramp=10).batch_at(step)


def test_a_ramp_grows_in_its_multiples() -> None:
    plan = BatchPlan(10, 30, 3, 4, 6, 8, ramp_multiple=3)
    assert [plan.batch_at(step) for step in range(10)] == [6, 9, 12, 15, 18, 21, 24, 27, 30, 30]
    assert plan.samples_before(4) == 42
    with pytest.raises(ValueError, match=r"ramp\.multiple_of=3 can't be split evenly over 2 ranks"):
        BatchPlan(10, 30, 2, 4, 6, 8, ramp_multiple=3)
