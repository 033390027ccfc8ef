"""Saved in any layout, loaded in any other: 5 steps before, 5 after, against the run that never stopped."""

from pathlib import Path

import pytest
import torch

from tests import training
from tests.checkpoint.cases import Layout, Whole, resumed, saved
from tests.harness import run_ranks

LAYOUTS = [
    Layout(1, stage=2),
    Layout(3, stage=1),
    Layout(2, stage=2),
    Layout(3, stage=2),
    Layout(4, stage=1, axes=("replicate", "shard")),
    Layout(4),
    Layout(2),
    Layout(4, axes=("replicate", "shard")),
    Layout(4, axes=("dp", "tp")),
    Layout(2, axes=("tp",)),
]
HALF = [
    Layout(3, stage=2, dtype=torch.bfloat16),
    Layout(2, stage=1, dtype=torch.bfloat16),
    Layout(2, dtype=torch.bfloat16),
    Layout(2, stage=2, dtype=torch.bfloat16, remainders=True),
    Layout(4, dtype=torch.bfloat16, remainders=True),
    Layout(4, axes=("dp", "tp"), dtype=torch.bfloat16),
]


def assert_same_run(found: Whole, expected: Whole, *, bits: bool) -> None:
    weights, state = found
    if bits:
        training.assert_same_bits(weights, expected[0])
    for name, value in expected[0].items():
        off = (weights[name].double() - value.double()).norm()
        assert off <= 1e-6 * value.double().norm(), (name, off)
    if state is not None:
        assert expected[1] is not None
        for place, entry in expected[1].items():
            for kind, value in entry.items():
                if bits:
                    assert torch.equal(state[place][kind], value), (place, kind)
                off = (state[place][kind].double() - value.double()).norm()
                assert off <= 1e-6 * value.double().norm(), (place, kind, off)


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_fp32(source: Layout, tmp_path: Path) -> None:
    there, end = run_ranks(source.world, saved, source, tmp_path / "c")[0]
    for target in LAYOUTS:
        for rank, (loaded, later) in enumerate(run_ranks(target.world, resumed, target, tmp_path / "c")):
            assert (loaded[1] is None) == (rank > 0)
            assert_same_run(loaded, there, bits=True)
            assert_same_run(later, end, bits=source.arithmetic == target.arithmetic)


@pytest.mark.parametrize("source", HALF, ids=str)
def test_bf16_with_its_masters(source: Layout, tmp_path: Path) -> None:
    there, end = run_ranks(source.world, saved, source, tmp_path / "c")[0]
    assert there[1] is not None
    assert all("master" in entry for entry in there[1].values())
    for target in HALF:
        for loaded, later in run_ranks(target.world, resumed, target, tmp_path / "c"):
            assert_same_run(loaded, there, bits=True)
            if source.arithmetic == target.arithmetic:
                assert_same_run(later, end, bits=True)
            elif later[1] is not None:
                masters = ({p: e["master"] for p, e in state.items()} for state in (later[1], end[1] or {}))
                found, expected = masters
                for param, value in expected.items():
                    assert (found[param] - value).norm() <= 1e-6 * value.norm()


@pytest.mark.parametrize("target", HALF, ids=str)
def test_fp32_into_bf16(target: Layout, tmp_path: Path) -> None:
    """The fp32 weights are the masters, and the weights are those rounded."""
    source = LAYOUTS[1]
    (weights, state), _ = run_ranks(source.world, saved, source, tmp_path / "c")[0]
    assert state is not None
    for (found, full), _ in run_ranks(target.world, resumed, target, tmp_path / "c"):
        training.assert_same_bits(found, {name: value.bfloat16() for name, value in weights.items()})
        if full is not None:
            for place, (name, value) in enumerate(ordered(weights)):
                assert torch.equal(full[place]["master"], value), name
                assert torch.equal(full[place]["exp_avg_sq"], state[place]["exp_avg_sq"])
                assert full[place]["step"] == 5


@pytest.mark.parametrize("target", LAYOUTS[1:7:2], ids=str)
def test_bf16_into_fp32(target: Layout, tmp_path: Path) -> None:
    """Weights are the masters, of which the saved weights are roundings."""
    source = HALF[0]
    (weights, state), _ = run_ranks(source.world, saved, source, tmp_path / "c")[0]
    assert state is not None
    masters = {name: state[place]["master"] for place, (name, _) in enumerate(ordered(weights))}
    assert any(not torch.equal(masters[name], value.float()) for name, value in weights.items())
    for (found, _), _ in run_ranks(target.world, resumed, target, tmp_path / "c"):
        training.assert_same_bits(found, masters)


def ordered(weights: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """In the order of the groups of `cases.groups`."""
    return sorted(weights.items(), key=lambda item: item[1].ndim <= 1)
