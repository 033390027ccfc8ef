"""Layouts: every element on one rank, shards end at blocks, invalid layouts raise, work independent of the ranks."""

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings

from sharded_lamb import ShardedLamb
from sharded_lamb.core import layout as layout_module
from sharded_lamb.core.layout import BLOCK, Bucket, Segment, ShardLayout, plan_buckets, round_up

SIZES = st.one_of(
    st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 509, 1031]), st.integers(0, 3000)
)


def plan(
    numels: list[int], world: int, kinds: list[str] | None = None, mb: float = 0.01
) -> tuple[Bucket, ...]:
    kinds = kinds or ["x"] * len(numels)
    return plan_buckets(numels, kinds, [4] * len(numels), int(mb * 2**20), world)


def layouts(numels: list[int], world: int, **more: Any) -> list[ShardLayout]:
    buckets = plan(numels, world, **more)
    return [ShardLayout(tuple(numels), buckets, rank, world) for rank in range(world)]


NOBODY = -1


def owners_by_element(bucket: Bucket) -> np.ndarray:
    """Per element of the bucket: the parameter and the index in it; `NOBODY` in padding."""
    owners = np.full((bucket.numel, 2), NOBODY)
    for param, offset, numel in zip(bucket.params, bucket.offsets, bucket.numels, strict=True):
        owners[offset : offset + numel, 0] = param
        owners[offset : offset + numel, 1] = np.arange(numel)
    return owners


@given(
    numels=st.lists(SIZES, min_size=1, max_size=12),
    world=st.sampled_from([1, 1, 2, 3, 4, 9]),
    mb=st.sampled_from([0.0001, 0.005, 32]),
    data=st.data(),
)
@settings(max_examples=300)
@example(numels=[5] * 9, world=1, mb=32, data=None)  # many on one rank
@example(numels=[700, 1, 0, 509, 2000, 3], world=3, mb=32, data=None)  # several on each, cut ones among them
@example(numels=[0], world=4, mb=32, data=None)
@example(numels=[1], world=9, mb=32, data=None)
@example(numels=[0, 0, 5, 0, 0], world=2, mb=0.001, data=None)
def test_every_element_is_on_one_rank(
    numels: list[int], world: int, mb: float, data: st.DataObject | None
) -> None:
    kinds = ["x"] * len(numels)
    if data is not None:
        kinds = data.draw(st.lists(st.sampled_from("xy"), min_size=len(numels), max_size=len(numels)))
    buckets = plan(numels, world, kinds, mb)
    assert sorted(param for bucket in buckets for param in bucket.params) == list(range(len(numels)))
    seen: Counter[int] = Counter()
    for bucket in buckets:
        assert len({kinds[param] for param in bucket.params}) == 1
        per_rank = bucket.numel // world
        held = np.full((bucket.numel, 2), NOBODY)
        for rank in range(world):
            for s in bucket.segments(rank):
                assert s.length > 0
                assert s.shard_start + s.length <= bucket.shard_numel == per_rank
                first = rank * per_rank + s.shard_start
                assert (held[first : first + s.length] == NOBODY).all(), "held twice"
                held[first : first + s.length, 0] = s.param
                held[first : first + s.length, 1] = np.arange(s.start, s.start + s.length)
        assert (held == owners_by_element(bucket)).all()
        params, counts = np.unique(held[held[:, 0] != NOBODY, 0], return_counts=True)
        seen.update(dict(zip(params.tolist(), counts.tolist(), strict=True)))
    assert seen == Counter({param: numel for param, numel in enumerate(numels) if numel})


@given(numels=st.lists(SIZES, min_size=1, max_size=30), world=st.integers(1, 17), alone=st.integers(1, 3000))
def test_runs_tile_a_shard_and_large_segments_have_their_own(
    numels: list[int], world: int, alone: int
) -> None:
    for bucket in plan(numels, world):
        for rank in range(world):
            runs = bucket.runs(rank, alone)
            assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
            assert runs[-1].stop == bucket.shard_numel
            large = [segment for segment in bucket.segments(rank) if segment.length >= alone]
            assert [run.segment for run in runs if run.segment is not None] == large
            for run in runs:
                if run.segment is not None:
                    assert (run.start, run.stop - run.start) == (run.segment.shard_start, run.segment.length)
            between = [run.segment is None for run in runs]
            assert (True, True) not in itertools.pairwise(between)


