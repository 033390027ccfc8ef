"""The two passes over scattered pieces: the same bits as over one flat shard, for any lengths of pieces."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharded_lamb.core import rule
from sharded_lamb.core.layout import BLOCK, round_up
from sharded_lamb.core.rule import COLUMNS
from sharded_lamb.kernels import FlatShard, ReferenceKernel, ScatteredShard, packing, reference

LENGTHS = st.lists(st.sampled_from([1, 2, 255, 256, 257, 511, 700, 5000]), min_size=1, max_size=8)


@given(st.lists(st.integers(0, 3000), max_size=12), st.integers(1, 9))
def test_chunks_cover_every_element_once_in_whole_blocks(lengths: list[int], chunk_blocks: int) -> None:
    seen = [[0] * length for length in lengths]
    for chunk in packing.pack(tuple(lengths), chunk_blocks):
        assert sum(run.blocks for run in chunk) <= chunk_blocks
        for run in chunk:
            assert run.start % BLOCK == 0
            assert run.padding == 0 or run.start + run.length == lengths[run.piece]
            for element in range(run.start, run.start + run.length):
                seen[run.piece][element] += 1
    assert all(count == 1 for piece in seen for count in piece)


def test_small_pieces_share_chunks() -> None:
    chunks = packing.pack((3,) * 1000, 256)
    assert len(chunks) == 4


def shards_of(lengths: list[int], seed: int, state_dtype: torch.dtype) -> tuple[FlatShard, ScatteredShard]:
    """The same numbers in aligned flat memory, and in pieces at unaligned offsets of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    aligned = sum(round_up(length, BLOCK) for length in lengths)
    flat = {kind: torch.zeros(aligned) for kind in reference.KINDS}
    mismatched = {kind: torch.zeros(sum(lengths) + 3 * len(lengths) + 1) for kind in reference.KINDS}
    for moment in ("exp_avg", "exp_avg_sq"):
        flat[moment], mismatched[moment] = flat[moment].to(state_dtype), mismatched[moment].to(state_dtype)
    pieces: dict[str, list[Tensor]] = {kind: [] for kind in reference.KINDS}
    block_param, at, odd_at = [], 0, 1
    for param, length in enumerate(lengths):
        for kind in reference.KINDS:
            value = torch.randn(length, generator=generator)
            value = value.abs() if kind == "exp_avg_sq" else value
            flat[kind][at : at + length] = value
            pieces[kind].append(mismatched[kind][odd_at : odd_at + length])
            pieces[kind][-1].copy_(value)
        block_param += [param] * (round_up(length, BLOCK) // BLOCK)
        at, odd_at = at + round_up(length, BLOCK), odd_at + length + 3
    shard = FlatShard(model=None, block_param=torch.tensor(block_param), **flat)
    return shard, ScatteredShard(tuple(range(len(lengths))), **pieces)


def table_of(count: int) -> Tensor:
    rows = torch.rand(count, len(COLUMNS), generator=torch.Generator().manual_seed(count)) * 0.5 + 0.25
    return rule.table(rule.Coefficients(*rows.double().unbind(1)), torch.float32)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 5), st.integers(0, 99))
def test_pieces_have_the_bits_of_a_flat_shard(
    state_dtype: torch.dtype, lengths: list[int], chunk_blocks: int, seed: int
) -> None:
    flat, pieces = shards_of(lengths, seed, state_dtype)
    kernel, table, count = ReferenceKernel(), table_of(len(lengths)), len(lengths)
    results = []
    before, reference.CHUNK_BLOCKS = reference.CHUNK_BLOCKS, chunk_blocks
    try:
        for shard in (flat, pieces):
            squares = torch.zeros(count, dtype=torch.float64)
            kernel.square_sums([shard], squares)
            sums = torch.zeros(2, count, dtype=torch.float64)
            kernel.moments_and_norms([shard], table, sums)
            kernel.apply([shard], table, torch.linspace(0.1, 0.9, count)[None])
            results.append((squares, sums))
    finally:
        reference.CHUNK_BLOCKS = before
    for actual, expected in zip(results[0], results[1], strict=True):
        assert torch.equal(actual, expected)
    at = 0
    for param, length in enumerate(lengths):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(pieces, kind)[param], getattr(flat, kind)[at : at + length]), kind
        at += round_up(length, BLOCK)


