"""Gradient accumulation: no_sync, several backwards before a step, and every way to zero gradients or not."""

import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb, kernels
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.oracle import OracleLamb
from tests.sharded_cases import (
    Case,
    assert_near,
    assert_same_bits,
    give_gradients,
    make_optimizer,
    make_parameters,
    rank_gradients,
    run,
    through_lamb,
)
from tests.training import assert_follows

CASE = Case(
    shapes={"embed": (97, 11), "fc": (31, 37), "bias": (257,), "one": (1,), "scale": (), "none": (0,)},
    options={"max_grad_norm": 1.0},
    groups=((("embed", "bias", "none"), {}), (("fc", "one", "scale"), {"lr": 2e-3, "weight_decay": 0.0})),
    settings={"bucket_mb": 0.001},
    missing=0.0,
    bits=8,
    drive="backward",
    seed=2,
)


def staged(stage: int) -> Case:
    return replace(CASE, settings={**CASE.settings, "stage": stage})


WHOLE = staged(2)


def _in_parts(rank: int, case: Case, world: int, how: str) -> dict[str, Tensor]:
    """Three backwards per step, whose gradients sum exactly."""
    params = make_parameters(case)
    opt = make_optimizer(case, params)
    for step in range(case.steps):
        grads = rank_gradients(case, step, world)[rank]
        parts = [
            {name: g * share for name, g in grads.items() if g is not None} for share in (0.5, 0.25, 0.25)
        ]
        for index, part in enumerate(parts):
            if how == "no_sync" and index < 2:
                before = opt.traffic.calls.copy()
                with opt.no_sync():
                    give_gradients(case, params, part)
                assert opt.traffic.calls == before
                assert all(p.grad is not None for p in params.values())
            else:
                give_gradients(case, params, part)
        opt.step()
        opt.zero_grad()
    return {name: p.detach().clone() for name, p in params.items()}