@given(numels=st.lists(SIZES, min_size=1, max_size=30), world=st.integers(1, 17))
def test_gaps_are_the_padding(numels: list[int], world: int) -> None:
    for bucket in plan(numels, world):
        filled = [False] * bucket.numel
        for start, stop in [
            *bucket.gaps(),
            *((offset, offset + numel) for offset, numel in zip(bucket.offsets, bucket.numels, strict=True)),
        ]:
            assert not any(filled[start:stop])
            filled[start:stop] = [True] * (stop - start)
        assert all(filled)
        assert all(start < stop for start, stop in bucket.gaps())


@given(numels=st.lists(SIZES, min_size=1, max_size=30), world=st.integers(1, 17))
def test_shards_end_at_block_boundaries(numels: list[int], world: int) -> None:
    for bucket in plan(numels, world):
        assert bucket.numel == bucket.shard_numel * world
        for rank in range(world):
            low, high = bucket.shard_range(rank)
            assert low % BLOCK == high % BLOCK == 0
            starts = []
            for s in bucket.segments(rank):
                starts.append(s.shard_start)
                assert s.start % BLOCK == s.shard_start % BLOCK == 0
                end = s.start + s.length
                assert end % BLOCK == 0 or end == numels[s.param]
            assert starts == sorted(starts)


@given(numels=st.lists(SIZES, min_size=1, max_size=30), world=st.integers(1, 17))
def test_buckets_hold_the_same_on_any_number_of_ranks(numels: list[int], world: int) -> None:
    def contents(buckets: tuple[Bucket, ...]) -> list[Any]:
        return [(bucket.params, bucket.offsets, bucket.numels) for bucket in buckets]

    assert contents(plan(numels, world)) == contents(plan(numels, 1))
    for bucket in plan(numels, world):
        used = bucket.offsets[-1] + bucket.numels[-1]
        assert bucket.numel == max(round_up(used, BLOCK * world), BLOCK * world)


@given(numels=st.lists(SIZES, min_size=2, max_size=30), mb=st.sampled_from([0.001, 0.005, 0.02]))
def test_buckets_close_when_full_last_parameters_first(numels: list[int], mb: float) -> None:
    buckets = plan(numels, 2, mb=mb)
    order = [param for bucket in buckets for param in bucket.params]
    assert order == list(reversed(range(len(numels))))
    nbytes = [[4 * round_up(numels[param], BLOCK) for param in bucket.params] for bucket in buckets]
    full = int(mb * 2**20)
    assert all(sum(sizes) >= full for sizes in nbytes[:-1])
    assert all(sum(sizes[:-1]) < full for sizes in nbytes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": (0, 255)}, f"offsets must be multiples of {BLOCK}"),
        ({"offsets": (0, 256)}, "parameters disjoint"),  # the first has 300 elements
        ({"offsets": (512, 0)}, "parameters disjoint"),
        ({"offsets": (-256, 512)}, "parameters disjoint"),
        ({"numels": (300, -1)}, "parameter 1 at 512 with -1 elements"),
        ({"numels": (300, 600)}, "must hold its parameters"),
        ({"numel": 768}, "divide into 2 shards of whole blocks"),
        ({"numel": 512}, "must hold its parameters"),
        ({"world_size": 0}, "divide into 0 shards"),
        ({"world_size": 3}, "divide into 3 shards"),
        ({"params": (0,)}, "one offset and one size a parameter"),
        ({"offsets": (0,)}, "one offset and one size a parameter"),
        ({"params": (), "offsets": (), "numels": ()}, "one offset and one size a parameter"),
    ],
)
def test_a_malformed_bucket_raises(change: dict[str, Any], message: str) -> None:
    good = Bucket(params=(0, 1), offsets=(0, 512), numels=(300, 5), numel=1024, world_size=2)
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


