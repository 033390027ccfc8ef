"""16-bit remainders of fp32 masters beside bfloat16 weights: exact arithmetic, and whole optimizers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.core.layout import BLOCK
from sharded_lamb.kernels import remainders
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.layouts import Layout, build, steps
from tests.optim import fsdp_models as models
from tests.optim.test_dtypes import SHAPES, low_case
from tests.optim.test_dtypes import _measure as measure
from tests.optim.test_fsdp2_state import assert_same_state
from tests.pairs import pairs
from tests.sharded_cases import Case, check_alike, check_close, expect, run

BF16, F32 = torch.bfloat16, torch.float32
SPLIT: dict[str, Any] = {"store_param_remainders": True}

Bits = npt.NDArray[np.int64]
LOWER = np.array([0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xABCD, 0xFFFE, 0xFFFF])
"""Lower halves of float32 numbers on both sides of each rounding boundary."""


# -- the arithmetic against exact numbers --------------------------------------------------------------------


def exact(bits: Bits) -> npt.NDArray[np.float64]:
    """The values of 32-bit patterns, by the definition of float32; an infinity counts as 2^128, for rounding."""
    sign, exponent, fraction = bits >> 31 & 1, bits >> 23 & 0xFF, bits & 0x7FFFFF
    scale = np.ldexp(1.0, np.maximum(exponent, 1) - 150)
    return np.where(sign, -1.0, 1.0) * (fraction + np.where(exponent > 0, 2**23, 0)) * scale


def nearest(bits: Bits) -> Bits:
    """Upper halves of the nearest number whose lower half is 0, ties to even. No nans."""
    below, above = bits & ~0xFFFF, (bits & ~0xFFFF) + 0x10000  # towards 0 and away from 0
    value = np.abs(exact(bits))
    down, up = value - np.abs(exact(below)), np.abs(exact(above)) - value
    mismatched = below >> 16 & 1
    return np.where((up < down) | ((up == down) & (mismatched == 1)), above, below) >> 16


def is_nan(bits: Bits) -> npt.NDArray[np.bool_]:
    return (bits & 0x7FFFFFFF) > 0x7F800000


def as_float32(bits: Bits) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def bits_of(tensor: Tensor) -> Bits:
    """The unsigned bits of a tensor of any dtype."""
    kind = torch.int32 if tensor.element_size() == 4 else torch.int16
    return tensor.view(kind).numpy().astype(np.int64) & (2 ** (8 * tensor.element_size()) - 1)


def test_every_upper_half_splits_exactly() -> None:
    """All 2^16 upper halves (zeros, subnormals, infinities, both signs) with the lower halves in `LOWER`."""
    bits = (np.arange(2**16)[:, None] * 2**16 + LOWER).ravel()
    model, remainder = remainders.split(as_float32(bits))
    nans = is_nan(bits)
    assert (model.dtype, remainder.dtype) == (BF16, torch.int16)
    assert model.isnan().numpy().tolist() == nans.tolist()
    assert not remainder.numpy()[nans].any()
    bits, upper = bits[~nans], nearest(bits[~nans])
    assert np.array_equal(bits_of(model)[~nans], upper)
    difference = bits - upper * 2**16
    nudged = difference == 0x8000
    assert np.array_equal(remainder.numpy()[~nans], difference - nudged)
    assert np.array_equal(nudged, (bits & 0xFFFF == 0x8000) & (upper & 1 == 0) & (bits >> 16 == upper))
    again = bits_of(remainders.joined(model, remainder))[~nans]
    assert np.array_equal(again, bits - nudged)


@pytest.mark.parametrize(
    "upper", [0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x8000, 0xBF80, 0xFF7F, 0xFF80]
)
def test_every_lower_half_round_trips(upper: int) -> None:
    """Except the tie above an even weight; nans stay nans."""
    bits = upper * 2**16 + np.arange(2**16)
    again = bits_of(remainders.joined(*remainders.split(as_float32(bits))))
    nans, tie = is_nan(bits), (bits & 0xFFFF == 0x8000) & (upper % 2 == 0)
    assert is_nan(again[nans]).all()
    assert np.array_equal(again[~nans], (bits - tie)[~nans])


def test_a_joined_master_rounds_to_its_weight_for_any_remainder() -> None:
    """A weight that the user wrote beside an old remainder keeps its value, also after another split; a valid remainder
    is used unchanged."""
    lower = np.unique(np.concatenate([np.arange(-0x8000, 0x8000, 1021), LOWER - 0x8000, [0x7FFF, -1]]))
    upper, remainder = (x.ravel() for x in np.meshgrid(np.arange(2**16), lower, indexing="ij"))
    model = torch.from_numpy(upper.astype(np.uint16).view(np.int16)).view(BF16)
    stored = torch.from_numpy(remainder.astype(np.int16))
    masters = bits_of(remainders.joined(model, stored))
    nans = is_nan(upper * 2**16)
    assert np.array_equal(is_nan(masters), nans)
    upper, remainder, masters = upper[~nans], remainder[~nans], masters[~nans]
    assert np.array_equal(nearest(masters), upper)
    plain = (upper * 2**16 + remainder) % 2**32
    valid = ~is_nan(plain)
    valid[valid] = nearest(plain[valid]) == upper[valid]
    assert np.array_equal(masters[valid], plain[valid])
    assert (~valid).sum() > 2**15
    again = remainders.split(remainders.joined(model, stored))[0]
    assert np.array_equal(bits_of(again)[~nans], upper)


# -- training equals training with fp32 masters---------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_masters_follow_the_oracle(stage: int, world: int) -> None:
    """With the tolerance of fp32 masters; weights are the rounded masters, and ranks agree."""
    case = low_case(BF16, stage, **SPLIT)
    outcomes = run_ranks(world, run, case, world)
    check_alike(outcomes)
    masters = outcomes[0].masters
    assert masters.keys() == SHAPES.keys()
    check_close(masters, expect(case, world))
    for name, value in outcomes[0].params.items():
        assert masters[name].dtype == F32
        assert torch.equal(value, masters[name].to(BF16)), f"{name} is not its rounded master"


def nudges(masters: list[Tensor]) -> int:
    """Number of masters that remainders cannot represent: ties above even upper halves."""
    bits = np.concatenate([bits_of(master.detach().flatten()) for master in masters])
    return int(((bits & 0x1FFFF) == 0x8000).sum())


TIELESS = [(1, 1, 0), (1, 2, 1), (1, 3, 0), (2, 1, 0), (2, 2, 0), (2, 3, 0)]
"""(stage, ranks, seed) of runs without such ties, as about half are."""


def watched_run(
    rank: int, world: int, stage: int, seed: int, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], int, dict[str, float]]:
    """Weights and masters after 10 steps, the nudges until then, ratios."""

    def gradients(rank: int, step: int) -> dict[str, Tensor | None]:
        return {name: training.draw(shape, seed, name, rank, step) for name, shape in training.SHAPES.items()}

    params = training.parameters(dtype=BF16)
    opt = training.grouped(params, stage, kernel="torch", **options)
    count = 0
    for step in range(10):
        training.train(opt, params, stage=stage, rank=rank, world=world, steps=[step], gradients=gradients)
        count += nudges([entry["master"] for entry in opt.state_dict()["state"].values()])
    entries = training.copies(params), [entry["master"] for entry in opt.state_dict()["state"].values()]
    return entries[0], dict(zip(params, entries[1], strict=True)), count, opt.trust_ratios()


@pytest.mark.parametrize(("stage", "world", "seed"), TIELESS)
def test_steps_without_ties_have_the_bits_of_fp32_masters(stage: int, world: int, seed: int) -> None:
    split = run_ranks(world, watched_run, world, stage, seed, SPLIT)
    plain = run_ranks(world, watched_run, world, stage, seed, {})
    assert sum(count for _, _, count, _ in plain) == 0, "another seed: this run meets a tie"
    for actual, expected in zip(split, plain, strict=True):
        training.assert_same_bits(actual[0], expected[0])
        training.assert_same_bits(actual[1], expected[1])
        assert actual[3] == expected[3]


@pytest.mark.parametrize("bits", remainders.STORAGE)
def test_any_number_of_ranks_has_the_same_bits(bits: int) -> None:
    """All are given the same averaged gradients."""
    alone = run_ranks(1, one_of_many, 1, bits)[0]
    for world in (2, 3, 4):
        for weights in run_ranks(world, one_of_many, world, bits):
            training.assert_same_bits(weights, alone)


def one_of_many(rank: int, world: int, bits: int) -> dict[str, Tensor]:
    params = training.parameters(dtype=BF16)
    opt = training.grouped(params, 1, store_param_remainders=bits)
    same = {"gradients": lambda rank, step: training.own_gradients(0, step)}
    training.train(opt, params, stage=1, rank=rank, world=world, steps=range(8), **same)  # type: ignore[arg-type]
    return training.copies(params)


def tied_run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ties, masters after loading ties, weights)."""
    p = Parameter(torch.ones(6, dtype=BF16))
    opt = ShardedLamb([("p", p)], **SPLIT)
    ties = as_float32(np.array([0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x3F807FFF, 0x00008000]))
    state = opt.full_state_dict()
    if state is not None:
        state["state"][0]["master"] = ties
    opt.load_full_state_dict(state)
    with torch.no_grad():
        p.copy_(ties)
    full = opt.full_state_dict()
    return ties, torch.empty(0) if full is None else full["state"][0]["master"], p.detach().clone()


