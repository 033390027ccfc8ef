"""Whole state tensors: from any number of ranks to any other, and to and from `Lamb`."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors

Params = dict[str, Parameter]


def train_and_gather(
    rank: int, world: int, stage: int, dtype: torch.dtype, steps: int, gradient_ranks: int
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    params = training.parameters(dtype=dtype)
    opt = training.grouped(params, stage)
    training.train(opt, params, stage=stage, rank=rank, world=gradient_ranks, steps=range(steps))
    return training.copies(params), opt.full_state_dict()


def load_and_resume(
    rank: int, stage: int, values: dict[str, Tensor], full: dict[str, Any], steps: range, gradient_ranks: int
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    params = {name: Parameter(value) for name, value in values.items()}
    opt = training.grouped(params, stage, lr=0.9)
    opt.load_full_state_dict(full if rank == 0 else None)
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.01]
    training.train(opt, params, stage=stage, rank=rank, world=gradient_ranks, steps=steps)
    return training.copies(params), opt.full_state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("saved_at", "loaded_at"), [(3, 2), (3, 1), (1, 3)])
def test_full_state_resumes_at_another_world_size(saved_at: int, loaded_at: int, dtype: torch.dtype) -> None:
    """Stage 1 on the same averaged gradients: bit-equal to the uninterrupted run."""
    uninterrupted = run_ranks(saved_at, train_and_gather, saved_at, 1, dtype, 5, 3)[0]
    results = run_ranks(saved_at, train_and_gather, saved_at, 1, dtype, 2, 3)
    assert [full is None for _, full in results] == [False] + [True] * (saved_at - 1)
    values, full = results[0]
    assert full is not None
    resumed = run_ranks(loaded_at, load_and_resume, 1, values, training.through_bytes(full), range(2, 5), 3)
    for weights, _ in resumed:
        training.assert_same_bits(weights, uninterrupted[0])
    assert resumed[0][1] is not None
    assert uninterrupted[1] is not None
    for param, entry in uninterrupted[1]["state"].items():
        training.assert_same_bits(resumed[0][1]["state"][param], entry)
    assert resumed[0][1]["param_groups"] == uninterrupted[1]["param_groups"]


def test_full_state_resumes_in_the_other_stage() -> None:
    oracle = training.oracle_of_ranks(
        2,
        range(4),
        lr=0.02,
        max_grad_norm=5.0,
        overrides={
            name: {"weight_decay": 0.2} if i < 3 else {"lr": 0.01} for i, name in enumerate(training.SHAPES)
        },
    )
    for first, then in ((1, 2), (2, 1)):
        values, full = run_ranks(2, train_and_gather, 2, first, torch.float32, 2, 2)[0]
        assert full is not None
        for weights, _ in run_ranks(2, load_and_resume, then, values, full, range(2, 4), 2):
            training.assert_follows(weights, oracle)


def lamb_over(params: Params) -> Lamb:
    named = list(params.items())
    groups = [{"params": named[:3], "weight_decay": 0.2}, {"params": named[3:], "lr": 0.01}]
    return Lamb(groups, lr=0.02, max_grad_norm=5.0)


def train_lamb(opt: Lamb, params: Params, steps: range) -> None:
    for step in steps:
        training.give(params, training.average(training.own_gradients(r, step) for r in range(3)))
        opt.step()


def assert_close(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        gap, size = (value - expected[name]).norm().item(), expected[name].norm().item()
        assert gap <= 1e-6 * size, name


def test_full_state_loads_into_lamb() -> None:
    params = training.parameters()
    reference = lamb_over(params)
    train_lamb(reference, params, range(5))
    values, full = run_ranks(3, train_and_gather, 3, 1, torch.float32, 2, 3)[0]
    assert full is not None
    loaded = {name: Parameter(value) for name, value in values.items()}
    opt = lamb_over(loaded)
    opt.load_state_dict(training.through_bytes(full))
    assert [entry["step"].item() for entry in opt.state_dict()["state"].values()] == [2.0] * len(params)
    train_lamb(opt, loaded, range(2, 5))
    assert_close(training.copies(loaded), training.copies(params))


def test_lambs_state_loads_into_sharded_lamb() -> None:
    params = training.parameters()
    reference = lamb_over(params)
    train_lamb(reference, params, range(2))
    state, values = training.through_bytes(reference.state_dict()), training.copies(params)
    train_lamb(reference, params, range(2, 5))
    for weights, _ in run_ranks(2, load_and_resume, 1, values, state, range(2, 5), 3):
        assert_close(weights, training.copies(params))


def test_a_parameter_without_saved_state_starts_anew() -> None:
    """`Lamb` saves no state of a parameter that it never updated; loading must clear the sharded optimizer's."""
    params, sharded_params = training.parameters(), training.parameters()
    lamb, sharded = Lamb(params.items(), lr=0.02), ShardedLamb(sharded_params.items(), lr=0.02)
    grads = training.own_gradients(0, 0)
    training.give(sharded_params, grads)
    sharded.step()
    training.give(params, {**grads, "fc.weight": None})
    lamb.step()
    sharded.load_full_state_dict(lamb.state_dict())
    entry = sharded.state[sharded_params["fc.weight"]]
    assert entry["step"].item() == 0
    assert not entry["exp_avg"].any()
    assert not entry["exp_avg_sq"].any()
    assert sharded.state[sharded_params["scale"]]["step"].item() == 1


def load_bad_full_state(rank: int, spoil: str, full: dict[str, Any]) -> None:
    params = training.parameters()
    opt = training.grouped(params, 1)
    bad = copy.deepcopy(full)
    if spoil == "shape":
        bad["state"][0]["exp_avg_sq"] = torch.zeros(3)
    elif spoil == "groups":
        bad["param_groups"].pop()
    elif spoil == "option":
        bad["param_groups"][0]["eps"] = -1.0
    elif spoil == "no step":
        del bad["state"][3]["step"]
    elif spoil == "unexpected":
        bad["state"][99] = bad["state"].pop(0)
    elif spoil == "empty":
        bad = {}
    before = training.bits_of(opt, params)
    try:
        opt.load_full_state_dict(bad if rank == 0 and spoil != "nothing" else None)
    finally:
        training.assert_same_bits(training.bits_of(opt, params), before)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("shape", "exp_avg_sq of 'embed.weight'"),
        ("groups", "parameter groups of [3]"),
        ("option", "eps must be a finite number > 0"),
        ("nothing", "needs the state dict on the first rank, got None"),
        ("no step", "step"),
        ("unexpected", "99"),
        ("empty", "param_groups"),
    ],
)
def test_a_bad_full_state_is_an_error_on_every_rank(spoil: str, why: str) -> None:
    full = run_ranks(2, train_and_gather, 2, 1, torch.float32, 2, 2)[0][1]
    errors = run_ranks_expecting_errors(2, load_bad_full_state, spoil, full, timeout=15)
    for kind, message in errors.values():
        assert kind == "ValueError"
        assert why in message
