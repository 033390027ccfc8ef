"""``opt.zero_grad(set_to_none=False)`` in stage 2: gradients that exist become 0, and the next step uses them.

The oracle is `Lamb` with the gradients' averages over ranks, in ``.grad`` of its own.
"""

import contextlib
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.sharding.param_store import ParamStore
from tests import training
from tests.harness import run_ranks
from tests.pairs import pairs

ALL, FIRST, OTHERS = [*training.SHAPES], ["embed.weight", "fc.bias"], ["norm.weight", "fc.weight", "scale"]
Op = tuple[str, Any]
ZERO, STEP = ("zero", None), ("step", None)

# ("backward" or "no_sync", names that it reaches, by rank: the last ones count for all further ranks)
PROGRAMS: dict[str, list[Op]] = {
    "after a step": [("backward", [ALL]), STEP, ZERO, ("backward", [FIRST]), STEP],
    "before the first backward": [ZERO, ("backward", [FIRST]), STEP, ZERO, ("backward", [OTHERS]), STEP],
    "without a backward": [("backward", [ALL]), STEP, ZERO, STEP, ZERO, ZERO, STEP],
    "before the step": [("backward", [ALL]), ZERO, ("backward", [FIRST]), ("backward", [OTHERS]), STEP],
    "accumulated": [("backward", [FIRST]), STEP, ZERO, *[("backward", [OTHERS])] * 2, STEP, ZERO, STEP],
    "reached on one rank only": [
        ("backward", [FIRST, OTHERS]),
        STEP,
        ZERO,
        ("backward", [OTHERS, ["empty"]]),
        STEP,
    ],
    "without a step": [("backward", [ALL]), ZERO, STEP, ("backward", [FIRST]), STEP],
    "in no_sync": [("no_sync", [FIRST]), ZERO, ("backward", [OTHERS]), STEP],
    "added in no_sync": [
        ("backward", [FIRST]),
        ("no_sync", [FIRST, OTHERS]),
        ZERO,
        ("backward", [OTHERS]),
        STEP,
    ],
    "before no_sync": [("backward", [ALL]), STEP, ZERO, ("no_sync", [FIRST]), ("backward", [OTHERS]), STEP],
    "removed then": [("backward", [ALL]), STEP, ZERO, ("remove", FIRST), ("backward", [OTHERS]), STEP],
    "removed before": [("backward", [ALL]), ("remove", FIRST), ZERO, ("backward", [OTHERS]), STEP],
    "assigned then": [("backward", [ALL]), STEP, ZERO, ("assign", FIRST), STEP],
    "assigned before": [("backward", [ALL]), STEP, ("assign", FIRST), ZERO, ("backward", [OTHERS]), STEP],
    "scaled before": [("backward", [ALL]), ("scale", FIRST), ZERO, ("backward", [OTHERS]), STEP],
    "clipped before": [("backward", [ALL]), ("clip", 0.1), ZERO, ("backward", [OTHERS]), STEP],
    "with set_to_none=True": [("backward", [ALL]), STEP, ZERO, ("none", None), ("backward", [OTHERS]), STEP],
    "not finite": [
        ("backward", [ALL]),
        ("scale", FIRST, torch.inf),
        STEP,
        ZERO,
        ("backward", [OTHERS]),
        STEP,
    ],
}


def reached(names: Sequence[list[str]], rank: int, key: int) -> dict[str, Tensor | None]:
    grads = training.own_gradients(rank, key)
    return {name: grads[name] for name in names[min(rank, len(names) - 1)]}


def run(
    rank: int, program: list[Op], world: int, *, is_oracle: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and step counts after ``program``; ``is_oracle``: `Lamb`'s, of all ranks."""
    params = training.parameters()
    opt: Any = (
        Lamb(params.items(), lr=0.02)
        if is_oracle
        else ShardedLamb(params.items(), lr=0.02, stage=2, bucket_mb=0.002)
    )
    for key, (kind, given, *more) in enumerate(program):
        if kind in ("backward", "no_sync"):
            if is_oracle:
                average = training.average(reached(given, r, key) for r in range(world))
                training.backward(params, {n: None if g is None else g.float() for n, g in average.items()})
            else:
                with opt.no_sync() if kind == "no_sync" else contextlib.nullcontext():
                    training.backward(params, reached(given, rank, key))
        elif kind == "step":
            opt.step()
        elif kind in ("zero", "none"):
            opt.zero_grad(set_to_none=kind == "none")
        elif kind == "clip" and not is_oracle:
            opt.clip_grad_norm_(given)
        for name in given if kind in ("remove", "assign", "scale") else ():
            grad = params[name].grad
            if kind == "scale":
                assert grad is not None
                grad.mul_(*(more or [3.0])) if not is_oracle else None
            else:
                params[name].grad = (
                    None if kind == "remove" else training.draw(training.SHAPES[name], "assigned")
                )
    return training.copies(params), {name: float(opt.state[p].get("step", 0)) for name, p in params.items()}


@pairs(program=[*PROGRAMS], world=[1, 2, 3])
def test_gradients_that_exist_become_zero(program: str, world: int) -> None:
    ops = PROGRAMS[program]
    # The oracle has no step that is skipped.
    of_oracle = [ops[0], *[("nothing", None)] * 2, *ops[3:]] if program == "not finite" else ops
    weights, steps = run(0, of_oracle, world, is_oracle=True)
    for ours, counts in run_ranks(world, run_sharded, ops, world):
        assert counts == steps
        for name, w in weights.items():
            torch.testing.assert_close(ours[name], w, rtol=1e-5, atol=1e-6)


def run_sharded(rank: int, program: list[Op], world: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    return run(rank, program, world, is_oracle=False)


def handles_after_zeroing(rank: int) -> list[tuple[bool, float]]:
    """Whether ``.grad`` stays the same object, and its norm."""
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=0.02, stage=2, bucket_mb=0.002)
    training.backward(params, reached([FIRST, OTHERS], rank, 0))
    opt.step()
    before = {name: p.grad for name, p in params.items()}
    opt.zero_grad(set_to_none=False)
    assert params["norm.bias"].grad is None
    seen = []
    for name in [*FIRST, *OTHERS]:
        grad = params[name].grad
        assert grad is not None
        seen.append((grad is before[name], float(grad.norm())))
    return seen


def test_handles_stay_and_their_norm_is_zero() -> None:
    for seen in run_ranks(2, handles_after_zeroing):
        assert seen == [(True, 0.0)] * 5


def zero_and_move(rank: int, moves: bool) -> dict[str, Tensor]:
    params = training.parameters()
    opt = ShardedLamb(params.items(), lr=0.02, stage=2, bucket_mb=0.002)
    training.backward(params, training.own_gradients(rank, 0))
    opt.step()
    if moves:
        old = opt._store
        for p in params.values():
            p.data = p.data.clone()
        with mock.patch.object(ParamStore, "has_moved", property(lambda store: store is old)):
            opt.zero_grad(set_to_none=False)
        assert opt._store is not old
    else:
        opt.zero_grad(set_to_none=False)
    training.backward(params, reached([FIRST], rank, 1))
    opt.step()
    return training.copies(params)


@pytest.mark.parametrize("world", [1, 2])
def test_a_moved_model_has_gradients_of_zero(world: int) -> None:
    for moved, stayed in zip(
        run_ranks(world, zero_and_move, True), run_ranks(world, zero_and_move, False), strict=True
    ):
        training.assert_same_bits(moved, stayed)
