"""Dtypes: low-precision models with fp32 masters, float64, mixtures, and the memory and effect of dtype options."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from sharded_lamb import ShardedLamb
from sharded_lamb.core.layout import BLOCK, round_up
from sharded_lamb.gradients.handles import ReducedGradient
from tests.harness import run_ranks
from tests.pairs import pairs
from tests.sharded_cases import (
    BASE,
    Case,
    Outcome,
    check_alike,
    check_close,
    check_run,
    expect,
    give_gradients,
    initial_values,
    make_optimizer,
    make_parameters,
    rank_gradients,
    run,
)
from tests.training import bytes_covered

LOW = [torch.bfloat16, torch.float16]
SHAPES = {"embed": (97, 11), "bias": (257,), "one": (1,), "scale": (), "none": (0,), "conv": (4, 6, 3, 3)}
SEVEN_BITS = 7  # of a gradient element, so that bfloat16 holds it exactly


def low_case(dtype: torch.dtype, stage: int, **settings: Any) -> Case:
    return Case(
        shapes=SHAPES,
        options={"max_grad_norm": 1.0},
        groups=((("embed", "one", "none"), {}), (("bias", "scale", "conv"), {"lr": 2e-3})),
        no_decay=frozenset({"bias"}),
        settings={"stage": stage, "bucket_mb": 0.001, **settings},
        dtypes=dict.fromkeys(SHAPES, dtype),
        drive="backward",
        bits=SEVEN_BITS,
        seed=3,
    )


@pairs(dtype=LOW, stage=[1, 2], world=[1, 2, 3])
def test_masters_follow_the_oracle(dtype: torch.dtype, stage: int, world: int) -> None:
    """The oracle starts from the rounded weights; only the master can stay within 2e-6 of it."""
    case = low_case(dtype, stage)
    outcomes = run_ranks(world, run, case, world)
    check_alike(outcomes)
    masters = outcomes[0].masters
    assert masters.keys() == SHAPES.keys()
    check_close(masters, expect(case, world))
    for name, value in outcomes[0].params.items():
        assert value.dtype == dtype
        assert masters[name].dtype == torch.float32
        assert torch.equal(value, masters[name].to(dtype)), f"{name} is not its rounded master"


MIXED = Case(
    shapes={"a": (131,), "b": (17, 31), "c": (300,), "d": (7, 41), "e": (5,), "f": ()},
    dtypes={
        "a": torch.bfloat16,
        "c": torch.float16,
        "d": torch.float64,
        "e": torch.bfloat16,
        "f": torch.float64,
    },
    options={"max_grad_norm": 2.0},
    settings={"bucket_mb": 0.001},
    bits=SEVEN_BITS,
    seed=8,
)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_dtypes_mix_in_one_optimizer(stage: int, world: int) -> None:
    case = replace(MIXED, settings={**MIXED.settings, "stage": stage}, drive="backward")
    outcomes = run_ranks(world, run, case, world)
    check_alike(outcomes)
    first = outcomes[0]
    low = {name for name, dtype in case.dtypes.items() if dtype != torch.float64}
    assert first.masters.keys() == low
    check_close({**first.params, **first.masters}, expect(case, world))
    for name, value in first.params.items():
        assert value.dtype == case.dtype(name)
        assert name not in low or torch.equal(value, first.masters[name].to(value.dtype))


@pairs(stage=[1, 2], world=[1, 2, 3], max_grad_norm=[None, 0.5])
def test_float64_is_computed_in_float64(stage: int, world: int, max_grad_norm: float | None) -> None:
    shapes = {"a": (1031,), "b": (17, 31), "c": (), "d": (0,)}
    case = Case(
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, torch.float64),
        options={"max_grad_norm": max_grad_norm},
        settings={"stage": stage, "bucket_mb": 0.001},
        seed=4,
    )
    outcomes = run_ranks(world, run, case, world)
    check_run(case, outcomes)
    check_close(outcomes[0].params, expect(case, world), 1e-12)
    assert outcomes[0].masters == {}


# -- effects of the dtype options ---------------------------------------------------------------------


def outcome(case: Case, world: int) -> Outcome:
    return run_ranks(world, run, case, world)[0]


def differing(a: Outcome, b: Outcome) -> set[str]:
    return {name for name in a.params if not torch.equal(a.params[name], b.params[name])}


def test_state_dtype_halves_moments_and_rounds_them() -> None:
    case = Case(shapes=SHAPES, missing=0.0)
    wide, narrow = outcome(case, 2), outcome(replace(case, settings={"state_dtype": torch.bfloat16}), 2)
    assert narrow.memory["moments"] * 2 == wide.memory["moments"]
    assert "embed" in differing(wide, narrow)
    check_close(narrow.params, expect(case, 2), 0.02)  # still LAMB


def test_master_dtype_of_the_model_has_no_masters() -> None:
    case = replace(low_case(torch.bfloat16, 1), missing=0.0)
    with_masters, without = (
        outcome(case, 2),
        outcome(low_case(torch.bfloat16, 1, master_dtype=torch.bfloat16), 2),
    )
    assert with_masters.memory["masters"] > 0
    assert without.memory["masters"] == 0
    assert without.masters == {}
    assert "embed" in differing(with_masters, without)


def test_master_dtype_wider_than_the_model_has_masters() -> None:
    case = Case(shapes=SHAPES, settings={"master_dtype": torch.float64})
    masters = outcome(case, 2).masters
    assert masters["embed"].dtype == torch.float64
    check_close(masters, expect(case, 2))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_reduce_dtype_is_the_dtype_on_the_wire(dtype: torch.dtype) -> None:
    case = Case(shapes=SHAPES, settings={"stage": 2}, missing=0.0)
    wide = outcome(case, 2)
    narrow = outcome(replace(case, settings={"stage": 2, "reduce_dtype": dtype}), 2)
    assert narrow.sent["reduce_scatter"] * 2 == wide.sent["reduce_scatter"]
    assert narrow.sent["all_gather"] == wide.sent["all_gather"]
    assert "embed" in differing(wide, narrow)  # gradients have 12 bits, bf16 has 8 and fp16 11


def test_reduce_dtype_wider_than_the_model() -> None:
    case = low_case(torch.bfloat16, 2)
    narrow, wide = outcome(case, 2), outcome(low_case(torch.bfloat16, 2, reduce_dtype=torch.float32), 2)
    assert wide.sent["reduce_scatter"] == 2 * narrow.sent["reduce_scatter"]
    assert not differing(wide, narrow)  # these gradients are exact in bfloat16, and summed in float32 anyway


def _sum_of_many(rank: int, world: int) -> float:
    p = Parameter(torch.zeros(1, dtype=torch.bfloat16))
    opt = ShardedLamb([("p", p)], stage=2)
    p.grad = torch.tensor([1.0 if rank == 0 else 2.0**-8], dtype=torch.bfloat16)
    opt.step()
    assert opt.grad_norm is not None
    return opt.grad_norm * world


def test_low_precision_gradients_are_summed_in_float32() -> None:
    """In bfloat16, 1 + 1/256 + 1/256 + 1/256 is 1."""
    assert run_ranks(4, _sum_of_many, 4)[0] == 1 + 3 * 2.0**-8


# -- memory -------------------------------------------------------------------------------------------


def _storages() -> set[tuple[int, int]]:
    gc.collect()
    with torch.no_grad():
        tensors = [
            x
            for x in gc.get_objects()
            if issubclass(type(x), torch.Tensor) and type(x) is not ReducedGradient and x.device.type == "cpu"
        ]
    return {(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors}


def _measure(rank: int, case: Case, world: int) -> tuple[dict[str, int], int]:
    """The result of `memory` after a step, and the growth of live tensors in bytes."""
    before = _storages()
    params = make_parameters(case)
    opt = make_optimizer(case, params)
    give_gradients(case, params, rank_gradients(case, 0, world)[rank])
    opt.step()
    return opt.memory(), bytes_covered(_storages() - before)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("bucket_mb", [32, 0.05])
def test_memory_of_a_bfloat16_model_is_as_documented(world: int, bucket_mb: float) -> None:
    """Per element 2 B of weights, 12 B / world of state, 4 B / world of gradients; staging for a few buckets."""
    shapes = {f"w{i}": (4 * BLOCK * (1 + i % 3), 16) for i in range(12)}
    numel = sum(rows * columns for rows, columns in shapes.values())
    case = Case(
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, torch.bfloat16),
        settings={"stage": 2, "bucket_mb": bucket_mb},
        missing=0.0,
        bits=SEVEN_BITS,
        drive="backward",
    )
    sizes = [2 * rows * columns for rows, columns in shapes.values()]
    biggest = min(sum(sizes), bucket_mb * 2**20 + max(sizes))
    for memory, measured in run_ranks(world, _measure, case, world):
        assert memory["parameters"] == 2 * numel
        assert memory["masters"] + memory["moments"] == 12 * numel // world
        assert memory["gradient_shards"] == 4 * numel // world
        assert 0 < memory["staging"] <= 4 * 2 * biggest
        reported = sum(memory.values())
        # Not reported: a map from blocks to parameters (8 B per block of this rank), vectors over parameters, and
        # the sentinel on the smallest parameter.
        unreported = 8 * numel // world // BLOCK + 400 * len(shapes) + 4096 + min(sizes)
        assert reported <= measured <= reported + unreported


def test_staging_does_not_grow_with_the_number_of_bucket_sizes() -> None:
    """40 buckets of different sizes: staging memory serves those in flight, not all."""
    shapes = {f"w{i}": (BLOCK * 2 * (i + 1),) for i in range(40)}
    case = Case(shapes=shapes, settings={"stage": 2, "bucket_mb": 0.0001}, missing=0.0, steps=2)
    biggest = 4 * BLOCK * 2 * 40
    assert outcome(case, 2).memory["staging"] <= 4 * 2 * biggest


@pytest.mark.parametrize("stage", [1, 2])
def test_memory_counts_padding(stage: int) -> None:
    """Stage 1 reads gradients where they are."""
    case = Case(shapes={"a": (BLOCK + 1,), "b": (3,)}, settings={"stage": stage}, steps=1)
    numel = round_up(3 * BLOCK, 2 * BLOCK)
    memory = dict(outcome(case, 2).memory)
    assert (memory.pop("staging") > 0) == (stage == 2)
    assert memory == {
        "parameters": 4 * numel,
        "masters": 0,
        "moments": 8 * numel // 2,
        "gradient_shards": 4 * numel // 2 if stage == 2 else 0,
    }


# -- memory formats and written weights ---------------------------------------------------------------


@pairs(dtype=[torch.float32, torch.bfloat16], stage=[1, 2], world=[1, 3])
def test_parameters_keep_their_strides(dtype: torch.dtype, stage: int, world: int) -> None:
    shapes = {"conv": (8, 6, 3, 5), "w": (4, 6, 3, 3), "b": (8,)}
    case = Case(
        shapes=shapes,
        channels_last=frozenset({"conv"}),
        dtypes=dict.fromkeys(shapes, dtype),
        settings={"stage": stage, "bucket_mb": 0.001},
        drive="backward",
        bits=SEVEN_BITS,
    )
    strides = {name: value.stride() for name, value in initial_values(case).items()}
    assert strides["conv"] == (6 * 3 * 5, 1, 5 * 6, 6)
    outcomes = run_ranks(world, run, case, world)
    check_alike(outcomes)
    assert outcomes[0].strides == strides
    check_close({**outcomes[0].params, **outcomes[0].masters}, expect(case, world))


def _write_after(rank: int, dtype: torch.dtype, how: str, early: int) -> dict[str, list[torch.Tensor]]:
    """Per parameter: the weight one step after it was written (after `early` steps), and the written weight."""
    shapes = {"weight": (31, 37), "bias": (31,)}
    case = Case(shapes=shapes, dtypes=dict.fromkeys(shapes, dtype), missing=0.0, bits=SEVEN_BITS)
    model, written = torch.nn.Linear(37, 31).to(dtype), torch.nn.Linear(37, 31).to(dtype)
    torch.manual_seed(7)
    for p in written.parameters():
        torch.nn.init.normal_(p, std=3.0)
    opt = ShardedLamb(model.named_parameters(), **BASE)
    params = dict(model.named_parameters())
    for step in range(early):
        give_gradients(case, params, rank_gradients(case, step, 1)[0])
        opt.step()
    if how == "load_state_dict":
        model.load_state_dict(written.state_dict())
    elif how == "copy_":
        with torch.no_grad():
            for p, source in zip(model.parameters(), written.parameters(), strict=True):
                p.copy_(source)
    else:
        for p, source in zip(model.parameters(), written.parameters(), strict=True):
            p.data.copy_(source.data)
    give_gradients(case, params, rank_gradients(case, early, 1)[0])
    start = {name: p.detach().clone() for name, p in written.named_parameters()}
    opt.step()
    return {name: [p.detach().clone(), start[name]] for name, p in params.items()}


@pairs(dtype=[torch.float32, torch.bfloat16], how=["load_state_dict", "copy_", ".data"], early=[0, 2])
def test_weights_written_after_construction_win(dtype: torch.dtype, how: str, early: int) -> None:
    """A step changes a weight by lr times its norm; a stale master would undo the write."""
    for params in run_ranks(2, _write_after, dtype, how, early):
        for name, (after, written) in params.items():
            change = float((after - written).double().norm() / written.double().norm())
            assert 0.2 * BASE["lr"] < change < 2 * BASE["lr"], f"{name} changed by {change}"


def _write_one_element(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    p = Parameter(torch.full((600,), 1.0, dtype=torch.bfloat16))
    opt = ShardedLamb([("p", p)], lr=1e-4, weight_decay=0.0)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    p.data[5] = 2.0
    p.grad = torch.ones_like(p)
    opt.step()
    full = opt.full_state_dict()
    return p.detach().clone(), torch.empty(0) if full is None else full["state"][0]["master"]


def test_only_the_written_elements_lose_their_masters() -> None:
    """Four steps of 1e-4 are less than half a bfloat16 ulp below 1: only the masters hold them."""
    (weight, master), _ = run_ranks(2, _write_one_element)
    assert torch.equal(weight, master.to(torch.bfloat16))
    assert abs(float(master[5]) - (2 - 1e-4)) < 1e-5
    untouched = torch.cat([master[:5], master[6:]])
    assert ((untouched - (1 - 4e-4)).abs() < 1e-6).all()
