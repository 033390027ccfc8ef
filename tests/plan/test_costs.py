"""Predicted bytes by what must hold at any number of ranks, and by the formula that the design promises."""

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sharded_lamb import shapes
from sharded_lamb.core.layout import BLOCK, chunk_numel
from sharded_lamb.plan.costs import Costs, buckets_of, costs
from sharded_lamb.plan.sharding import Choices, Sharding, shardings

BF16 = Choices(model_dtype=torch.bfloat16)
SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=12).map(
    lambda shapes: {f"p{i}": shape for i, shape in enumerate(shapes)}
)
CHOICES = st.builds(
    Choices,
    model_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    state_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    store_param_remainders=st.sampled_from([False, True, 8]),
    bucket_mb=st.sampled_from([0.001, 0.01, 32]),
    sums_here=st.booleans(),
)
RANKS = st.integers(1, 40)


@given(shape=st.lists(st.integers(0, 30), min_size=1, max_size=3), ranks=RANKS)
def test_chunks_are_those_of_torch(shape: list[int], ranks: int) -> None:
    chunks = [part.numel() for part in torch.empty(shape, device="meta").chunk(ranks)]
    held = [chunk_numel(shape, ranks, rank) for rank in range(ranks)]
    assert held == chunks + [0] * (ranks - len(chunks))


@given(shapes=SHAPES, choices=CHOICES, ranks=RANKS)
def test_every_element_is_somewhere_once(
    shapes: dict[str, tuple[int, ...]], choices: Choices, ranks: int
) -> None:
    total = sum(map(prod, shapes.values()))
    segments = [
        sum(
            segment.length
            for bucket in buckets_of(shapes.values(), choices, ranks)
            for segment in bucket.segments(rank)
        )
        for rank in range(ranks)
    ]
    assert sum(segments) == total
    widths = choices.precision.widths
    chunks = [costs(shapes, choices, Sharding(3, ranks), rank).memory for rank in range(ranks)]
    assert sum(memory["parameters"] for memory in chunks) == total * widths.model
    assert sum(memory["moments"] for memory in chunks) == 2 * total * widths.state
    # The first rank has the most, which the table shows.
    assert max(memory["parameters"] for memory in chunks) == chunks[0]["parameters"]


@given(shapes=SHAPES, choices=CHOICES, ranks=RANKS, factor=st.integers(2, 5))
def test_more_ranks_need_no_more_memory_but_for_padding(
    shapes: dict[str, tuple[int, ...]], choices: Choices, ranks: int, factor: int
) -> None:
    def kept(cost: Costs) -> int:
        return cost.total_memory - cost.memory["staging"]  # several ranks also receive

    widths, buckets = choices.precision.widths, len(buckets_of(shapes.values(), choices, 1))
    shard_padding = BLOCK * buckets * (widths.master + 2 * widths.state + widths.compute)
    for stage in (1, 2):
        few, many = (costs(shapes, choices, Sharding(stage, n)) for n in (ranks, ranks * factor))
        whole_padding = BLOCK * buckets * ranks * factor * widths.model
        assert kept(many) <= kept(few) + whole_padding + shard_padding
    assert kept(costs(shapes, choices, Sharding(3, ranks * factor))) <= kept(
        costs(shapes, choices, Sharding(3, ranks))
    )


@given(shapes=SHAPES, choices=CHOICES, shard=RANKS, replicate=st.integers(2, 4))
def test_replicas_hold_what_one_copy_holds(
    shapes: dict[str, tuple[int, ...]], choices: Choices, shard: int, replicate: int
) -> None:
    for stage in (1, 2, 3):
        one, several = (
            costs(shapes, choices, Sharding(stage, shard)),
            costs(shapes, choices, Sharding(stage, shard, replicate)),
        )
        assert several.memory == one.memory
        assert several.large.get("all_gather") == one.large.get("all_gather")
        assert len(several.small) == 2


@pytest.mark.parametrize("world", [8, 64])
def test_the_memory_that_the_design_promises(world: int) -> None:
    """Stage 2, bf16: 2 B weights + 12/W state + 4/W gradient shard an element, and the staging of a few buckets."""
    results = shapes.named("bert-large")
    elements = sum(map(prod, results.values()))
    cost = costs(results, BF16, Sharding(2, world))
    promised = elements * (2 + 12 / world + 4 / world)
    assert cost.total_memory - cost.memory["staging"] == pytest.approx(promised, rel=0.02)
    largest = max(map(prod, results.values())) * 2  # bytes; the word embeddings have a bucket of their own
    assert cost.memory["staging"] == pytest.approx(2 * largest * (1 + 1 / world), rel=0.02)
    by_hand = costs(results, Choices(model_dtype=torch.bfloat16, sums_here=True), Sharding(2, world))
    assert by_hand.memory["staging"] == pytest.approx(2 * (2 - 1 / world) * largest, rel=0.02)