def test_a_tie_above_an_even_weight_is_nudged_towards_0() -> None:
    ties, masters, weights = run_ranks(2, tied_run)[0]
    assert (bits_of(ties) - bits_of(masters)).tolist() == [1, 0, 1, 0, 0, 1]
    assert torch.equal(weights, ties.to(BF16))


# -- memory, and invalid options -----------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "bits"), [(1, 16), (2, 16), (2, 8), (4, 16)])
def test_memory_of_a_bfloat16_model_is_2_bytes_less_an_element(world: int, bits: int) -> None:
    """2 B of weights, 10 B / world of state (9 with 8 bits), 4 B / world of gradients; staging as with fp32 masters."""
    shapes = {f"w{i}": (4 * BLOCK * (1 + i % 3), 16) for i in range(12)}
    numel = sum(rows * columns for rows, columns in shapes.values())
    case = Case(
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, BF16),
        settings={"stage": 2, "bucket_mb": 0.05, "store_param_remainders": bits},
        missing=0.0,
        bits=7,
        drive="backward",
    )
    plain = replace(case, settings={**case.settings, "store_param_remainders": False})
    staging = run_ranks(world, measure, plain, world)[0][0]["staging"]
    for memory, measured in run_ranks(world, measure, case, world):
        assert memory == {
            "parameters": 2 * numel,
            "masters": bits // 8 * numel // world,
            "moments": 8 * numel // world,
            "gradient_shards": 4 * numel // world,
            "staging": staging,
        }
        accounted = sum(memory.values())
        overhead = 8 * numel // world // BLOCK + 400 * len(shapes) + 4096 + 2 * 4 * BLOCK * 16
        assert accounted <= measured <= accounted + overhead


