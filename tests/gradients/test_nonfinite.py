"""Non-finite gradients on any rank: every rank skips the step, counts it, and changes nothing."""

import pytest
import torch
from torch import Tensor

from sharded_lamb import ShardedLamb
from sharded_lamb.gradients.mixed import MixedGradients
from sharded_lamb.gradients.states import ReducerState
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.pairs import pairs

WORLD = 3
STAGES = pytest.mark.parametrize("stage", [1, 2])
Bits = dict[str, Tensor]


def everything(opt: ShardedLamb, params: dict[str, torch.nn.Parameter]) -> Bits:
    """Weights, moments, masters and step counts of this rank."""
    bits = training.copies(params)
    for name, p in params.items():
        for key, value in opt.state[p].items():
            bits[f"{name}/{key}"] = value.clone()
    return bits


def write_element(grads: dict[str, Tensor | None], name: str, value: float) -> None:
    grad = grads[name]
    assert grad is not None
    grad.view(-1)[-1] = value


def bad_step(
    rank: int, opt: ShardedLamb, params: dict[str, torch.nn.Parameter], stage: int, value: float
) -> None:
    """One non-finite element; in stage 1 on every rank, as after averaging, in stage 2 on rank 1 only."""
    grads = training.own_gradients(0 if stage == 1 else rank, 50)
    if stage == 1 or rank == 1:
        write_element(grads, "fc.weight", value)
    if stage == 1:
        training.give(params, grads)
    else:
        training.backward(params, grads)
    opt.step()
    opt.zero_grad()


def skip_once(rank: int, stage: int, value: float, dtype: torch.dtype) -> list[int]:
    params = training.parameters(dtype=dtype)
    opt = ShardedLamb(params.items(), lr=0.02, stage=stage, bucket_mb=0.004, max_grad_norm=1.0)
    training.train(opt, params, stage=stage, rank=rank, world=WORLD, steps=range(2))
    before, counts = everything(opt, params), [opt.skipped_steps]
    bad_step(rank, opt, params, stage, value)
    training.assert_same_bits(everything(opt, params), before)
    assert opt.trust_ratios() == {}
    counts.append(opt.skipped_steps)
    training.train(opt, params, stage=stage, rank=rank, world=WORLD, steps=[2])
    counts.append(opt.skipped_steps)
    if dtype == torch.float32:
        oracle = training.oracle_of_ranks(WORLD, range(3), lr=0.02, max_grad_norm=1.0)
        training.assert_follows(training.copies(params), oracle)
    return counts


@pairs(stage=[1, 2], value=[float("nan"), float("inf"), float("-inf")], dtype=[torch.float32, torch.bfloat16])
def test_one_bad_element_skips_the_step_on_every_rank(stage: int, value: float, dtype: torch.dtype) -> None:
    assert run_ranks(WORLD, skip_once, stage, value, dtype) == [[0, 1, 1]] * WORLD


def skip_the_first(rank: int, stage: int) -> None:
    params = training.parameters()
    opt = ShardedLamb(params.items(), stage=stage)
    before = everything(opt, params)
    bad_step(rank, opt, params, stage, float("inf"))
    training.assert_same_bits(everything(opt, params), before)


@STAGES
def test_the_very_first_step_may_be_skipped(stage: int) -> None:
    run_ranks(WORLD, skip_the_first, stage)


def skip_in_a_row(rank: int, stage: int, limit: int) -> None:
    """Bad, bad, good, then bad until the limit: the good step resets the count."""
    params = training.parameters()
    opt = ShardedLamb(params.items(), stage=stage, max_consecutive_skips=limit)
    for _ in range(limit - 1):
        bad_step(rank, opt, params, stage, float("nan"))
    training.train(opt, params, stage=stage, rank=rank, world=WORLD, steps=[0])
    for _ in range(limit):
        bad_step(rank, opt, params, stage, float("nan"))
    assert opt.skipped_steps == 2 * limit - 1
    try:
        bad_step(rank, opt, params, stage, float("nan"))  # raises one step late: no step waits for the device
    finally:
        if isinstance(opt._gradients, MixedGradients):  # no rank ends while another still receives from it
            assert opt._gradients.reducer.state is ReducerState.REDUCED


@STAGES
def test_too_many_in_a_row_are_an_error_on_every_rank(stage: int) -> None:
    for kind, message in run_ranks_expecting_errors(WORLD, skip_in_a_row, stage, 3, timeout=30).values():
        assert kind == "DivergedError"
        assert "3 steps in a row (5 in all)" in message
        assert "the first bad parameter of the last one is 'fc.weight'" in message
        assert "max_consecutive_skips=3" in message


def step_with_nan(rank: int, stage: int) -> tuple[Bits, int]:
    params = training.parameters()
    opt = ShardedLamb(params.items(), stage=stage, skip_nonfinite=False)
    bad_step(rank, opt, params, stage, float("nan"))
    return training.copies(params), opt.skipped_steps


@STAGES
def test_skip_nonfinite_false_applies_the_step(stage: int) -> None:
    for weights, skipped in run_ranks(WORLD, step_with_nan, stage):
        assert skipped == 0
        assert weights["fc.weight"][-1, -1].isnan()
        assert weights["embed.weight"].isfinite().all()
        assert not torch.equal(weights["embed.weight"], training.weights()["embed.weight"])


def large_but_finite(rank: int, stage: int) -> tuple[int, bool]:
    params = training.parameters()
    opt = ShardedLamb(params.items(), stage=stage)
    grads = {name: None if g is None else g * 1e15 for name, g in training.own_gradients(0, 0).items()}
    training.give(params, grads) if stage == 1 else training.backward(params, grads)
    opt.step()
    return opt.skipped_steps, all(bool(p.isfinite().all()) for p in params.values())


@STAGES
def test_large_finite_gradients_are_not_skipped(stage: int) -> None:
    assert run_ranks(WORLD, large_but_finite, stage) == [(0, True)] * WORLD
