"""Every backend has the bits of the pure one: all dtypes, edge-case lengths, both forms of memory, any thread count."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharded_lamb import kernels
from sharded_lamb.core import rule
from sharded_lamb.core.layout import BLOCK, Segment, round_up
from sharded_lamb.core.rule import COLUMNS
from sharded_lamb.kernels import (
    FlatShard,
    Kernel,
    LocalContribution,
    ReceivedShards,
    ReferenceKernel,
    ScatteredShard,
    Shard,
    formats,
    remainders,
)
from tests.kernels.kernel_memory import CODES, coded, in_whole_gradients, passes

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SPLIT, SPLIT8 = remainders.STORAGE[16], remainders.STORAGE[8]
OTHERS = [name for name in kernels.available() if name != "torch"]
LENGTHS = st.lists(st.sampled_from([1, 2, 255, 256, 257, 511, 700, 5000]), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**20)


@dataclass(frozen=True)
class Dtypes:
    weight: torch.dtype  # or SPLIT, with a bfloat16 model
    model: torch.dtype | None
    grad: torch.dtype  # of pieces; a flat shard's gradients have the compute dtype
    state: torch.dtype


DTYPES = st.builds(
    Dtypes,
    st.sampled_from([F32, BF16, F16, F64]),
    st.sampled_from([None, BF16, F16, F32]),
    st.sampled_from([F32, BF16, F16, F64]),
    st.sampled_from([F32, BF16, F16, F64, CODES]),
) | st.builds(
    Dtypes,
    st.sampled_from([SPLIT, SPLIT8]),
    st.just(BF16),
    st.sampled_from([F32, BF16, F16, F64]),
    st.sampled_from([F32, BF16, F16, F64, CODES]),
)


def test_a_compiler_is_installed() -> None:
    """Without a compiler the tests below would compare nothing."""
    assert "cpp" in OTHERS


def flat_shard(lengths: Sequence[int], dtypes: Dtypes, seed: int) -> FlatShard:
    """Numbers of all magnitudes; the user wrote a tenth of the model's weights."""
    generator = torch.Generator().manual_seed(seed)
    owners = [param for param, n in enumerate(lengths) for _ in range(round_up(n, BLOCK) // BLOCK)]
    inside = torch.zeros(len(owners) * BLOCK)
    at = 0
    for length in lengths:
        inside[at : at + length] = 1
        at += round_up(length, BLOCK)

    def numbers() -> Tensor:
        powers = torch.randint(-12, 4, inside.shape, generator=generator)
        return torch.randn(inside.shape, generator=generator) * 2.0**powers * inside

    weight, model = numbers(), None
    if dtypes.weight in (SPLIT, SPLIT8):  # any remainders beside any weights
        model = weight.to(BF16)
        end = 2**15 if dtypes.weight == SPLIT else 2**7
        bits = torch.randint(-end, end, inside.shape, generator=generator)
        weight = (bits * inside).to(dtypes.weight)
    else:
        weight = weight.to(dtypes.weight)
    if dtypes.model is not None and model is None:
        written = torch.rand(inside.shape, generator=generator) < 0.1
        model = (weight.to(F64) + written * inside).to(dtypes.model)
    return FlatShard(
        weight=weight,
        model=model,
        grad=numbers().to(torch.promote_types(dtypes.weight, F32)),
        exp_avg=moment("exp_avg", numbers(), dtypes.state),
        exp_avg_sq=moment("exp_avg_sq", numbers().abs(), dtypes.state),
        block_param=torch.tensor(owners),
    )


def moment(kind: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    return coded(kind, values) if dtype == CODES else values.to(dtype)


def piece_shard(lengths: Sequence[int], dtypes: Dtypes, seed: int) -> ScatteredShard:
    """The same numbers in pieces at unaligned addresses."""
    flat = flat_shard(lengths, dtypes, seed)

    def pieces(kind: Tensor, dtype: torch.dtype) -> list[Tensor]:
        memory = torch.full((sum(lengths) + len(lengths) + 1,), 7.0, dtype=dtype)
        parts, at, mismatched = [], 0, 1
        for length in lengths:
            parts.append(memory[mismatched : mismatched + length])
            parts[-1].copy_(kind[at : at + length])
            at, mismatched = at + round_up(length, BLOCK), mismatched + length + 1
        return parts

    def moments(kind: str) -> list[Tensor]:
        stored = getattr(flat, kind)
        if dtypes.state != CODES:
            return pieces(stored, dtypes.state)
        values = formats.of_moment(kind, CODES).decode(stored, None).flatten()
        return [coded(kind, part) for part in pieces(values, values.dtype)]

    return ScatteredShard(
        params=tuple(range(len(lengths))),
        weight=pieces(flat.weight, dtypes.weight),
        grad=pieces(flat.grad, dtypes.grad),
        exp_avg=moments("exp_avg"),
        exp_avg_sq=moments("exp_avg_sq"),
        model=None if flat.model is None else pieces(flat.model, flat.model.dtype),
    )


def table_of(count: int, seed: int, dtype: torch.dtype) -> Tensor:
    rows = torch.rand(count, len(COLUMNS), generator=torch.Generator().manual_seed(seed)) + 0.25
    rows[::3, COLUMNS.index("grad_scale")] = 0  # their gradients count as 0
    return rule.table(rule.Coefficients(*rows.double().unbind(1)), dtype)


def one_step(kernel: Kernel, shards: Sequence[Shard], count: int, seed: int) -> list[Tensor]:
    dtype = shards[0].compute
    squares = torch.zeros(count, dtype=F64)
    kernel.square_sums(shards, squares)
    sizes = torch.linspace(0, 0.9, count, dtype=dtype)
    table, step_sizes = table_of(count, seed, dtype), torch.stack([sizes, 1 - sizes])
    return [squares, passes(kernel, shards, table, step_sizes, seed)]


def memory_of(shard: Shard) -> list[Tensor]:
    kinds = [shard.weight, shard.model, shard.grad, shard.exp_avg, shard.exp_avg_sq]
    return [
        tensor
        for kind in kinds
        if kind is not None
        for tensor in ([kind] if isinstance(kind, Tensor) else kind)
    ]


def assert_same(results: Sequence[Tensor], expected: Sequence[Tensor], compute: torch.dtype) -> None:
    """Equal bits; in fp64 up to an ulp, since MKL's square root may be off by one (see `rule.root`)."""
    for actual, reference in zip(results, expected, strict=True):
        assert actual.dtype == reference.dtype
        if compute == F64 and actual.is_floating_point():  # codes of moments take no root
            tolerance = max(1e-13, 2 * torch.finfo(actual.dtype).eps)
            torch.testing.assert_close(actual, reference, rtol=tolerance, atol=1e-15, equal_nan=True)
        else:
            torch.testing.assert_close(actual, reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("make", [flat_shard, piece_shard])
@given(LENGTHS, DTYPES, SEEDS)
def test_a_step_has_the_bits_of_the_pure_one(
    make: Callable[..., Shard], name: str, lengths: list[int], dtypes: Dtypes, seed: int
) -> None:
    actual, reference = make(lengths, dtypes, seed), make(lengths, dtypes, seed)
    sums = one_step(kernels.load(name), [actual], len(lengths), seed)
    reference_sums = one_step(ReferenceKernel(), [reference], len(lengths), seed)
    assert_same([*sums, *memory_of(actual)], [*reference_sums, *memory_of(reference)], actual.compute)


@pytest.mark.parametrize("name", ["torch", *OTHERS])
@pytest.mark.parametrize("make", [flat_shard, piece_shard])
@pytest.mark.parametrize(
    "dtypes", [Dtypes(F32, None, F32, F32), Dtypes(SPLIT, BF16, F32, F32), Dtypes(SPLIT8, BF16, F32, CODES)]
)
def test_bits_do_not_depend_on_the_grouping_into_calls(
    dtypes: Dtypes, make: Callable[..., Shard], name: str
) -> None:
    """All shards in one call, or one call per shard."""
    lengths = [[700, 1], [5000], [256, 257]]
    kernel, results = kernels.load(name), []
    for together in (True, False):
        shards = [make(each, dtypes, seed) for seed, each in enumerate(lengths)]
        table, sums = table_of(2, 3, F32), torch.zeros(2, 2, dtype=F64)
        for group in [shards] if together else [[shard] for shard in shards]:
            kernel.moments_and_norms(group, table, sums)
            kernel.apply(group, table, torch.tensor([0.1, 0.2])[None])
        results.append([sums, *(tensor for shard in shards for tensor in memory_of(shard))])
    assert_same(results[0], results[1], F32)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("make", [flat_shard, piece_shard])
@pytest.mark.parametrize(("weight", "state"), [(F32, F32), (SPLIT, F32), (SPLIT8, CODES)])
def test_any_number_of_threads_has_the_same_bits(
    weight: torch.dtype, state: torch.dtype, make: Callable[..., Shard], name: str
) -> None:
    lengths = [70_000, 3, 513, 256, 1, 20_000]
    dtypes, results = Dtypes(weight, BF16, F32, state), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5, 64):
            torch.set_num_threads(threads)
            shard = make(lengths, dtypes, 0)
            results.append([*one_step(kernels.load(name), [shard], len(lengths), 0), *memory_of(shard)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0], F32)


@pytest.mark.parametrize("name", ["torch", *OTHERS])
def test_non_finite_gradients_with_scale_0_show_only_in_the_square_sums(name: str) -> None:
    """A ``grad_scale`` of 0 keeps them out of memory and norms."""
    shard = flat_shard([300, 256, 5], Dtypes(F32, None, F32, F32), 0)
    shard.grad[7], shard.grad[512] = torch.nan, torch.inf
    untouched = [shard.weight.clone(), shard.exp_avg.clone(), shard.exp_avg_sq.clone()]
    squares, sums = torch.zeros(3, dtype=F64), torch.zeros(2, 3, dtype=F64)
    kernel, table = kernels.load(name), torch.zeros(3, len(COLUMNS))
    for column in ("beta1", "beta2", "unbias1", "unbias2", "eps_outside"):
        table[:, COLUMNS.index(column)] = 1
    kernel.square_sums([shard], squares)
    kernel.moments_and_norms([shard], table, sums)
    kernel.apply([shard], table, torch.zeros(3)[None])
    assert squares.isfinite().tolist() == [False, False, True]
    assert sums.isfinite().all()
    assert_same([shard.weight, shard.exp_avg, shard.exp_avg_sq], untouched, F32)


@pytest.mark.parametrize("name", ["torch", *OTHERS])
def test_moments_of_non_finite_gradients(name: str) -> None:
    """Moments that are rounded at random: a carry would turn a nan whose bits are all 1 into a zero."""
    bits = [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, 0x7F800000, -0x800000, 0x7F7FFFFF]
    grad = torch.tensor(bits, dtype=torch.int32).view(F32).repeat(BLOCK)
    moments = {kind: torch.zeros(len(grad), dtype=BF16) for kind in ("exp_avg", "exp_avg_sq")}
    owners = torch.zeros(len(bits), dtype=torch.int64)
    shard = FlatShard(weight=torch.ones_like(grad), model=None, grad=grad, **moments, block_param=owners)
    table = rule.table(rule.Coefficients(*torch.ones(len(COLUMNS), 1, dtype=F64)), F32)
    kernels.load(name).moments_and_norms([shard], table, torch.zeros(2, 1, dtype=F64))
    assert moments["exp_avg"].isnan().tolist() == grad.isnan().tolist()
    assert moments["exp_avg_sq"].isnan().tolist() == grad.isnan().tolist()
    assert (moments["exp_avg"][4::7] == torch.inf).all()
    assert (moments["exp_avg"][5::7] == -torch.inf).all()
    assert (moments["exp_avg_sq"][4::7] == torch.inf).all()


@pytest.mark.parametrize("bits", remainders.STORAGE)
@pytest.mark.parametrize("name", ["torch", *OTHERS])
def test_split_masters_at_the_edges(name: str, bits: int) -> None:
    """All bfloat16 weights, each with remainders that only occur beside a weight that the user wrote. A step size of 0
    changes no weight but clamps remainders as `joined` does; 0 x inf is nan."""
    edges, split = EDGES[bits], remainders.STORAGE[bits]
    model = torch.arange(-(2**15), 2**15, dtype=torch.int16).repeat(len(edges)).view(BF16)
    remainder = torch.tensor(edges, dtype=split).repeat_interleave(2**16)
    shard = piece_shard([len(model)], Dtypes(split, BF16, F32, F32), 0)
    assert shard.model is not None
    shard.model[0].copy_(model)
    shard.weight[0].copy_(remainder)
    for kind in (shard.grad, shard.exp_avg, shard.exp_avg_sq):
        kind[0].zero_()
    master = remainders.joined(model, remainder)
    expected = remainders.split(torch.where(master.isinf(), torch.nan, master), bits)
    table = torch.ones(1, len(COLUMNS))
    for column in ("l2", "decay"):
        table[:, COLUMNS.index(column)] = 0
    kernel = kernels.load(name)
    kernel.moments_and_norms([shard], table, torch.zeros(2, 1, dtype=F64))
    assert torch.equal(shard.weight[0], remainder), "pass 1 writes moments alone"
    kernel.apply([shard], table, torch.zeros(1)[None])
    assert_same([shard.model[0], shard.weight[0]], expected, F32)
    moved = [x[shard.model[0].isfinite()].view(torch.int16) for x in (shard.model[0], model)]
    assert torch.equal(moved[0], moved[1]), "the signs of zeros too"


@pytest.mark.parametrize("name", ["torch", *OTHERS])
@pytest.mark.parametrize("distance", [-0x8001, -0x8000, -0x7FFF, 0, 0x7FFF, 0x8000, 0x8001])
def test_masters_follow_weights_that_they_do_not_round_to(name: str, distance: int) -> None:
    """All finite bfloat16 weights, each so many fp32 numbers below its master; halves round to the even weight."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    upper = upper[((upper & 0x7FFF) > 0) & ((upper & 0x7FFF) < 0x7F80)]
    rounds = abs(distance) < 0x8000 or (abs(distance) == 0x8000) & (upper & 1 == 0)
    master = ((upper << 16) + distance).view(F32)
    shard = piece_shard([len(upper)], Dtypes(F32, BF16, F32, F32), 0)
    assert shard.model is not None
    shard.model[0].copy_(upper.to(torch.int16).view(BF16))
    shard.weight[0].copy_(master)
    kernels.load(name).weight_norms([shard], torch.zeros(1, dtype=F64))
    expected = torch.where(torch.as_tensor(rounds), master, (upper << 16).view(F32))
    assert torch.equal(shard.weight[0].view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", ["torch", *OTHERS])
def test_a_tie_above_an_even_weight_is_nudged(name: str) -> None:
    """w - u is halfway between a weight and the next."""
    shard = flat_shard([5000], Dtypes(SPLIT, BF16, F32, F32), 0)
    assert shard.model is not None
    shard.weight.zero_()
    shard.model.copy_(torch.tensor([1.0, 1 + 2**-7, -1, -1 - 2**-7]).repeat(len(shard.model) // 4))
    shard.exp_avg.copy_(-shard.model.sign() * 2**-8)
    shard.exp_avg_sq.fill_(1)
    table = torch.zeros(1, len(COLUMNS))
    for column in ("beta1", "beta2", "unbias1", "unbias2"):
        table[:, COLUMNS.index(column)] = 1
    kernels.load(name).apply([shard], table, torch.ones(1)[None])
    assert shard.weight[:4].tolist() == [0x7FFF, -0x8000, 0x7FFF, -0x8000]
    assert shard.model[:4].tolist() == [1, 1 + 2**-6, -1, -1 - 2**-6]


@pytest.mark.parametrize("name", ["torch", *OTHERS])
def test_a_written_infinity_beside_a_remainder_is_infinite(name: str) -> None:
    """It is not nan."""
    shard, sums = flat_shard([5000], Dtypes(SPLIT, BF16, F32, F32), 0), torch.zeros(2, 1, dtype=F64)
    assert shard.model is not None
    shard.model[:2] = torch.tensor([torch.inf, -torch.inf])
    shard.weight[:2] = torch.tensor([1, 0x7FFF])
    kernels.load(name).moments_and_norms([shard], table_of(1, 0, F32), sums)
    assert sums[0, 0] == torch.inf


EDGES = {16: (-0x8000, -0x7FFF, -1, 0, 1, 0x7FFF), 8: (-0x80, -0x7F, -1, 0, 1, 0x7F)}


# -- gradients: averages, and in place ------------------------------------------------------------------


def segments_of(lengths: Sequence[int]) -> tuple[Segment, ...]:
    starts = [sum(round_up(length, BLOCK) for length in lengths[:param]) for param in range(len(lengths))]
    return tuple(
        Segment(param, 0, length, start)
        for param, (length, start) in enumerate(zip(lengths, starts, strict=True))
    )


@pytest.mark.parametrize("name", ["torch", *OTHERS])
@pytest.mark.parametrize("has_own", [False, True])
@given(
    LENGTHS,
    st.sampled_from([F32, BF16, F16, F64]),
    st.sampled_from([F32, F64]),
    SEEDS,
    st.integers(1, 5),
    st.booleans(),
)
def test_average_is_the_sum_in_rank_order_over_the_divisor(
    has_own: bool,
    name: str,
    lengths: list[int],
    wire: torch.dtype,
    weight: torch.dtype,
    seed: int,
    ranks: int,
    add: bool,
) -> None:
    """``has_own``: this rank's part is read from its gradients in place; its first gradient is missing."""
    shard, segments = flat_shard(lengths, Dtypes(weight, None, F32, F32), seed), segments_of(lengths)
    parts = torch.zeros(ranks, shard.grad.numel(), dtype=wire)
    generator, row = torch.Generator().manual_seed(seed), seed % ranks
    for segment in segments:
        columns = parts[:, segment.shard_start : segment.shard_start + segment.length]
        columns.copy_(torch.randn(columns.shape, generator=generator))
        if has_own and segment.param == 0:
            columns[row] = 0
    rows, own = list(parts.to(shard.compute)), None
    if has_own:
        own_grads = [parts[row, s.shard_start : s.shard_start + s.length].to(shard.compute) for s in segments]
        own_grads = [value + 1e-3 for value in own_grads]  # not representable in the wire dtype
        own = LocalContribution(row, [None, *own_grads[1:]])
        parts = torch.cat([parts[:row], parts[row + 1 :]])
        for segment, value in zip(segments[1:], own_grads[1:], strict=True):
            rows[row][segment.shard_start : segment.shard_start + segment.length] = value
    expected = rows[0]
    for other in rows[1:]:
        expected = expected + other
    expected = expected / ranks
    expected = shard.grad + expected if add else expected
    sums = torch.full((len(lengths),), 0.5, dtype=F64)
    kernels.load(name).average(shard, segments, ReceivedShards(parts, ranks, own), sums, add=add)
    assert torch.equal(shard.grad, expected)
    squares = torch.zeros(len(lengths), dtype=F64)
    ReferenceKernel().square_sums([shard], squares)
    torch.testing.assert_close(sums, squares + 0.5, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["torch", *OTHERS])
@given(LENGTHS, st.sampled_from([F32, BF16, F16]), SEEDS)
def test_pieces_read_their_part_of_a_gradient_in_place(
    name: str, lengths: list[int], dtype: torch.dtype, seed: int
) -> None:
    """A piece may start inside its gradient, which may be a matrix or transposed; around it is nan."""
    pieces = [piece_shard(lengths, Dtypes(F32, None, dtype, F32), seed) for _ in range(2)]
    expected = [*one_step(ReferenceKernel(), pieces[:1], len(lengths), seed), *written(pieces[0])]
    inside = in_whole_gradients(pieces[1])
    actual = [*one_step(kernels.load(name), [inside], len(lengths), seed), *written(inside)]
    assert_same(actual, expected, F32)


def written(shard: ScatteredShard) -> list[Tensor]:
    return [*shard.weight, *shard.exp_avg, *shard.exp_avg_sq]