def test_other_dtypes_have_fp32_masters() -> None:
    params = {str(dtype): Parameter(torch.ones(300, dtype=dtype)) for dtype in (BF16, torch.float16, F32)}
    opt = ShardedLamb(params.items(), **SPLIT)
    dtypes = [{key: value.dtype for key, value in opt.state[p].items()} for p in params.values()]
    assert dtypes[0]["remainder"] == torch.int16
    assert "master" not in dtypes[0]
    assert dtypes[1]["master"] == F32
    assert dtypes[2].keys() == dtypes[0].keys() - {"remainder"}
    assert opt.memory()["masters"] == 512 * (2 + 4)


def test_another_master_dtype_raises() -> None:
    p = Parameter(torch.ones(3, dtype=BF16))
    with pytest.raises(ValueError, match=r"needs master_dtype=torch.float32, got torch.bfloat16.*Omit one"):
        ShardedLamb([("p", p)], master_dtype=BF16, **SPLIT)


def disagreeing(rank: int) -> None:
    ShardedLamb([("p", Parameter(torch.ones(3, dtype=BF16)))], store_param_remainders=rank == 1)


def test_ranks_that_disagree_raise() -> None:
    for kind, message in run_ranks_expecting_errors(2, disagreeing).values():
        assert kind == "ValueError"
        assert "store_param_remainders" in message


# -- weights that the user writes ----------------------------------------------------------------------------


