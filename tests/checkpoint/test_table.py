"""Save in one layout, load in another: 3 steps before, 2 after, compared with the run that never stopped.

The file format knows no layout. Every layout is therefore saved and loaded on its own ranks, saved for one hub layout,
and loaded from the hub; in fp32 it is also saved for the next one of the other layouts. `targets` lists them.
"""

from collections.abc import Sequence
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
    Layout(2, dtype=torch.bfloat16),
    Layout(2, stage=2, dtype=torch.bfloat16, remainders=True),
    Layout(4, dtype=torch.bfloat16, remainders=True),
    Layout(4, axes=("dp", "tp"), dtype=torch.bfloat16),
]
HUB, HALF_HUB = LAYOUTS[2], HALF[3]  # both of the arithmetic that most layouts share


def targets(source: Layout, layouts: Sequence[Layout], hub: Layout) -> list[Layout]:
    """The layouts that load ``source``'s checkpoint, beside ``source`` itself."""
    others = [layout for layout in layouts if layout != hub]
    if source == hub:
        return others
    if hub == HALF_HUB:
        return [hub]
    return [hub, others[(others.index(source) + 1) % len(others)]]


@pytest.mark.parametrize(("layouts", "hub", "count"), [(LAYOUTS, HUB, 27), (HALF, HALF_HUB, 10)])
def test_every_layout_is_saved_for_and_loaded_from_another(
    layouts: list[Layout], hub: Layout, count: int
) -> None:
    pairs = {(source, target) for source in layouts for target in targets(source, layouts, hub)}
    assert len(pairs) == count
    for layout in layouts:
        if layout != hub:
            assert {(layout, hub), (hub, layout)} <= pairs
            assert any(source == layout and target != hub for source, target in pairs) == (hub == HUB)
            assert any(target == layout and source != hub for source, target in pairs) == (hub == HUB)


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


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_fp32(source: Layout, tmp_path: Path) -> None:
    runs = run_ranks(source.world, saved_and_resumed, source, tmp_path / "c")
    at_save, end = runs[0][0]
    loaded_by = {source: [own for _, own in runs]}
    for target in targets(source, LAYOUTS, HUB):
        loaded_by[target] = run_ranks(target.world, resumed, target, tmp_path / "c")
    for target, ranks in loaded_by.items():
        for rank, (loaded, later) in enumerate(ranks):
            assert (loaded[1] is None) == (rank > 0)
            assert_same_run(loaded, at_save, bits=True)
            assert_same_run(later, end, bits=source.arithmetic == target.arithmetic)


@pytest.mark.parametrize("source", HALF, ids=str)
def test_bf16_with_its_masters(source: Layout, tmp_path: Path) -> None:
    runs = run_ranks(source.world, saved_and_resumed, source, tmp_path / "c")
    at_save, end = runs[0][0]
    assert at_save[1] is not None
    assert all("master" in entry for entry in at_save[1].values())
    loaded_by = {source: [own for _, own in runs]}
    for target in targets(source, HALF, HALF_HUB):
        loaded_by[target] = run_ranks(target.world, resumed, target, tmp_path / "c")
    for target, ranks in loaded_by.items():
        for loaded, later in ranks:
            assert_same_run(loaded, at_save, bits=True)
            if source.arithmetic == target.arithmetic:
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
