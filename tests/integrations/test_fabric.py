"""Fabric on two ranks: DDP (stage 1), ShardedLambFabricStrategy (stage 2), ModelParallelStrategy (FSDP2)."""

from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.integrations import cases
from tests.training import assert_follows, assert_same_bits

HOWS = ("ddp", "sharded", "fsdp2")


def case(rank: int, name: str, *args: Any, **options: Any) -> Any:
    from tests.integrations import fabric_cases  # imports Lightning, which ranks are forked with

    return getattr(fabric_cases, name)(rank, *args, **options)


def check(how: str, batches: int, expected: Any, **options: Any) -> None:
    results = run_ranks(cases.WORLD, case, "fit", how, batches, **options)
    assert_same_bits(results[0], results[1])
    assert_follows(results[0], expected)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trains_as_lamb_over_the_global_batch(how: str, precision: str) -> None:
    expected = cases.oracle(cases.data(4), range(4), lr_of=lambda step: 0.5**step)
    check(how, 4, expected, precision=precision, scheduled=True)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clips_the_norm_over_ranks(how: str, precision: str) -> None:
    expected = cases.oracle(cases.data(4), range(4), max_grad_norm=0.5)
    check(how, 4, expected, precision=precision, clip=0.5)


@pytest.mark.parametrize("how", ["ddp", "sharded"])
@pytest.mark.parametrize("clip", [0.5, None])
def test_grad_scaler_unscales_before_clipping_and_skips_on_infinity(how: str, clip: float | None) -> None:
    expected = cases.oracle(cases.data(4), (0, 1, 3), max_grad_norm=clip)
    check(how, 4, expected, precision="16-mixed", clip=clip, overflowing=2)


@pytest.mark.parametrize("how", HOWS)
def test_accumulates(how: str) -> None:
    expected = cases.oracle(cases.data(6), range(3), batches=2, max_grad_norm=0.5)
    check(how, 6, expected, accumulate=2, clip=0.5)


def test_no_backward_sync_sends_nothing() -> None:
    for calls in run_ranks(cases.WORLD, case, "sends_while_accumulating"):
        assert not any(calls.values())


@pytest.mark.parametrize("how", HOWS)
def test_resumes_to_the_same_bits(tmp_path: Path, how: str) -> None:
    run_ranks(cases.WORLD, case, "resumed", tmp_path, how, "32-true")


@pytest.mark.parametrize("how", ["ddp", "sharded"])
def test_resumes_with_grad_scaler(tmp_path: Path, how: str) -> None:
    run_ranks(cases.WORLD, case, "resumed", tmp_path, how, "16-mixed")


def test_ranks_start_from_the_first_ones_module() -> None:
    first, second = run_ranks(cases.WORLD, case, "parted")
    assert_same_bits(first, second)
    assert first["seen"] == 0


def test_an_optimizer_that_does_not_reduce_gradients_is_refused() -> None:
    for message in run_ranks(cases.WORLD, case, "refused"):
        assert "reduces no gradients and got SGD" in message
