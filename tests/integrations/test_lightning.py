"""Lightning's Trainer on two ranks: DDP (stage 1), ShardedLambStrategy (stage 2), ModelParallelStrategy (FSDP2)."""

from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.integrations import cases
from tests.training import assert_follows, assert_same_bits

HOWS = ("ddp", "sharded", "fsdp2")


def case(rank: int, name: str, *args: Any, **options: Any) -> Any:
    from tests.integrations import lightning_cases  # imports Lightning, which ranks are forked with

    return getattr(lightning_cases, name)(rank, *args, **options)


def check(tmp_path: Path, how: str, batches: int, expected: Any, **options: Any) -> None:
    results = run_ranks(cases.WORLD, case, "fit", tmp_path, how, batches, **options)
    assert_same_bits(results[0], results[1])
    assert_follows(results[0], expected)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trains_as_lamb_over_the_global_batch(tmp_path: Path, how: str, precision: str) -> None:
    expected = cases.oracle(cases.data(4), range(4), lr_of=lambda step: 0.5**step)
    check(tmp_path, how, 4, expected, precision=precision, scheduled=True)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clips_the_norm_over_ranks(tmp_path: Path, how: str, precision: str) -> None:
    expected = cases.oracle(cases.data(4), range(4), max_grad_norm=0.5)
    check(tmp_path, how, 4, expected, precision=precision, clip=0.5)


@pytest.mark.parametrize("how", ["ddp", "sharded"])
def test_grad_scaler_unscales_before_clipping_and_skips_on_infinity(tmp_path: Path, how: str) -> None:
    expected = cases.oracle(cases.data(4), (0, 1, 3), max_grad_norm=0.5)
    check(tmp_path, how, 4, expected, precision="16-mixed", clip=0.5, overflowing=2)


def test_stage_2_refuses_to_clip_values(tmp_path: Path) -> None:
    options = {"clip": 0.5, "gradient_clip_algorithm": "value"}
    errors = run_ranks_expecting_errors(cases.WORLD, case, "fit", tmp_path, "sharded", 2, **options)
    assert {kind for kind, _ in errors.values()} == {"RuntimeError"}
    assert all("stage=1" in message for _, message in errors.values())


@pytest.mark.parametrize("how", HOWS)
def test_accumulates(tmp_path: Path, how: str) -> None:
    expected = cases.oracle(cases.data(6), range(3), batches=2, max_grad_norm=0.5)
    check(tmp_path, how, 6, expected, accumulate_grad_batches=2, clip=0.5)


def test_accumulation_reduces_once_a_step(tmp_path: Path) -> None:
    each, once = (run_ranks(cases.WORLD, case, "reductions", tmp_path, batches)[0] for batches in (1, 4))
    assert each == 4 * once > 0


@pytest.mark.parametrize("how", HOWS)
def test_manual_optimization(tmp_path: Path, how: str) -> None:
    expected = cases.oracle(cases.data(6), range(3), batches=2, max_grad_norm=0.5)
    check(tmp_path, how, 6, expected, manual=True, clip=0.5)


@pytest.mark.parametrize("how", [*HOWS, "fsdp2, one file"])
def test_resumes_from_a_model_checkpoint_to_the_same_bits(tmp_path: Path, how: str) -> None:
    run_ranks(cases.WORLD, case, "resumed", tmp_path, how, "32-true")


@pytest.mark.parametrize("how", ["ddp", "sharded"])
def test_resumes_with_grad_scaler(tmp_path: Path, how: str) -> None:
    run_ranks(cases.WORLD, case, "resumed", tmp_path, how, "16-mixed")


@pytest.mark.parametrize("how", HOWS)
def test_fits_twice(tmp_path: Path, how: str) -> None:
    run_ranks(cases.WORLD, case, "fitted_twice", tmp_path, how)


def test_ranks_start_from_the_first_ones_module(tmp_path: Path) -> None:
    first, second = run_ranks(cases.WORLD, case, "parted", tmp_path)
    assert_same_bits(first, second)
    assert first["seen"] == 0


@pytest.mark.parametrize(("optimizer", "given"), [("SGD", "SGD"), ("stage 1", "ShardedLamb(stage=1)")])
def test_an_optimizer_that_does_not_reduce_gradients_is_refused(
    tmp_path: Path, optimizer: str, given: str
) -> None:
    for message in run_ranks(cases.WORLD, case, "refused", tmp_path, optimizer):
        assert f"reduces no gradients and got {given}" in message
