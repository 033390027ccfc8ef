"""The bits of the Triton backend are the reference's, under Triton's interpreter.

Not collected by itself: `test_triton_kernels.py` runs it in a process of its own, since what is interpreted is decided
when Triton is imported.
"""

import math
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sharded_lamb.core.layout import BLOCK, Segment
from sharded_lamb.core.rule import COLUMNS
from sharded_lamb.kernels import FlatShard, ReferenceKernel, ScatteredShard, triton_kernel
from sharded_lamb.kernels.shard import LocalContribution, ReceivedShards
from sharded_lamb.kernels.triton_kernel import TritonKernel
from tests.kernels.kernel_memory import (
    CODES,
    F32,
    FLOATS,
    SPLIT,
    SPLIT8,
    Form,
    assert_same,
    assert_subnormal_moments_become_zero,
    contents,
    in_whole_gradients,
    made,
    stepped,
    table_of,
    trained,
)
from tests.kernels.triton_interpreter import interpreted  # noqa: F401 (every test uses it)

LENGTHS = st.lists(st.sampled_from([0, 1, 255, 256, 257, 700, 5000]), min_size=1, max_size=4).map(tuple)


@st.composite
def form_lists(draw: st.DrawFn) -> list[Form]:
    """One to three shards of one compute dtype."""
    is_fp64 = draw(st.booleans())
    weights = [dtype for dtype in (*FLOATS, SPLIT, SPLIT8) if (dtype == torch.float64) == is_fp64]
    forms = []
    for _ in range(draw(st.integers(1, 3))):
        weight, grad, exp_avg, exp_avg_sq = (
            draw(st.sampled_from(x)) for x in (weights, FLOATS, FLOATS, FLOATS)
        )
        if draw(st.booleans()):
            exp_avg = exp_avg_sq = CODES
        models = (
            [torch.bfloat16] if weight in (SPLIT, SPLIT8) else [None, *(x for x in FLOATS[:3] if x != weight)]
        )
        model = draw(st.sampled_from(models))
        flat, gap, written = (
            draw(st.booleans()),
            draw(st.sampled_from([0, 3])),
            draw(st.sampled_from([0, 1, 300])),
        )
        lengths = draw(LENGTHS)
        gap = 0 if flat else gap
        forms.append(Form(flat, lengths, weight, model, grad, exp_avg, exp_avg_sq, gap, written))
    return forms


MIXED = Form(False, (700,), torch.float32, None, torch.float32, torch.float32, torch.bfloat16)
"""Moments of two dtypes."""


@settings(max_examples=6)
@given(form_lists(), st.integers(0, 99), st.booleans())
@example([MIXED], 0, False)
def test_bits_are_the_references(forms: list[Form], seed: int, bad: bool) -> None:
    """Any dtypes, lengths and forms in one call; nan gradients with a scale of 0; weights that the user wrote."""
    assert_same(stepped(TritonKernel(), forms, seed, bad), stepped(ReferenceKernel(), forms, seed, bad))