@pytest.mark.parametrize("how", ["no_sync", "several backwards"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_micro_batches_sum_to_the_batch(world: int, how: str) -> None:
    expected = run_ranks(world, run, WHOLE, world)[0].params
    for params in run_ranks(world, _in_parts, WHOLE, world, how):
        assert_same_bits(params, expected)


def _backward_in_no_sync_only(rank: int, case: Case) -> dict[str, Tensor]:
    params = make_parameters(case)
    opt = make_optimizer(case, params)
    for step in range(case.steps):
        with opt.no_sync():
            give_gradients(case, params, rank_gradients(case, step, 2)[rank])
        opt.step()
        opt.zero_grad()
    return {name: p.detach().clone() for name, p in params.items()}


def test_step_reduces_gradients_of_no_sync() -> None:
    expected = run_ranks(2, run, WHOLE, 2)[0].params
    for params in run_ranks(2, _backward_in_no_sync_only, WHOLE):
        assert_same_bits(params, expected)


def _clipped_by_call(rank: int, case: Case, world: int) -> tuple[dict[str, Tensor], list[float], int]:
    params = make_parameters(case)
    opt = make_optimizer(case, params, max_grad_norm=None)
    norms = []
    before = opt.traffic.calls["all_reduce_small"]
    for step in range(case.steps):
        give_gradients(case, params, rank_gradients(case, step, world)[rank])
        norms.append(float(opt.clip_grad_norm_(1.0)))
        opt.step()
        assert opt.grad_norm == norms[-1]
        opt.zero_grad()
    calls = opt.traffic.calls["all_reduce_small"] - before
    return {name: p.detach().clone() for name, p in params.items()}, norms, calls


@pytest.mark.parametrize("stage", [1, 2])
def test_clip_grad_norm_is_max_grad_norm_for_one_step(stage: int) -> None:
    case = staged(stage)
    plain = run_ranks(3, run, case, 3)[0]
    assert case.options["max_grad_norm"] == 1.0
    for params, norms, calls in run_ranks(3, _clipped_by_call, case, 3):
        assert_same_bits(params, plain.params)
        assert norms == plain.grad_norms
        assert min(norms) > 1
        assert calls == 2 * case.steps


def _zeroing(rank: int, case: Case, world: int, how: str) -> dict[str, Tensor]:
    params = make_parameters(case)
    opt = make_optimizer(case, params)
    model = nn.ParameterDict(params)
    for step in range(case.steps):
        grads = rank_gradients(case, step, world)[rank]
        terms = [(p * torch.from_numpy(grads[n]).float()).sum() for n, p in params.items()]
        torch.stack(terms).sum().backward()
        opt.step()
        if how.startswith("opt"):
            opt.zero_grad(set_to_none="False" not in how)
        elif how.startswith("model"):
            model.zero_grad(set_to_none="False" not in how)
    return {name: p.detach().clone() for name, p in params.items()}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("how", ["opt", "model", "opt set_to_none=False", "model set_to_none=False", "never"])
def test_zeroing_behaves_as_in_torch(how: str, stage: int) -> None:
    case = staged(stage)
    expected = through_lamb(case, 2, zeroes=how != "never")
    other = through_lamb(case, 2, zeroes=how == "never")
    for params in run_ranks(2, _zeroing, case, 2, how):
        assert_near(params, expected)
        assert float((params["fc"] - other["fc"]).norm() / other["fc"].norm()) > 1e-4


@pytest.mark.parametrize(
    "settings", [{"bucket_mb": 32}, {"overlap": False}, {"overlap": False, "bucket_mb": 0.01}]
)
def test_buckets_and_overlap_leave_the_bits_unchanged(settings: dict[str, Any]) -> None:
    plain = run_ranks(3, run, staged(2), 3)[0].params
    changed = replace(CASE, settings={**staged(2).settings, **settings})
    assert_same_bits(run_ranks(3, run, changed, 3)[0].params, plain)


def second_order(rank: int, kernel: str) -> tuple[bool, bool]:
    """Gradients that require gradients: (the weight changed, the gradient shard holds their graph)."""
    p = torch.nn.Parameter(torch.ones(5))
    opt = ShardedLamb([("p", p)], stage=2, kernel=kernel)
    (p**3).sum().backward(create_graph=True)
    holds_graph = opt._store.buckets[0].shard.grad.requires_grad
    opt.step()
    return not torch.equal(p.detach(), torch.ones(5)), holds_graph


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kernel", kernels.available())
def test_create_graph_changes_nothing(kernel: str, world_size: int) -> None:
    assert run_ranks(world_size, second_order, kernel) == [(True, False)] * world_size


def _reached_on_one_rank(rank: int, zeroed: bool) -> dict[str, Tensor]:
    """Rank 1's backwards alone reach the optimizer, after a step without gradients and after ``model.zero_grad()``."""
    model = torch.nn.Linear(7, 3)
    opt = ShardedLamb(model.named_parameters(), lr=0.1, stage=2)
    opt.step()
    for _ in range(2 if zeroed else 1):
        if rank == 1:
            model(torch.ones(2, 7)).sum().backward()
        opt.step()
        model.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_rank_that_backward_does_not_reach_counts_as_zero(zeroed: bool) -> None:
    first, second = run_ranks(2, _reached_on_one_rank, zeroed, timeout=60)
    torch.manual_seed(0)  # as in every case
    model = torch.nn.Linear(7, 3)
    oracle = OracleLamb({name: p.detach().double().numpy() for name, p in model.named_parameters()}, lr=0.1)
    for _ in range(2 if zeroed else 1):  # rank 1's sums over its batch of 2, averaged over 2 ranks
        oracle.step({"weight": np.ones((3, 7)), "bias": np.ones(3)})
    for weights in (first, second):
        assert_follows(weights, oracle)


def _behind(rank: int, how: str) -> tuple[dict[str, Tensor], float | None]:
    """Rank 1's backwards alone reach layer 0 or layer 1, at a time when rank 0 may hold other gradients."""
    model = nn.ModuleList([nn.Linear(7, 3), nn.Linear(5, 2)])
    model[1].requires_grad_(not how.startswith("unfrozen"))
    held = model[:1] if how == "group added" else model
    opt = ShardedLamb(held.named_parameters(), lr=0.1, stage=2)

    def backward(*layers: int) -> None:
        torch.stack([model[layer](torch.ones(2, 7 - 2 * layer)).sum() for layer in layers]).sum().backward()

    if how in ("zeroed in place", "no_sync", "unfrozen"):
        backward(*([0] if how == "unfrozen" else [0, 1]))
        opt.step()
    if how == "zeroed in place":
        model.zero_grad(set_to_none=False)
    model[1].requires_grad_(True)
    with opt.no_sync() if how == "no_sync" else nullcontext():
        if how == "unfrozen":
            backward(*range(rank + 1))
        elif rank == 1:
            backward(0)
    if how == "group added":
        opt.add_param_group({"params": [(f"1.{name}", p) for name, p in model[1].named_parameters()]})
    opt.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, opt.grad_norm


@pytest.mark.parametrize(
    ("how", "scales"),  # of the gradients of each layer, in every step
    [
        ("zeroed in place", [(2, 2), (1, 0)]),
        ("no_sync", [(2, 2), (3, 2)]),
        ("unfrozen", [(2, None), (4, 1)]),
        ("unfrozen in flight", [(1, None)]),
        ("group added", [(1, None)]),
    ],
)
def test_ranks_reduce_alike_where_one_may_lack_gradients_of_another(
    how: str, scales: list[tuple[int | None, ...]]
) -> None:
    torch.manual_seed(0)  # as in every case
    model = nn.ModuleList([nn.Linear(7, 3), nn.Linear(5, 2)])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    oracle = OracleLamb({name: p.detach().double().numpy() for name, p in model.named_parameters()}, lr=0.1)
    grads: dict[str, np.ndarray] = {}
    for step in scales:
        scale_of = {name: step[int(name[0])] for name in shapes}
        grads = {name: np.full(shapes[name], float(s)) for name, s in scale_of.items() if s is not None}
        oracle.step(grads)
    norm = sum(float((g * g).sum()) for g in grads.values()) ** 0.5
    for weights, grad_norm in run_ranks(2, _behind, how, timeout=60):
        assert_follows(weights, oracle)
        assert grad_norm == pytest.approx(norm, rel=1e-6)


def _zeroed_between(rank: int) -> None:
    """Gradients are zeroed after rank 1's first reduction and before rank 0's; then rank 0 makes one more."""
    model = nn.Linear(7, 3)
    opt = ShardedLamb(model.named_parameters(), lr=0.1, stage=2)
    if rank == 1:
        model(torch.ones(2, 7)).sum().backward()
    model.zero_grad()
    for _ in range(2 - rank):
        model(torch.ones(2, 7)).sum().backward()
    opt.step()


def test_gradients_zeroed_between_one_reduction_on_two_ranks_are_an_error() -> None:
    for kind, message in run_ranks_expecting_errors(2, _zeroed_between, timeout=60).values():
        assert kind == "ValueError"
        assert re.search(r"edits of \.grad of 'weight'.*: rank 0 has 'none, 1', .*: 'none, 0'", message), (
            message
        )


class _Failing(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("planted")


def _after_a_failed_backward(rank: int, fails: bool) -> torch.Tensor:
    """Gradients are zeroed in place after a backward that failed on rank 0, after it had reached one layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    opt = ShardedLamb(model.named_parameters(), lr=0.1, stage=2, bucket_mb=0.0002)
    if fails:
        model(torch.ones(2, 7)).sum().backward()
        hidden = model[0](torch.ones(2, 7))
        with pytest.raises(ArithmeticError) if rank == 0 else nullcontext():
            model[1](_Failing.apply(hidden) if rank == 0 else hidden).sum().backward()
        model.zero_grad(set_to_none=False)
    model(torch.full((2, 7), 1.0 + rank)).square().sum().backward()
    opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_gradients_zeroed_in_place_after_a_backward_that_failed_on_one_rank_are_gone() -> None:
    expected = run_ranks(2, _after_a_failed_backward, False)
    for actual, weights in zip(run_ranks(2, _after_a_failed_backward, True), expected, strict=True):
        assert torch.equal(actual, weights)
