"""Save in one layout, load in another: 3 steps before, 2 after, compared with the run that never stopped.

The file format knows no layout. Every layout is therefore saved and loaded on its own ranks, and saved for the next one
of the list, so that each writes what another reads and reads what another wrote.
"""

from pathlib import Path

import pytest
import torch

from tests import training
from tests.checkpoint.cases import Whole, resumed, saved, saved_and_resumed
from tests.harness import run_ranks
from tests.layouts import Layout

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
    Layout(2, stage=2, dtype=torch.bfloat16, remainders=True),
    Layout(2, dtype=torch.bfloat16),
    Layout(4, dtype=torch.bfloat16, remainders=True),
    Layout(4, axes=("dp", "tp"), dtype=torch.bfloat16),
]
PAIRS = [*zip(LAYOUTS, [*LAYOUTS[1:], LAYOUTS[0]], strict=True)]
HALF_PAIRS = [*zip(HALF, [*HALF[1:], HALF[0]], strict=True)]


@pytest.mark.parametrize("pairs", [PAIRS, HALF_PAIRS])
def test_pairs_of_one_arithmetic_and_of_two_are_compared(pairs: list[tuple[Layout, Layout]]) -> None:
    """The first to the bit, the others to a tolerance."""
    assert {source.arithmetic == target.arithmetic for source, target in pairs} == {False, True}


def assert_same_run(run: Whole, expected: Whole, *, bits: bool) -> None:
    weights, state = run
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


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_fp32(source: Layout, target: Layout, tmp_path: Path) -> None:
    runs = run_ranks(source.world, saved_and_resumed, source, tmp_path / "c")
    at_save, end = runs[0][0]
    other = run_ranks(target.world, resumed, target, tmp_path / "c")
    for layout, ranks in ((source, [own for _, own in runs]), (target, other)):
        for rank, (loaded, later) in enumerate(ranks):
            assert (loaded[1] is None) == (rank > 0)
            assert_same_run(loaded, at_save, bits=True)
            assert_same_run(later, end, bits=source.arithmetic == layout.arithmetic)


@pytest.mark.parametrize(("source", "target"), HALF_PAIRS, ids=str)
def test_bf16_with_its_masters(source: Layout, target: Layout, tmp_path: Path) -> None:
    runs = run_ranks(source.world, saved_and_resumed, source, tmp_path / "c")
    at_save, end = runs[0][0]
    assert at_save[1] is not None
    assert all("master" in entry for entry in at_save[1].values())
    other = run_ranks(target.world, resumed, target, tmp_path / "c")
    for layout, ranks in ((source, [own for _, own in runs]), (target, other)):
        for loaded, later in ranks:
            assert_same_run(loaded, at_save, bits=True)
            if source.arithmetic == layout.arithmetic:
                assert_same_run(later, end, bits=True)
            elif later[1] is not None:
                masters, expected = (
                    {p: e["master"] for p, e in state.items()} for state in (later[1], end[1] or {})
                )
                for param, value in expected.items():
                    assert (masters[param] - value).norm() <= 1e-6 * value.norm()


Saved = tuple[Path, Whole]
"""A checkpoint, and the run as it was saved."""


@pytest.fixture(scope="module")
def fp32_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("fp32") / "c"
    return folder, run_ranks(LAYOUTS[1].world, saved, LAYOUTS[1], folder)[0][0]


@pytest.fixture(scope="module")
def bf16_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("bf16") / "c"
    return folder, run_ranks(HALF[0].world, saved, HALF[0], folder)[0][0]


@pytest.mark.parametrize("target", HALF, ids=str)
def test_fp32_into_bf16(target: Layout, fp32_checkpoint: Saved) -> None:
    """The fp32 weights are the masters, and the weights are those rounded."""
    folder, (weights, state) = fp32_checkpoint
    assert state is not None
    for (loaded, full), _ in run_ranks(target.world, resumed, target, folder):
        training.assert_same_bits(loaded, {name: value.bfloat16() for name, value in weights.items()})
        if full is not None:
            for place, (name, value) in enumerate(ordered(weights)):
                assert torch.equal(full[place]["master"], value), name
                assert torch.equal(full[place]["exp_avg_sq"], state[place]["exp_avg_sq"])
                assert full[place]["step"] == 3


@pytest.mark.parametrize("target", LAYOUTS[1:7:2], ids=str)
def test_bf16_into_fp32(target: Layout, bf16_checkpoint: Saved) -> None:
    """The weights are the saved masters, not the saved bf16 weights."""
    folder, (weights, state) = bf16_checkpoint
    assert state is not None
    masters = {name: state[place]["master"] for place, (name, _) in enumerate(ordered(weights))}
    assert any(not torch.equal(masters[name], value.float()) for name, value in weights.items())
    for (loaded, _), _ in run_ranks(target.world, resumed, target, folder):
        training.assert_same_bits(loaded, masters)


def ordered(weights: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """In the order of the groups of `cases.groups`."""
    return sorted(weights.items(), key=lambda item: item[1].ndim <= 1)