def test_pieces_read_their_part_of_a_gradient_in_place() -> None:
    """A piece may start inside its gradient; around it is nan."""
    for dtype in (torch.float32, torch.bfloat16):
        form = Form(False, (5, 700, 256, 3000), torch.float32, None, dtype, *F32[3:])
        shards = [made(form, 0, 1, False) for _ in range(2)]
        assert isinstance(shards[1], ScatteredShard)
        shards[1] = in_whole_gradients(shards[1])
        results = []
        for kernel, shard in zip((ReferenceKernel(), TritonKernel()), shards, strict=True):
            squares, sums = torch.zeros(4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
            kernel.square_sums([shard], squares)
            kernel.moments_and_norms([shard], table_of(4, torch.float32, False), sums)
            assert isinstance(shard, ScatteredShard)
            results.append([squares, sums, *shard.exp_avg, *shard.exp_avg_sq])
        assert_same(*results)


def test_gradients_with_scale_0_are_not_used() -> None:
    """nan gradients with scale 0, in both forms of memory."""
    forms = [
        Form(flat, (256, 700, 3, 1), torch.float32, None, torch.float32, *F32[3:]) for flat in (False, True)
    ]
    for update in (0, 2):
        actual, expected = (
            stepped(kernel, forms, 2, True, steps=1, update=update)
            for kernel in (TritonKernel(), ReferenceKernel())
        )
        assert_same(actual, expected)
        assert actual[1].isfinite().all()


PLACES = [(weight, model) for weight in FLOATS for model in (None, *FLOATS[:3]) if weight != model]
PLACES += [(SPLIT, torch.bfloat16), (SPLIT8, torch.bfloat16)] * 2
STATES = (*FLOATS, CODES)
COMBINATIONS = [(*place, FLOATS[i % 4], STATES[(i + i // 4) % 5]) for i, place in enumerate(PLACES)]


@pytest.mark.parametrize("flat", [False, True])
def test_every_dtype_in_every_place(flat: bool) -> None:
    """One call with all combinations of dtypes, for each compute dtype: two directions, and caution in flat memory."""
    for compute, update in product((torch.float32, torch.float64), (1, 2) if flat else (1,)):
        forms = [
            Form(flat, (257,), weight, model, grad, state, state, 0 if flat else 1, 2)
            for weight, model, grad, state in COMBINATIONS
            if torch.promote_types(weight, torch.float32) == compute
        ]
        actual, expected = (
            stepped(kernel, forms, 5, False, steps=1, update=update)
            for kernel in (TritonKernel(), ReferenceKernel())
        )
        assert_same(actual, expected)


def special(values: Sequence[float], dtype: torch.dtype) -> Form:
    return Form(False, (len(values),), torch.float32, dtype, torch.float32, dtype, dtype)


@pytest.mark.parametrize("update", [0, 3], ids=["lamb", "lars"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_subnormal_moments_become_zero(dtype: torch.dtype, update: int) -> None:
    for step in (64, 65):
        assert_subnormal_moments_become_zero(TritonKernel(), dtype, update, step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_the_edges(dtype: torch.dtype) -> None:
    """Ties to even, overflow, subnormal numbers, infinities and nan, as torch rounds them."""
    one = torch.finfo(dtype).eps
    small, big = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    values = [
        1 + one / 2,
        1 + 1.5 * one,
        1 + one / 2 * 1.001,
        -1 - one / 2,
        small / 3,
        small * 0.999,
        1e-45,
        0.0,
        -0.0,
    ]
    values += [big, big * (1 + one / 4), 3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 2 - one / 8]
    results = []
    for kernel in (ReferenceKernel(), TritonKernel()):
        shard = made(special(values, dtype), 0, 0, False)
        assert isinstance(shard, ScatteredShard)
        assert shard.model is not None
        shard.weight[0].copy_(torch.tensor(values))
        shard.model[0].copy_(torch.tensor(values).to(dtype))
        kernel.apply([shard], table_of(1, torch.float32, False), torch.zeros(1)[None])
        results.append([*contents(shard).values()])
    assert_same(results[1], results[0])
    assert results[1][0].isnan().sum() == 3, "0 x inf and nan"


def test_split_masters_at_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bfloat16 weights with remainders that only occur beside a weight that the user wrote: their masters, and
    their remainders after a step; ties, which are nudged. In large tiles: the interpreter's time is one of calls."""
    from sharded_lamb.kernels import triton_memory

    device = TritonKernel()._device
    for module in (device, triton_memory):
        monkeypatch.setattr(module, "TILE", device.tl.constexpr(256))
    monkeypatch.setattr(device, "HALVES", device.tl.constexpr((256, *device.HALVES.value[1:])))
    edges = torch.tensor([-0x8000, -0x7FFF, -1, 0, 1, 0x7FFF], dtype=SPLIT)
    model = torch.arange(-(2**15), 2**15, dtype=torch.int16).repeat(len(edges)).view(torch.bfloat16)
    table = table_of(1, torch.float32, False)
    for column in (name for name in COLUMNS if name not in ("eps_outside", "unbias2")):
        table[:, COLUMNS.index(column)] = 0
    results = []
    for kernel in (ReferenceKernel(), TritonKernel()):
        shard = made(Form(False, (len(model),), SPLIT, torch.bfloat16, *F32[2:]), 0, 0, False)
        assert isinstance(shard, ScatteredShard)
        assert shard.model is not None
        shard.model[0].copy_(model)
        shard.weight[0].copy_(edges.repeat_interleave(2**16))
        finite = model.isfinite()
        sums = torch.zeros(2, 1, dtype=torch.float64)
        kernel.moments_and_norms([shard], table, sums)
        kernel.apply([shard], table, torch.zeros(1)[None])
        memory = contents(shard)
        assert torch.equal(memory["model"][finite].view(torch.int16), model[finite].view(torch.int16))
        results.append([sums, memory["model"], memory["weight"]])
    assert_same(results[1], results[0])


def test_a_written_infinity_beside_a_remainder_is_infinite() -> None:
    shard = made(Form(False, (2,), SPLIT, torch.bfloat16, *F32[2:]), 0, 0, False)
    assert isinstance(shard, ScatteredShard)
    assert shard.model is not None
    shard.model[0].copy_(torch.tensor([math.inf, -math.inf]))
    shard.weight[0].copy_(torch.tensor([1, 0x7FFF]))
    sums = torch.zeros(2, 1, dtype=torch.float64)
    TritonKernel().moments_and_norms([shard], table_of(1, torch.float32, False), sums)
    assert sums[0, 0] == math.inf


def test_ties_are_nudged_as_in_the_reference() -> None:
    """w - u is a tie above an even weight in every second element."""
    results = []
    for kernel in (ReferenceKernel(), TritonKernel()):
        shard = made(Form(True, (512,), SPLIT, torch.bfloat16, *F32[2:]), 0, 0, False)
        assert isinstance(shard, FlatShard)
        assert shard.model is not None
        shard.weight.zero_()
        shard.model.copy_(torch.tensor([1.0, 1.0 + 2**-7]).repeat(256))
        shard.exp_avg.fill_(-(2.0**-8))
        shard.exp_avg_sq.fill_(1)
        table = torch.zeros(1, len(COLUMNS))
        for column in ("unbias1", "unbias2"):
            table[:, COLUMNS.index(column)] = 1
        kernel.apply([shard], table, torch.ones(1)[None])
        assert shard.weight[:2].tolist() == [0x7FFF, -0x8000]
        results.append([shard.weight, shard.model])
    assert_same(results[1], results[0])


def test_resync_of_masters_at_the_edges() -> None:
    """A nan in the model replaces its master; -0 equals 0; an infinity that the master rounds to is not a change."""
    masters = torch.tensor([1.0, 0.0, 1e5, 2.0, 1.00001])
    written = torch.tensor([math.nan, -0.0, math.inf, 3.0, 1.0], dtype=torch.float16)
    results = []
    for kernel in (ReferenceKernel(), TritonKernel()):
        shard = made(special(masters.tolist(), torch.float16), 0, 0, False)
        assert isinstance(shard, ScatteredShard)
        assert shard.model is not None
        shard.weight[0].copy_(masters)
        shard.model[0].copy_(written)
        sums = torch.zeros(2, 1, dtype=torch.float64)
        kernel.moments_and_norms([shard], table_of(1, torch.float32, False), sums)
        results.append([shard.weight[0]])
    assert_same(results[1], results[0])
    assert results[1][0].isnan().tolist() == [True, False, False, False, False]
    assert results[1][0][1:].tolist() == [0.0, 1e5, 3.0, masters[4].item()]


def test_memory_between_pieces_is_unchanged() -> None:
    shard = made(Form(False, (300, 1, 2049), *F32, gap=3), 0, 0, False)
    base = shard.weight[0]._base
    assert base is not None
    between = torch.ones(len(base), dtype=torch.bool)
    for at, length in ((3, 300), (306, 1), (310, 2049)):
        between[at : at + length] = False
    base[between] = 7.0
    kernel, table = TritonKernel(), table_of(3, torch.float32, False)
    kernel.moments_and_norms([shard], table, torch.zeros(2, 3, dtype=torch.float64))
    kernel.apply([shard], table, torch.ones(3)[None])
    assert (base[between] == 7.0).all()
    assert not (base[~between] == 7.0).any()


def test_nothing_to_do() -> None:
    """No pieces, and empty pieces; sums of parameters without a shard in the call are unchanged."""
    nothing = ScatteredShard((), [], [], [], [])
    empty = made(Form(False, (0, 0), *F32), 0, 0, False)
    kernel, table = TritonKernel(), table_of(3, torch.float32, False)
    sums = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    nonempty = made(Form(False, (5,), *F32), 1, 0, False)
    for shards in ([nothing], [empty], [nothing, empty]):
        before = sums.clone()
        kernel.square_sums(shards, sums[0])
        kernel.moments_and_norms(shards, table, sums)
        kernel.apply(shards, table, torch.ones(3)[None])
        assert torch.equal(sums, before)
    kernel.square_sums([nothing, empty, nonempty], sums[0])
    assert sums[:, [0, 2]].tolist() == [[1.0, 3.0], [4.0, 6.0]]
    assert sums[0, 1] > 2


@settings(max_examples=8)
@given(LENGTHS, st.sampled_from(FLOATS), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_average_has_the_bits_of_stock_operations(
    lengths: tuple[int, ...], wire: torch.dtype, weight: torch.dtype, add: bool
) -> None:
    """Any number of parts divided by 3; one of them is this rank's own, read in place."""
    form, ranks = Form(True, (*lengths, 5), weight, None, *F32[2:]), len(lengths)
    results = []
    for kernel in (TritonKernel(), ReferenceKernel()):
        shard = made(form, 0, 1, False)
        assert isinstance(shard, FlatShard)
        parts = torch.randn(ranks, len(shard.grad), generator=torch.Generator().manual_seed(2)).to(wire)
        sums = torch.full((len(lengths) + 1,), 0.5, dtype=torch.float64)
        segments = [Segment(len(lengths), 0, 5, len(shard.grad) - BLOCK)]
        own = LocalContribution(1, [torch.full((5,), 2.5)]) if ranks > 1 else None
        kernel.average(shard, segments, ReceivedShards(parts, 3, own), sums, add=add)
        results.append([shard.grad, sums])
    assert_same(results[0], results[1])


def test_a_parameter_in_several_shards_is_summed_in_the_order_of_the_call() -> None:
    """The first sum is so large that another order would round to other bits."""
    results = []
    for kernel in (ReferenceKernel(), TritonKernel()):
        shards = [made(Form(flat, (600,), *F32), 0, 9, False) for flat in (False, True, False)]
        shards[1].grad.mul_(1e-9)  # type: ignore[union-attr]
        sums = torch.full((1,), 1e17, dtype=torch.float64)
        kernel.square_sums(shards, sums)
        kernel.square_sums(shards[1:], sums)
        results.append([sums])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_over_many_blocks_are_accurate_and_deterministic(dtype: torch.dtype) -> None:
    counts = [0, 1, 32, 33, 20_000, 8192, 0]
    first = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand(2, sum(counts), generator=generator, dtype=torch.float64).exp().to(dtype)
    kernel, results = TritonKernel(), []
    for _ in range(2):
        sums = torch.full((2, len(counts)), 0.5, dtype=torch.float64)
        triton_kernel.launch(
            kernel._device.add_by_parameter,
            (len(counts), 2),
            blocks,
            first,
            sums,
            len(counts),
            blocks.shape[1],
        )
        results.append(sums)
    assert torch.equal(results[0], results[1])
    for plane in range(2):
        for param in range(len(counts)):
            exact = math.fsum([0.5, *blocks[plane, first[param] : first[param + 1]].tolist()])
            assert results[0][plane, param].item() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_has_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    everything = {"stage": 2, "max_grad_norm": 1.0, "state_dtype": torch.bfloat16}
    bits = (16, 8) if dtype == torch.bfloat16 else ()
    split = [{**everything, "store_param_remainders": number} for number in bits]
    for options in ({}, everything, *split):
        actual, expected = (
            trained(kernel, dtype, **options) for kernel in (TritonKernel(), ReferenceKernel())
        )
        assert_same(actual, expected)