FIRST, SECOND = Bucket((1,), (0,), (5,), 512, 2), Bucket((0,), (0,), (300,), 512, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, r"rank must lie in \[0, 2\), got 2"),
        ({"rank": -1}, r"rank must lie in \[0, 2\), got -1"),
        ({"world_size": 4}, "a bucket for 2 ranks in a layout for 4"),
        ({"buckets": (FIRST,)}, "parameter 0 is in no bucket"),
        ({"numels": (300, 5, 7)}, "parameter 2 is in no bucket"),
        ({"buckets": (FIRST, SECOND, FIRST)}, "parameter 1 .* in two buckets"),
        ({"numels": (301, 5)}, "parameter 0 .* not whole in one"),
        ({"numels": (300,)}, "parameter 1"),
        ({"buckets": (FIRST, SECOND, Bucket((-1,), (0,), (5,), 512, 2))}, "parameter -1"),
    ],
)
def test_a_malformed_layout_raises(change: dict[str, Any], message: str) -> None:
    good = ShardLayout(numels=(300, 5), buckets=(FIRST, SECOND), rank=0, world_size=2)
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


def test_layouts_are_frozen() -> None:
    (layout,) = layouts([5], 1)
    with pytest.raises(FrozenInstanceError):
        layout.rank = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        layout.buckets[0].numel = 0  # type: ignore[misc]


@given(numels=st.lists(SIZES, min_size=1, max_size=8), world=st.integers(1, 5))
def test_digest_is_the_same_on_every_rank(numels: list[int], world: int) -> None:
    assert len({layout.digest() for layout in layouts(numels, world)}) == 1
    assert layouts(numels, world)[0].digest() == layouts(list(numels), world)[0].digest()


@given(
    a=st.lists(SIZES, min_size=1, max_size=5),
    b=st.lists(SIZES, min_size=1, max_size=5),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=st.tuples(st.sampled_from([0.001, 32]), st.sampled_from([0.001, 32])),
)
@example(a=[0], b=[0, 0], worlds=(1, 1), sizes=(32, 32))
@example(a=[1, 2], b=[2, 1], worlds=(2, 2), sizes=(32, 32))
@example(a=[1], b=[2], worlds=(2, 2), sizes=(32, 32))
def test_digest_differs_between_layouts(
    a: list[int], b: list[int], worlds: tuple[int, int], sizes: tuple[float, float]
) -> None:
    one, other = layouts(a, worlds[0], mb=sizes[0])[0], layouts(b, worlds[1], mb=sizes[1])[0]
    assume((one.numels, one.buckets) != (other.numels, other.buckets))
    assert one.digest() != other.digest()


def test_digest_sees_every_field_of_a_bucket() -> None:
    good = Bucket(params=(1, 0), offsets=(0, 512), numels=(300, 5), numel=1024, world_size=2)
    base = ShardLayout((5, 300), (good,), 0, 2)
    moved = replace(base, buckets=(replace(good, numel=2048, offsets=(0, 768)),))
    padded = replace(base, buckets=(replace(good, numel=2048),))
    named = ShardLayout((300, 5), (replace(good, params=(0, 1)),), 0, 2)
    split = replace(base, buckets=(Bucket((1,), (0,), (300,), 512, 2), Bucket((0,), (0,), (5,), 512, 2)))
    assert len({layout.digest() for layout in (base, moved, padded, named, split)}) == 5


def test_picture_shows_the_owners() -> None:
    names = ["embed.weight", "bias", "empty"]
    layout = layouts([4 * BLOCK, 10, 0], 3, mb=32)[0]
    # Last parameters first: empty and bias at 0 (empty has no element), embed.weight after bias's block.
    assert layout.shard_numel == 2 * BLOCK
    assert layout.picture(names, width=8).splitlines() == [
        "empty                    0  ",
        "bias                    10  00000000",
        "embed.weight         1,024  00111122",
    ]


