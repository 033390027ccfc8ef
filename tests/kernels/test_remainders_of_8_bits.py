"""Masters of 24 bits: a bfloat16 weight and 8 bits of remainder. Arithmetic, and whole optimizers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sharded_lamb import ShardedLamb, checkpoint
from sharded_lamb.kernels import remainders
from tests import training
from tests.harness import run_ranks
from tests.kernels.test_remainders import BF16, LOWER, as_float32, bits_of, exact, is_nan, nearest
from tests.optim import fsdp_models as models
from tests.optim.test_dtypes import low_case
from tests.oracle import OracleLamb
from tests.sharded_cases import Case, average, initial_values, rank_gradients, run

EIGHT: dict[str, Any] = {"store_param_remainders": 8}


def test_masters_are_rounded_to_24_bits() -> None:
    """All upper halves with the lower halves in `LOWER`, and those around ties: the nearest of 2²⁴ numbers, and the
    even one of two; one step nearer 0 where that would round to another weight."""
    lower = np.unique(
        np.concatenate([LOWER, [0x80, 0x180, 0x17F, 0x181, 0x7F7F, 0x7F80, 0x7F81, 0x807F, 0x8080]])
    )
    bits = (np.arange(2**16)[:, None] * 2**16 + lower).ravel()
    bits = bits[~is_nan(bits)]
    model, remainder = remainders.split(as_float32(bits), 8)
    assert (model.dtype, remainder.dtype) == (BF16, torch.int8)
    weights, again = bits_of(model), bits_of(remainders.joined(model, remainder))
    assert np.array_equal(weights, nearest(bits))
    assert np.array_equal(nearest(again), weights), "a master rounds to its weight"
    below, above = bits & ~0xFF, (bits & ~0xFF) + 0x100
    down, up = (np.abs(np.abs(exact(x)) - np.abs(exact(bits))) for x in (below, above))
    expected = np.where((up < down) | ((up == down) & (below >> 8 & 1 == 1)), above, below)
    strange = again != expected
    # Where the nearest is a tie, which belongs to the weight above or below, or beyond the largest remainder.
    assert (expected[strange] & 0xFFFF == 0x8000).all()
    assert (np.abs(again[strange] - expected[strange]) <= 0x100).all()
    assert strange.any()
    assert (np.abs((bits[strange] & 0xFFFF) - 0x8000) < 0x100).all()


def test_nans_stay_nans() -> None:
    master = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    again = remainders.joined(*remainders.split(master, 8))
    assert again[0].isnan()
    assert torch.equal(again[1:], master[1:])


def test_joined_masters_are_split_into_themselves() -> None:
    """Every weight beside remainders that only occur beside one that the user wrote, too."""
    stored = np.unique([*range(-128, 128, 9), -128, -127, -1, 0, 1, 126, 127])
    upper, remainder = (x.ravel() for x in np.meshgrid(np.arange(2**16), stored, indexing="ij"))
    model = torch.from_numpy(upper.astype(np.uint16).view(np.int16)).view(BF16)
    masters = remainders.joined(model, torch.from_numpy(remainder.astype(np.int8)))
    numbers = ~masters.isnan()
    weights, kept = remainders.split(masters[numbers], 8)
    assert torch.equal(weights.view(torch.int16), model[numbers].view(torch.int16))
    assert torch.equal(remainders.joined(weights, kept), masters[numbers])


# -- whole optimizers ----------------------------------------------------------------------------------------


def rounded_to_24_bits(values: Any) -> Any:
    """By arithmetic on float64: 16 significant bits, ties to even; a tie above a weight of 8 bits is one less."""
    fraction, exponent = np.frexp(np.abs(values))
    rounded, weight, unit = np.rint(fraction * 2.0**16), np.rint(fraction * 2.0**8) * 2.0**8, exponent - 16
    return np.copysign(np.ldexp(rounded - (rounded - weight == 128), unit), values)


def differing(values: Any, expected: Any) -> Any:
    """By more than the fp32 ulp by which a tie below an odd weight is larger, so that it rounds to that weight."""
    return np.abs(values - expected) > 2.0**-22 * np.abs(expected)


def expect_rounded(case: Case, world: int, rounds: bool = True) -> OracleLamb:
    """A float64 LAMB whose weights are rounded after every step, unless ``rounds`` is False."""
    values = {name: value.double().numpy() for name, value in initial_values(case).items()}
    oracle = OracleLamb(values, no_decay=case.no_decay, no_adapt=case.no_adapt, **case.options)
    for step in range(case.steps):
        oracle.step(average(rank_gradients(case, step, world)))
        if rounds:
            oracle.params = {name: rounded_to_24_bits(value) for name, value in oracle.params.items()}
    return oracle


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_it_is_a_lamb_that_rounds_its_weights(world: int, stage: int) -> None:
    """Ratios are exact for the stored weights. An fp32 value on the other side of a tie rounds the other way: one
    element in twenty, by a unit in the last place."""
    plain = low_case(BF16, stage, **EIGHT)
    case = Case(
        {"a": (31, 37), "b": (700,)},
        options={"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1},
        settings=plain.settings,
        dtypes=dict.fromkeys("ab", BF16),
        missing=0.0,
        bits=7,
        steps=12,
    )
    oracle, outcomes = expect_rounded(case, world), run_ranks(world, run, case, world)
    not_rounded = expect_rounded(case, world, rounds=False)
    for name, master in outcomes[0].masters.items():
        values, expected = master.double().numpy(), oracle.params[name]
        assert np.abs(values - expected).max() <= 2.0**-14 * np.abs(expected).max()
        assert differing(values, expected).mean() <= 0.05
        assert differing(rounded_to_24_bits(not_rounded.params[name]), expected).mean() > 0.2
        assert torch.equal(outcomes[0].params[name], master.to(BF16))
        assert not differing(values, rounded_to_24_bits(values)).any()
        assert outcomes[0].ratios[-1][name] == pytest.approx(oracle.ratios[name], rel=2e-5)
    for outcome in outcomes:
        training.assert_same_bits(outcome.params, outcomes[0].params)


def fsdp_run(rank: int, bits: int) -> models.Run:
    tree = models.sharded_tree(models.named_mesh(dp=2), BF16)
    opt = ShardedLamb(models.two_groups(tree), **models.GROUPED, store_param_remainders=bits)
    return models.train(tree, opt, lambda step: tree(models.gradients(rank, step)), 8)


def resumed(rank: int, folder: str, first: Any, second: Any) -> tuple[bool, float]:
    """(whether both runs continue to the same bits, the number of masters compared). Compares the loaded masters."""

    def made(bits: Any) -> tuple[nn.Module, ShardedLamb]:
        weights = training.weights({"a": (31, 5), "b": (300,)})
        model = nn.ParameterDict({name: Parameter(w.to(BF16)) for name, w in weights.items()})
        return model, ShardedLamb(model.named_parameters(), lr=0.05, store_param_remainders=bits)

    def step(model: nn.Module, optimizer: ShardedLamb, number: int) -> None:
        for name, p in model.named_parameters():
            p.grad = training.draw(tuple(p.shape), name, number).to(BF16)
        optimizer.step()

    def masters(optimizer: ShardedLamb) -> dict[int, Tensor]:
        full = optimizer.full_state_dict()
        return {} if full is None else {key: state["master"] for key, state in full["state"].items()}

    model, optimizer = made(first)
    for number in range(3):
        step(model, optimizer, number)
    checkpoint.save(folder, model, optimizer)
    other, loaded = made(second)
    checkpoint.load(folder, other, loaded)
    saved, found = masters(optimizer), masters(loaded)
    for key, value in saved.items():
        expected = value.double().numpy()
        expected = rounded_to_24_bits(expected) if second == 8 else expected
        assert not differing(found[key].double().numpy(), expected).any()
    step(model, optimizer, 3)
    step(other, loaded, 3)
    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    return same, float(len(saved))


@pytest.mark.parametrize(("first", "second"), [(8, 8), (8, False), (False, 8), (8, 16), (16, 8)])
def test_checkpoints_load_with_other_masters(first: Any, second: Any, tmp_path: Path) -> None:
    """A run of 24-bit masters resumes to the same bits; others load rounded, or whole."""
    outcomes = run_ranks(2, resumed, str(tmp_path / "saved"), first, second)
    if first == second:
        assert all(same for same, _ in outcomes)


def test_fully_sharded_models_store_a_byte() -> None:
    eight, sixteen = (run_ranks(2, fsdp_run, bits)[0] for bits in (8, 16))
    assert eight.memory == {**sixteen.memory, "masters": sum(eight.local_sizes.values())}
    assert sixteen.memory["masters"] == 2 * eight.memory["masters"]
    for name, master in eight.masters.items():
        values = master.double().numpy()
        assert not differing(values, rounded_to_24_bits(values)).any()
        gap = np.linalg.norm(values - sixteen.masters[name].double().numpy())
        assert 0 < gap <= 2.0**-14 * np.linalg.norm(values)


@pytest.mark.parametrize("value", [4, 24, "8", -1, 8.5])
def test_other_sizes_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="store_param_remainders must be False, True"):
        ShardedLamb([Parameter(torch.ones(3, dtype=BF16))], store_param_remainders=value)
