"""The kernel for machines without a compiler equals the pure one up to rounding: all options, lengths and dtypes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharded_lamb.core.rule import COLUMNS
from sharded_lamb.kernels import FlatShard, ReferenceKernel, ScatteredShard, Shard, choice, fused, remainders
from sharded_lamb.kernels.fused import CHUNK, CROWD, SHORT, FusedKernel
from tests import training
from tests.harness import run_ranks
from tests.kernels.kernel_memory import in_whole_gradients
from tests.kernels.test_kernels import BF16, DTYPES, F16, F32, F64, Dtypes, flat_shard, memory_of, piece_shard

TOLERANCE = 6e-6
LENGTHS = st.lists(
    st.sampled_from([1, 255, 256, 257, 700, SHORT, SHORT + 1, 5000]), min_size=1, max_size=CROWD + 4
)
SEEDS = st.integers(0, 2**20)
FULL = Dtypes(F32, None, F32, F32)

PLAIN = {
    **dict.fromkeys(COLUMNS, 0.0),
    **{"grad_scale": 1, "beta1": 0.9, "c1": 0.1, "beta2": 0.999, "c2": 0.001},
    **{"unbias1": 1 / (1 - 0.9**3), "unbias2": 1 / (1 - 0.999**3), "eps_outside": 1e-6, "decay": 0.01},
}
STILL = {"grad_scale": 0, "beta1": 1, "c1": 0, "beta2": 1, "c2": 0}
EXPRESSIBLE: dict[str, dict[str, float]] = {
    "plain": {},
    "clipped": {"grad_scale": 0.3},
    "no gradient": {"grad_scale": 0, "l2": 0.1},
    "L2": {"l2": 0.1, "decay": 0},
    "inactive": STILL,
    "uncorrected": {"unbias1": 1, "unbias2": 1},
    "late": {"unbias1": 1, "unbias2": 1 / (1 - 0.999**5000)},
    "no momentum": {"beta1": 0, "c1": 1, "unbias1": 1},
    "long memory": {"beta1": 0.99, "c1": 0.01, "beta2": 0.99999, "c2": 0.00001, "unbias2": 1 / 0.00003},
    "large epsilon and decay": {"eps_outside": 0.1, "decay": 1},
}
OTHERS: dict[str, dict[str, float]] = {
    "gradients are not averaged": {"c1": 1},
    "epsilon inside": {"eps_inside": 1e-3, "eps_outside": 0},
    "neither": {"c1": 1, "eps_inside": 1e-3},
}
OPTIONS = {**EXPRESSIBLE, **OTHERS}


def table_of(names: Sequence[str]) -> Tensor:
    return torch.tensor([[{**PLAIN, **OPTIONS[name]}[column] for column in COLUMNS] for name in names])


def assert_near(value: Tensor, expected: Tensor, scale: float) -> None:
    """Equal in norm, to `TOLERANCE` of ``scale``."""
    assert value.dtype == expected.dtype
    assert float((value.double() - expected.double()).norm()) <= TOLERANCE * scale


def assert_sums_near(sums: Tensor, expected: Tensor, table: Tensor) -> None:
    """Per parameter, ‖w‖ relative to itself, and ‖u‖ relative to the norms of its two terms."""
    (weight, update), (other_weight, other_update) = sums.sqrt(), expected.sqrt()
    decay = table[:, COLUMNS.index("decay")].double()
    for param in range(len(table)):
        assert_near(weight[param], other_weight[param], float(other_weight[param]))
        scale = other_update[param] + 2 * decay[param] * other_weight[param]
        assert_near(update[param], other_update[param], float(scale))


def compare_steps(actual: Shard, reference: Shard, table: Tensor, step_sizes: Tensor) -> None:
    """Compare both passes of both kernels, each pass on equal memory."""
    kernel, pure = FusedKernel(), ReferenceKernel()
    table, step_sizes = table.to(actual.compute), step_sizes.to(actual.compute)
    before = [w.clone().double() for w in numbers_of(actual)]
    results = []
    for each, shard in ((kernel, actual), (pure, reference)):
        squares, sums = torch.zeros(len(table), dtype=F64), torch.zeros(2, len(table), dtype=F64)
        each.square_sums([shard], squares)
        each.moments_and_norms([shard], table, sums)
        results.append((squares, sums))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=TOLERANCE, atol=0)
    assert_sums_near(results[0][1], results[1][1], table)
    moments = [value.clone() for value in memory_of(actual)]
    kernel.apply([actual], table, step_sizes)
    pure.apply([reference], table, step_sizes)
    unmoved = [*moved_by_pass_1(actual)]
    assert all(torch.equal(value, moments[i]) for i, value in unmoved)
    for value, expected, old in zip(numbers_of(actual), numbers_of(reference), before, strict=True):
        # A 16-bit copy is rounded from fp32 values that differ by an ulp: sometimes to another value.
        exact = torch.finfo(value.dtype).bits >= 32
        assert_near(
            value,
            expected,
            float(expected.double().norm() + old.norm()) * (1 if exact else 2**-8 / TOLERANCE),
        )


def numbers_of(shard: Shard) -> list[Tensor]:
    """`memory_of`, with masters instead of remainders."""
    numbers = memory_of(shard)
    if shard.master_format.beside_weight:
        size = 1 if isinstance(shard, FlatShard) else len(shard.params)
        numbers[:size] = [remainders.joined(numbers[size + i], numbers[i]) for i in range(size)]
    return numbers


def moved_by_pass_1(shard: Shard) -> list[tuple[int, Tensor]]:
    """Gradients and moments, with their indices in `memory_of`."""
    size = 1 if isinstance(shard, FlatShard) else len(shard.params)
    kinds = 1 if shard.model is None else 2
    return [(i, value) for i, value in enumerate(memory_of(shard)) if i >= kinds * size]


@pytest.mark.parametrize("make", [flat_shard, piece_shard])
@settings(max_examples=60)
@given(
    LENGTHS,
    DTYPES
    | st.just(FULL)
    | st.builds(
        Dtypes,
        st.sampled_from([F32, remainders.RemainderFormat.storage]),
        st.just(BF16),
        st.just(BF16),
        st.just(F32),
    ),
    SEEDS,
    st.data(),
)
def test_a_step_is_the_pure_one_to_rounding(
    make: Callable[..., Shard], lengths: list[int], dtypes: Dtypes, seed: int, data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from([*OPTIONS]), min_size=len(lengths), max_size=len(lengths)))
    actual, reference = make(lengths, dtypes, seed), make(lengths, dtypes, seed)
    compare_steps(actual, reference, table_of(names), torch.linspace(0, 0.9, len(lengths)))


@pytest.mark.parametrize("make", [flat_shard, piece_shard])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("step_size", [1e-5, 0.01, 1.0])
def test_every_option_on_more_than_a_chunk(make: Callable[..., Shard], name: str, step_size: float) -> None:
    dtypes = Dtypes(F32, F16, F32, F32)
    lengths = [CHUNK + 5000, 300]
    actual, reference = make(lengths, dtypes, 1), make(lengths, dtypes, 1)
    compare_steps(actual, reference, table_of([name, name]), torch.tensor([step_size, step_size]))


@pytest.mark.parametrize("name", EXPRESSIBLE)
@pytest.mark.parametrize("make", [flat_shard, piece_shard])
@pytest.mark.parametrize("weight", [F32, remainders.RemainderFormat.storage])
def test_expressible_options_use_the_fused_call(
    weight: torch.dtype, make: Callable[..., Shard], name: str
) -> None:
    """Without it the tests above would compare the reference with itself."""
    kernel = FusedKernel()
    reference = kernel._reference = mock.Mock()
    shard, table = make([5000, 3, 700], Dtypes(weight, BF16, BF16, F32), 0), table_of([name] * 3)
    kernel.square_sums([shard], torch.zeros(3, dtype=F64))
    kernel.moments_and_norms([shard], table, torch.zeros(2, 3, dtype=F64))
    kernel.apply([shard], table, torch.full((3,), 0.1))
    assert reference.mock_calls == []


@pytest.mark.parametrize("make", [flat_shard, piece_shard])
def test_crowds_of_short_runs_go_to_the_reference(make: Callable[..., Shard]) -> None:
    """With a call per tensor, ten thousand small tensors would be slower than the reference."""
    shard, received = make([5000, *[300] * CROWD, 5000], FULL, 0), []

    class Recorder(ReferenceKernel):
        def square_sums(self, shards: Sequence[Shard], sums: Tensor) -> None:
            received.extend(shards)

    kernel = FusedKernel()
    kernel._reference = Recorder()
    kernel.square_sums([shard], torch.zeros(CROWD + 2, dtype=F64))
    (crowd,) = received
    if isinstance(crowd, ScatteredShard):
        assert crowd.params == tuple(range(1, CROWD + 1))
    else:
        assert crowd.block_param.unique().tolist() == list(range(1, CROWD + 1))


def test_moments_of_any_size_keep_their_bits_in_pass_2() -> None:
    shard = flat_shard([5000], FULL, 0)
    shard.exp_avg.mul_(torch.logspace(-40, 30, len(shard.exp_avg)))
    shard.exp_avg_sq.mul_(torch.logspace(30, -40, len(shard.exp_avg)))
    moments = shard.exp_avg.clone(), shard.exp_avg_sq.clone()
    FusedKernel().apply([shard], table_of(["plain"]), torch.tensor([0.1]))
    assert torch.equal(shard.exp_avg, moments[0])
    assert torch.equal(shard.exp_avg_sq, moments[1])


@pytest.mark.parametrize("value", [0.1, 0.1234, 1.7])
def test_norms_of_equal_elements_are_exact(value: float) -> None:
    """All partial sums round the same way: a sequential sum is off by 1e-5."""
    shard = flat_shard([CHUNK], FULL, 0)
    shard.weight.fill_(value)
    sums = torch.zeros(2, 1, dtype=F64)
    FusedKernel().moments_and_norms([shard], table_of(["plain"]), sums)
    assert float(sums[0, 0]) == pytest.approx(CHUNK * float(torch.tensor(value).double()) ** 2, rel=1e-6)


def test_a_small_decay_is_not_rounded_as_a_factor() -> None:
    """1 - 1.5e-7 is 1 - 1.8e-7 in fp32: a fifth too much decay."""
    shard = flat_shard([CHUNK], FULL, 0)
    shard.weight.copy_(1 + torch.rand(CHUNK, generator=torch.Generator().manual_seed(0)))
    before = shard.weight.double()
    shard.exp_avg.zero_()
    for _ in range(10):
        FusedKernel().apply([shard], table_of(["plain"]), torch.tensor([1.5e-5]))
    assert float((before - shard.weight.double()).sum() / before.sum()) == pytest.approx(10 * 1.5e-7, rel=0.1)


def test_a_decay_after_the_call_leaves_the_rest_of_the_update() -> None:
    """With weights of 0 only the rest is left."""
    shards = [flat_shard([5000], FULL, 0) for _ in range(2)]
    for kernel, shard in zip((FusedKernel(), ReferenceKernel()), shards, strict=True):
        shard.weight.zero_()
        kernel.apply([shard], table_of(["plain"]), torch.tensor([fused.LARGE / 0.011]))
    torch.testing.assert_close(shards[0].weight, shards[1].weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["inactive", "no gradient"])
def test_non_finite_gradients_with_scale_0_are_not_used(name: str) -> None:
    shard, sums = flat_shard([5000], FULL, 0), torch.zeros(2, 1, dtype=F64)
    shard.grad[7], shard.grad[512] = torch.nan, torch.inf
    squares = torch.zeros(1, dtype=F64)
    kernel = FusedKernel()
    kernel.square_sums([shard], squares)
    assert not squares.isfinite().any()
    kernel.moments_and_norms([shard], table_of([name]), sums)
    assert sums.isfinite().all()
    assert all(value.isfinite().all() for value in (shard.weight, shard.exp_avg, shard.exp_avg_sq))


def test_a_weight_that_must_not_move_keeps_its_bits() -> None:
    shard, sums = flat_shard([5000], FULL, 0), torch.zeros(2, 1, dtype=F64)
    expected = [value.clone() for value in memory_of(shard)]
    FusedKernel().moments_and_norms([shard], table_of(["inactive"]), sums)
    shard.exp_avg[3] = expected[2][3] = torch.inf
    FusedKernel().apply([shard], table_of(["inactive"]), torch.zeros(1))
    assert all(torch.equal(a, b) for a, b in zip(memory_of(shard), expected, strict=True))


@given(st.lists(st.sampled_from([1, 256, SHORT, SHORT + 1, 5000]), min_size=1, max_size=12), SEEDS)
@example([5000, CHUNK + 300, 3], 0)
def test_gradients_are_squared_in_place(lengths: list[int], seed: int) -> None:
    """A piece may start inside its gradient."""
    flat, generator = flat_shard(lengths, FULL, seed), torch.Generator().manual_seed(seed)
    pieces = [[kind[:length] for length in lengths] for kind in (flat.weight, flat.exp_avg, flat.exp_avg_sq)]
    grads = [torch.randn(length, generator=generator) for length in lengths]
    bare = ScatteredShard(tuple(range(len(lengths))), pieces[0], grads, *pieces[1:])
    sums = torch.zeros(len(lengths), dtype=F64)
    FusedKernel().square_sums([in_whole_gradients(bare)], sums)
    squares = torch.stack([grad.double().square().sum() for grad in grads])
    torch.testing.assert_close(sums, squares, rtol=TOLERANCE, atol=0)


# -- whole steps ----------------------------------------------------------------------------------------------

RUNS: dict[str, Mapping[str, Any]] = {
    "defaults": {},
    "clipped, L2": {"max_grad_norm": 0.5, "adam_w_mode": False},
    "not averaged, epsilon inside": {"grad_averaging": False, "eps_inside_sqrt": True},
    "strong decay": {"weight_decay": 0.3, "bias_correction": False, "lr": 0.01},
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_ten_steps_follow_the_oracle(options: Mapping[str, Any], stage: int) -> None:
    for world in (1, 3):
        oracle = training.oracle_of_ranks(world, range(10), **options)
        results = run_ranks(world, _ten_steps, world, stage, dict(options))
        for weights, _ in results:
            training.assert_follows(weights, oracle, TOLERANCE)


def _ten_steps(rank: int, world: int, stage: int, options: dict[str, Any]) -> Any:
    return training.run(rank, world, stage, {**options, "kernel": "fused"}, steps=10)


def test_it_is_the_default_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_why_no_cpp", lambda: "no compiler")
    monkeypatch.delenv(choice.ENVIRONMENT, raising=False)
    assert choice.choose("auto", choice.CPU).name == fused.FusedKernel.name
    assert choice.why_not("fused", torch.device("meta")) == "it is for CPUs"