def with_model(
    flat: FlatShard, pieces: ScatteredShard, dtype: torch.dtype, master: torch.dtype, written: int
) -> tuple[FlatShard, ScatteredShard]:
    """Separate masters of dtype ``master``; the user wrote the first ``written`` elements of each model piece."""
    flat = replace(
        flat, weight=flat.weight.to(master), grad=flat.grad.to(torch.promote_types(master, torch.float32))
    )
    flat = replace(flat, model=flat.weight.to(dtype))
    weight = [piece.to(master) for piece in pieces.weight]
    model = [piece.to(dtype) for piece in weight]
    assert flat.model is not None
    at = 0
    for piece in model:
        piece[:written] += 1
        flat.model[at : at + written] += 1
        at += round_up(piece.numel(), BLOCK)
    return flat, replace(pieces, weight=weight, model=model)


@pytest.mark.parametrize("master", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=30)
@given(LENGTHS, st.integers(1, 5), st.integers(0, 99), st.integers(0, 1))
def test_pieces_with_masters_have_the_bits_of_a_flat_shard(
    dtype: torch.dtype,
    master: torch.dtype,
    lengths: list[int],
    chunk_blocks: int,
    seed: int,
    written: int,
) -> None:
    flat, pieces = with_model(*shards_of(lengths, seed, torch.float32), dtype, master, written)
    kernel, count = ReferenceKernel(), len(lengths)
    table = table_of(count).to(flat.compute)
    assert pieces.compute == flat.compute
    results = []
    before, reference.CHUNK_BLOCKS = reference.CHUNK_BLOCKS, chunk_blocks
    try:
        for shard in (flat, pieces):
            results.append(torch.zeros(2, count, dtype=torch.float64))
            kernel.moments_and_norms([shard], table, results[-1])
            kernel.apply([shard], table, torch.linspace(0.1, 0.9, count, dtype=flat.compute)[None])
    finally:
        reference.CHUNK_BLOCKS = before
    assert torch.equal(results[0], results[1])
    assert pieces.model is not None
    at = 0
    for param, length in enumerate(lengths):
        for kind in ("weight", "model", "exp_avg", "exp_avg_sq"):
            actual, expected = getattr(pieces, kind)[param], getattr(flat, kind)[at : at + length]
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected), kind
        assert torch.equal(pieces.model[param], pieces.weight[param].to(dtype))
        at += round_up(length, BLOCK)


def test_a_written_model_weight_replaces_its_master() -> None:
    """In whole blocks that are used in place, and in short ones that are copied."""
    _, pieces = with_model(*shards_of([256 * 300, 7], 3, torch.float32), torch.bfloat16, torch.float32, 0)
    assert pieces.model is not None
    masters = [piece.clone() for piece in pieces.weight]
    for piece in pieces.model:
        piece[1] = 100.0
    ReferenceKernel().moments_and_norms([pieces], table_of(2), torch.zeros(2, 2, dtype=torch.float64))
    for before, after in zip(masters, pieces.weight, strict=True):
        before[1] = 100.0
        assert torch.equal(before, after)


def test_memory_between_pieces_is_unchanged() -> None:
    _, pieces = shards_of([300, 1], 0, torch.float32)
    base = pieces.weight[0]._base
    assert base is not None
    base[[0, 301, 302, 303, 305, 306, 307]] = 7.0
    kernel, table = ReferenceKernel(), table_of(2)
    kernel.moments_and_norms([pieces], table, torch.zeros(2, 2, dtype=torch.float64))
    kernel.apply([pieces], table, torch.ones(2)[None])
    assert base[[0, 301, 302, 303, 305, 306, 307]].tolist() == [7.0] * 7


def test_gradients_of_another_dtype() -> None:
    _, pieces = shards_of([300, 5], 1, torch.float32)
    lower = ScatteredShard(
        pieces.params, pieces.weight, [g.bfloat16() for g in pieces.grad], pieces.exp_avg, pieces.exp_avg_sq
    )
    sums = torch.zeros(2, dtype=torch.float64)
    ReferenceKernel().square_sums([lower], sums)
    expected = [g.bfloat16().double().square().sum() for g in pieces.grad]
    assert torch.allclose(sums, torch.stack(expected), rtol=1e-6)