@pytest.mark.parametrize("sharding", [Sharding(1, 8), Sharding(2, 64), Sharding(3, 64)])
def test_remainders_are_half_of_the_masters_and_nothing_else(sharding: Sharding) -> None:
    results = shapes.named("bert-large")
    whole, split = (
        costs(results, replace(BF16, store_param_remainders=splits), sharding) for splits in (False, True)
    )
    assert split.memory == {**whole.memory, "masters": whole.memory["masters"] // 2}
    assert whole.memory["masters"] * 2 == whole.memory["moments"]
    assert (split.wire, split.calls) == (whole.wire, whole.calls)


@pytest.mark.parametrize(("reduce", "block"), [(torch.bfloat16, 512), (torch.float8_e4m3fn, 257)], ids=str)
def test_compressed_reductions_of_bert_large(reduce: torch.dtype, block: int) -> None:
    """Fewer bytes on the wire and in staging in stage 2; in the others not the optimizer's."""
    results = shapes.named("bert-large")
    for stage in (1, 2, 3):
        plain, packed = (
            costs(results, Choices(reduce_dtype=chosen, sums_here=True), Sharding(stage, 8))
            for chosen in (None, reduce)
        )
        assert packed.calls == plain.calls
        if stage != 2:
            assert (packed.wire, packed.memory) == (plain.wire, plain.memory)
            continue
        for name in ("wire", "memory"):
            kind = "reduce_scatter" if name == "wire" else "staging"
            whole, part = getattr(plain, name), getattr(packed, name)
            assert part == {**whole, kind: whole[kind] * block // 1024}


@pytest.mark.parametrize(("gather", "block"), [(torch.bfloat16, 512), (torch.float8_e4m3fn, 257)], ids=str)
def test_compressed_gathers_of_bert_large(gather: torch.dtype, block: int) -> None:
    """Fewer bytes, and masters beside float32 weights; nothing in stage 3, where fully_shard gathers."""
    results = shapes.named("bert-large")
    for stage in (1, 2, 3):
        plain, packed = (
            costs(results, Choices(gather_dtype=chosen), Sharding(stage, 8)) for chosen in (None, gather)
        )
        if stage == 3:
            assert packed == plain
            continue
        assert packed.wire == {**plain.wire, "all_gather": plain.wire["all_gather"] * block // 1024}
        assert packed.memory == {**plain.memory, "masters": plain.memory["moments"] // 2}
        assert packed.calls == plain.calls


def test_bytes_on_the_wire_of_bert_large() -> None:
    """fp32, 8 ranks: 7/8 of the model once and once again, and 5 P + 7 fp64 in two all-reduces."""
    results = shapes.named("bert-large")
    size = 4 * sum(map(prod, results.values()))
    cost = costs(results, Choices(), Sharding(2, 8))
    for name in ("reduce_scatter", "all_gather"):
        assert cost.wire[name] == pytest.approx(size * 7 / 8, rel=1e-3)
    assert cost.wire["all_reduce_small"] == 8 * (5 * 398 + 7)
    assert cost.calls["all_reduce_small"] == 2
    assert cost.calls["all_gather"] == cost.calls["reduce_scatter"] == len(cost.large["all_gather"])
    two_levels = costs(results, Choices(), Sharding(2, 8, 4))
    assert two_levels.wire["all_reduce_replicas"] == pytest.approx(size / 8, rel=1e-3)


def test_more_ranks_than_rows() -> None:
    results = shapes.named("bert-large")
    flat, chunks = (costs(results, Choices(), Sharding(stage, 4096)) for stage in (2, 3))
    assert flat.memory["parameters"] % (BLOCK * 4096) == 0
    # The last rank has the last row of what has 4,096 rows: a layer's intermediate weight and bias.
    last = costs(results, Choices(), Sharding(3, 4096), rank=4095)
    assert last.memory["parameters"] == 4 * 24 * (1024 + 1)
    assert last.padding == 2 * (chunks.memory["parameters"] - last.memory["parameters"])
    update = flat.update / sum(bucket.shard_numel for bucket in buckets_of(results.values(), Choices(), 4096))
    assert update == 40
    assert costs(results, BF16, Sharding(2, 1)).update / sum(map(prod, results.values())) == pytest.approx(
        44, rel=1e-3
    )
    split = replace(BF16, store_param_remainders=True)
    assert (
        costs(results, split, Sharding(2, 8)).update / costs(results, BF16, Sharding(2, 8)).update == 40 / 44
    )


def test_shardings_by_node_number_and_all() -> None:
    results = shardings([16, 4, 16], [2], ["all", "node", "2"], ranks_per_node=8)
    assert [(sharding.world_size, sharding.mesh) for sharding in results] == [
        (4, "4"),  # of which "node" is the same
        (16, "16"),
        (16, "2x8"),
        (4, "2x2"),
        (16, "8x2"),
    ]
    assert shardings([1, 2], [1], ["2"], 8) == [Sharding(1, 2)]