def written_after(rank: int, early: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weights written after ``early`` steps, the same after a step with lr 0, their masters before that step)."""
    p = Parameter(training.draw((600,), "before").to(BF16))
    opt = ShardedLamb([("p", p)], lr=torch.tensor(0.01), **SPLIT)
    for step in range(early):
        p.grad = training.draw((600,), "gradient", step).to(BF16)
        opt.step()
    written = (3 * training.draw((600,), "written")).to(BF16)
    p.data.copy_(written)
    full = opt.full_state_dict()
    opt.param_groups[0]["lr"].fill_(0)
    p.grad = training.draw((600,), "gradient", early).to(BF16)
    opt.step()
    return written, p.detach().clone(), torch.empty(0) if full is None else full["state"][0]["master"]


@pytest.mark.parametrize("early", [0, 3])
def test_written_weights_replace_their_masters(early: int) -> None:
    """To within half a unit of bfloat16; exactly, before the first step."""
    for rank, (written, after, master) in enumerate(run_ranks(2, written_after, early)):
        assert torch.equal(after, written)
        if rank == 0:
            assert torch.equal(master.to(BF16), written)
            assert torch.equal(master, written.float()) == (early == 0)


# -- state ---------------------------------------------------------------------------------------------------


def resume(rank: int, world: int, stage: int, options: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Save with one kind of masters and load with another, bit for bit; the optimizer before or after the model."""
    saving, loading = options
    params = training.parameters(dtype=BF16)
    opt = training.grouped(params, stage, **saving)
    train = {"stage": stage, "rank": rank, "world": world}
    training.train(opt, params, steps=range(2), **train)
    state = training.through_bytes(opt.state_dict())
    full = training.through_bytes(opt.full_state_dict())
    values = training.copies(params)
    assert {value.dtype for entry in state["state"].values() for value in entry.values()} >= {F32}
    training.train(opt, params, steps=range(2, 5), **train)
    for whole in (False, True):
        for first in ("optimizer", "model"):
            fresh = training.parameters(dtype=BF16)
            again = training.grouped(fresh, stage, **loading)
            training.train(again, fresh, steps=range(7, 8), **train)  # state that loading must replace
            for what in (first, {"optimizer": "model", "model": "optimizer"}[first]):
                if what == "optimizer" and whole:
                    again.load_full_state_dict(full)
                elif what == "optimizer":
                    again.load_state_dict(state)
                else:
                    with torch.no_grad():
                        for name, p in fresh.items():
                            p.copy_(values[name])
            assert_same_entries(again.state_dict()["state"], representable(state["state"], loading))
            training.assert_same_bits(training.copies(fresh), values)
            if saving == loading:  # else later steps may meet a tie
                training.train(again, fresh, steps=range(2, 5), **train)
                training.assert_same_bits(training.copies(fresh), training.copies(params))
                assert_same_entries(again.state_dict()["state"], opt.state_dict()["state"])


def representable(entries: dict[int, Any], options: dict[str, Any]) -> dict[int, Any]:
    """The entries as ``options`` can represent them: unchanged, or with ties moved by one ulp."""
    if options != SPLIT:
        return entries
    return {place: {**entry, "master": without_ties(entry["master"])} for place, entry in entries.items()}


def without_ties(master: Tensor) -> Tensor:
    bits = bits_of(master)
    return as_float32(bits - ((bits & 0x1FFFF) == 0x8000))


def assert_same_entries(entries: dict[int, Any], expected: dict[int, Any]) -> None:
    assert entries.keys() == expected.keys()
    for place, entry in expected.items():
        training.assert_same_bits(entries[place], entry)


WAYS = [(SPLIT, SPLIT), (SPLIT, {}), ({}, SPLIT)]