def test_picture_counts_ranks_modulo_ten() -> None:
    layout = layouts([12 * BLOCK], 12, mb=32)[0]
    assert layout.picture(["w"], width=12).endswith("012345678901")


# -- complexity -------------------------------------------------------------------------------------


def lines_run(fn: Callable[[], Any], below: str = layout_module.__file__) -> int:
    """Lines of a module or folder that `fn` executes; each iteration of a comprehension counts."""
    count = 0

    def local(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return local

    def trace(frame: Any, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(below) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        fn()
    finally:
        sys.settrace(before)
    return count


def numels_of(count: int) -> list[int]:
    return [(257 * index) % 1500 for index in range(count)]


def one_rank(count: int, world: int, rank: int, mb: float) -> int:
    """Plan, validate, digest; returns the number of this rank's segments."""
    numels = numels_of(count)
    buckets = plan_buckets(numels, [0] * count, [4] * count, int(mb * 2**20), world)
    layout = ShardLayout(tuple(numels), buckets, rank, world)
    layout.digest()
    return sum(len(bucket.segments(rank)) for bucket in buckets)


@pytest.mark.parametrize("mb", [0.001, 0.25, 32])
def test_work_does_not_grow_with_the_ranks(mb: float) -> None:
    few = lines_run(lambda: one_rank(2000, 16, 3, mb))
    many = lines_run(lambda: one_rank(2000, 4096, 3, mb))
    assert many <= 1.1 * few  # fewer: a rank of 4,096 holds fewer segments


@pytest.mark.parametrize("world", [1, 64, 4096])
@pytest.mark.parametrize("mb", [0.001, 0.25, 32])
def test_work_is_linear_in_the_tensors(mb: float, world: int) -> None:
    small, large = (lines_run(lambda n=n: one_rank(n, world, 0, mb)) for n in (1000, 4000))
    assert large <= 4.4 * small
    assert small <= 60 * 1000


def test_segments_cost_is_linear_in_this_ranks_segments() -> None:
    (bucket,) = plan_buckets([300] * 4000, [0] * 4000, [4] * 4000, 2**40, 400)
    for rank in (0, 137, 399):
        segments = bucket.segments(rank)
        assert len(segments) == (10 if rank < 399 else len(segments))
        assert lines_run(lambda rank=rank: bucket.segments(rank)) <= 6 * (len(segments) + 3)


def test_a_hundred_thousand_tensors_over_4096_ranks() -> None:
    rank = 4095
    for mb in (0.001, 32):
        numels = numels_of(100_000)
        buckets = plan_buckets(numels, [0] * len(numels), [4] * len(numels), int(mb * 2**20), 4096)
        layout = ShardLayout(tuple(numels), buckets, rank, 4096)
        assert len(layout.digest()) == 64
        assert all(isinstance(s, Segment) for bucket in buckets for s in bucket.segments(rank))


@pytest.mark.parametrize("stage", [1, 2])
def test_construction_and_steps_are_linear_in_the_tensors(stage: int) -> None:
    """All tensors are in one bucket, where a search for each tensor would be quadratic."""
    package = str(Path(layout_module.__file__).parent)
    construction_lines, step_lines = [], []
    for count in (100, 400):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]
        optimizers: list[ShardedLamb] = []

        def construct(params: list[Any] = params, optimizers: list[ShardedLamb] = optimizers) -> None:
            optimizers.append(ShardedLamb(params, stage=stage))

        def step(params: list[Any] = params, optimizers: list[ShardedLamb] = optimizers) -> None:
            sum(p.sum() for p in params).backward()
            optimizers[0].step()
            optimizers[0].zero_grad()

        construction_lines.append(lines_run(construct, package))
        step()  # the first step searches all objects once for a DistributedDataParallel
        step_lines.append(lines_run(step, package))
    assert step_lines[1] <= 4.4 * step_lines[0]
    assert construction_lines[1] <= 4.4 * construction_lines[0]
