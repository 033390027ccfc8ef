"""The kernel under DeepSpeed: selected, and compared between ranks, before the first update."""

import os

import pytest

from sharded_lamb.deepspeed.optimizer import logger
from sharded_lamb.kernels.choice import ENVIRONMENT
from tests.deepspeed import cases
from tests.harness import run_ranks, run_ranks_expecting_errors


def one_step(rank: int, stage: int, names: list[str]) -> str:
    """The line that the first rank logs at its first step."""
    os.environ[ENVIRONMENT] = names[rank]
    lines: list[str] = []
    logger.addFilter(lambda record: lines.append(record.getMessage()) or True)
    before = logger.level
    logger.setLevel("INFO")
    try:
        engine = cases.start(cases.config(stage, params=cases.LAMB))
        engine.backward(engine(cases.tokens(rank, 0)))
        engine.step()
        cases.stop(engine)
    finally:
        logger.setLevel(before)
        logger.filters.clear()
    return next((line for line in lines if "kernel" in line), "")


@pytest.mark.parametrize("stage", [0, 2])
def test_the_first_rank_logs_the_kernel(stage: int) -> None:
    first, other = run_ranks(2, one_step, stage, ["torch", "torch"], timeout=300)
    assert "kernel torch," in first
    assert other == ""


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("of_second", ["torch", "triton"])
def test_different_kernels_raise_on_every_rank(of_second: str, stage: int) -> None:
    """Replicas would diverge under ZeRO-0; and if one rank cannot load its kernel, the other must not wait."""
    errors = run_ranks_expecting_errors(2, one_step, stage, ["cpp", of_second], timeout=300)
    assert len(errors) == 2
    for _, message in errors.values():
        assert of_second in message
