"""Averages of the weights (`optimizer.ema_decay`) and one cosine over all phases, in a run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sharded_lamb.bert.config import CosineConfig, build_config
from sharded_lamb.bert.finetune.encoder import read_encoder
from sharded_lamb.bert.schedule import Cosine, schedule_of
from sharded_lamb.checkpoint import read_contents
from tests.bert.test_train import cut_off, losses, trained

DECAY = 0.7
PHASES = "phases=[{steps: 5, global_batch: 12, sequence_length: 32}, {steps: 3, global_batch: 6, sequence_length: 16}]"
AVERAGED = [
    PHASES,
    f"optimizer.ema_decay={DECAY}",
    "cosine={lr: 0.01, warmup_fraction: 0.25, final_fraction: 0.1}",
    "checkpoint.every_steps=1",
    "model.dropout=0.1",
]


def saved(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def averages(run: Path) -> dict[str, torch.Tensor]:
    """float64 averages of the weights in the run's checkpoints, one a step."""
    total: dict[str, torch.Tensor] = {}
    for path in saved(run):
        weights = {name: w.double() for name, w in read_contents(path).weights.items()}
        total = {name: DECAY * total.get(name, w) + (1 - DECAY) * w for name, w in weights.items()}
    return total


@pytest.fixture(scope="module")
def whole(
    tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("averaged") / "run"
    return trained(2, tree, folder, *AVERAGED, "log.heldout_steps=2")[0], folder


@pytest.mark.parametrize("parallel", ["zero2", "fsdp2"])
def test_exported_and_evaluated_weights_are_averages_over_all_phases(
    tree: dict[str, Any], tmp_path: Path, parallel: str, whole: tuple[list[dict[str, Any]], Path]
) -> None:
    rows, folder = whole
    if parallel == "fsdp2":
        folder = tmp_path
        rows, _ = trained(2, tree, folder, *AVERAGED, "parallel=fsdp2", "log.heldout_steps=2")
    exported, expected = load_file(folder / "hf" / "model.safetensors"), averages(folder)
    last = read_contents(saved(folder)[-1]).weights
    for name, average in exported.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(average, last[name]) for name, average in exported.items())
    for source in (folder, folder / "hf"):
        weights = read_encoder(source).weights
        assert weights is not None
        assert all(torch.equal(weights[name], exported[f"bert.{name}"]) for name in weights)
    # The same averages as a run's initial weights, which a step of no size leaves as they are.
    start = [
        f"model.pretrained={folder / 'hf'}",
        "phases=[{steps: 1, global_batch: 6, sequence_length: 16, lr: 1e-30}]",
    ]
    again, _ = trained(1, tree, tmp_path / "again", *start)
    assert again[-1]["heldout_loss"] == pytest.approx(rows[-1]["heldout_loss"], rel=1e-5)
    assert [row["step"] for row in rows if "heldout_loss" in row] == [2, 4, 6, 8, 8]


def test_a_resumed_run_has_the_same_averages_and_evaluation_changes_no_bit(
    tree: dict[str, Any], tmp_path: Path, whole: tuple[list[dict[str, Any]], Path]
) -> None:
    rows, folder = whole
    copy = cut_off(folder, tmp_path / "cut", 3)  # in the first phase
    again, weights = trained(2, tree, copy, *AVERAGED, resume="auto")  # without evaluations on the way
    before = read_contents(saved(folder)[-1])
    assert all(torch.equal(weights[name], before.weights[name]) for name in weights)
    assert losses(again) == losses(rows)
    assert again[-1]["heldout_loss"] == rows[-1]["heldout_loss"]
    assert {float(state["step"]) for state in before.states.values()} == {8.0}, (
        "steps restarted with the phase"
    )


def test_the_rate_is_one_cosine(tree: dict[str, Any], whole: tuple[list[dict[str, Any]], Path]) -> None:
    expected = [0.005, 0.01]
    for n in range(6):
        expected.append(0.001 + 0.009 * (1 + math.cos(math.pi * n / 6)) / 2)
    assert [row["lr"] for row in whole[0][:-1]] == pytest.approx(expected, rel=1e-12)
    schedule = schedule_of(build_config(tree, AVERAGED), 1)
    assert schedule == Cosine(CosineConfig(0.01, 0.25, 0.1), before=5, steps=8)
    assert "lr 0.01, 2 steps of warmup, cosine to 0.001 after 8 steps" in schedule.describe()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cosine.lr=0.1"], r"phases\.0\.lr=0\.01: expected auto with cosine"),
        (
            ["phases.0.lr=auto", "cosine.lr=0.1"],
            r"phases\.0\.warmup_fraction=0\.2: expected auto with cosine",
        ),
        (["cosine={lr: 0.1, final_fraction: 1}"], r"cosine\.final_fraction=1: expected a number in \[0, 1\)"),
        (["optimizer.ema_decay=1"], r"optimizer\.ema_decay=1: expected null or a number in \(0, 1\)"),
        (
            ["optimizer.ema_decay=0.9", "parallel=deepspeed"],
            r"ema_decay=0\.9: expected None with parallel: deep",
        ),
        (
            ["phases.0.ramp={start: 6, steps: 3, multiple_of: 4}"],
            r"multiple_of=4: expected a divisor of start=6",
        ),
    ],
)
def test_wrong_values_are_named(tree: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(tree, overrides)


def test_runs_without_them_keep_their_digest(tree: dict[str, Any]) -> None:
    plain = build_config(tree, ["phases.0.ramp={start: 6, steps: 3}"])
    settings = plain.trained_settings()
    assert "cosine" not in settings
    assert "ema_decay" not in settings["optimizer"]
    assert settings["phases"][0]["ramp"] == {"start": 6, "steps": 3}
    for override in ("optimizer.ema_decay=0.9", "phases.0.ramp.multiple_of=3"):
        assert build_config(tree, ["phases.0.ramp={start: 6, steps: 3}", override]).digest() != plain.digest()