@pairs(world=[1, 2, 3], stage=[1, 2], ways=WAYS)
def test_state_is_loaded_with_either_kind_of_masters(
    world: int, stage: int, ways: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    run_ranks(world, resume, world, stage, ways)


def shown(rank: int) -> None:
    """``optimizer.state`` holds remainders, `state_dict` holds masters and shares the moments' memory."""
    params = training.parameters(dtype=BF16)
    opt = training.grouped(params, 1, **SPLIT)
    training.train(opt, params, stage=1, rank=rank, world=2, steps=range(2))
    packed = opt.state_dict()["state"]
    for place, p in enumerate(params.values()):
        assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq", "remainder", "shard"}
        assert list(packed[place]) == ["step", "exp_avg", "exp_avg_sq", "master", "shard"]
        assert packed[place]["master"].size() == p.size()
        assert packed[place]["exp_avg"].data_ptr() == opt.state[p]["exp_avg"].data_ptr()


def test_state_shows_remainders_and_state_dicts_masters() -> None:
    run_ranks(2, shown)


def test_lamb_loads_the_full_state_dict() -> None:
    full, weights = run_ranks(2, trained_whole)[0]
    assert full is not None
    assert {entry["master"].dtype for entry in full["state"].values()} == {F32}
    params = {name: Parameter(value) for name, value in weights.items()}
    opt = Lamb(list(params.items()), lr=0.02)
    opt.load_state_dict(full)
    for place, p in enumerate(params.values()):
        assert torch.equal(opt.state[p]["exp_avg"], full["state"][place]["exp_avg"])


def trained_whole(rank: int) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    params = training.parameters(dtype=BF16)
    opt = ShardedLamb(params.items(), lr=0.02, bucket_mb=0.004, **SPLIT)
    training.train(opt, params, stage=1, rank=rank, world=2, steps=range(2))
    return opt.full_state_dict(), training.copies(params)


# -- torch.distributed.checkpoint and DTensors ---------------------------------------------------------------


def saved(rank: int, layout: Layout, folder: Path) -> tuple[Any, Any]:
    model, opt = build(layout)
    steps(model, opt, range(2))
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt)}
    dcp.save(state, checkpoint_id=folder)
    return models.whole_weights(model), training.through_bytes(opt.full_state_dict())


def loaded(rank: int, layout: Layout, folder: Path) -> tuple[Any, Any]:
    model, opt = build(layout)
    steps(model, opt, range(7, 8))
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, opt, state["optim"])
    set_model_state_dict(model, state["model"])
    return models.whole_weights(model), training.through_bytes(opt.full_state_dict())


def half(world: int, stage: int = 0, axes: tuple[str, ...] = ("dp",), *, split: bool) -> Layout:
    return Layout(world, stage, axes, BF16, remainders=split)


TRAVELS = [
    (half(1, 1, split=True), half(2, 2, split=True)),
    (half(2, 2, split=True), half(1, 1, split=False)),
    (half(3, split=True), half(2, 1, split=True)),
    (half(2, 2, split=False), half(2, split=True)),
    (half(2, split=True), half(4, axes=("dp", "tp"), split=False)),
]


@pytest.mark.parametrize(("source", "target"), TRAVELS, ids=str)
def test_dcp_checkpoints_load_on_other_layouts(source: Layout, target: Layout, tmp_path: Path) -> None:
    weights, full = run_ranks(source.world, saved, source, tmp_path)[0]
    outcomes = run_ranks(target.world, loaded, target, tmp_path)
    for each, _ in outcomes:
        training.assert_same_bits(each, weights)
    assert all(entry["master"].dtype == F32 for entry in full["state"].values())
    assert_same_state(outcomes[0][1], full)


FIRST = 20
"""Step of the first gradients, chosen so that no tie occurs."""


def fsdp_run(rank: int, options: dict[str, Any]) -> tuple[models.Run, int]:
    tree = models.sharded_tree(models.named_mesh(dp=3), BF16)
    opt = ShardedLamb(models.two_groups(tree), **models.GROUPED, kernel="torch", **options)
    count = 0

    def watch() -> None:
        nonlocal count
        entries = opt.state_dict()["state"].values()
        count += nudges([entry["master"].to_local() for entry in entries])

    run = models.train(tree, opt, lambda step: tree(models.gradients(rank, step + FIRST)), 8, watch)
    state = opt.full_state_dict()
    opt.load_full_state_dict(state)
    again = opt.full_state_dict()
    if state is not None:
        assert_same_state(again, state)
    return run, count


def test_fully_sharded_models_have_the_bits_of_fp32_masters() -> None:
    split, plain = run_ranks(3, fsdp_run, SPLIT), run_ranks(3, fsdp_run, {})
    assert sum(count for _, count in plain) == 0, "another seed: this run meets a tie"
    for (actual, _), (expected, _) in zip(split, plain, strict=True):
        training.assert_same_bits(actual.weights, expected.weights)
        training.assert_same_bits(actual.masters, expected.masters)
        numel = sum(actual.local_sizes.values())
        assert actual.memory == {**expected.memory, "masters": 2 * numel}
        assert expected.memory["masters"] == 4 * numel
    overrides = models.overrides(split[0][0].start)
    models.check([run for run, _ in split], lr=0.02, max_grad_norm=5.0, overrides=overrides)
