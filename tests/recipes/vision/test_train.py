"""The loop: the same bits after an interruption, whatever the stage; the same numbers however a step is split."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from sharded_lamb import faults
from sharded_lamb.checkpoint import read_contents
from sharded_lamb.recipes.training import picture
from sharded_lamb.recipes.training.config_io import build_config
from sharded_lamb.recipes.training.ranks import Ranks
from sharded_lamb.recipes.vision import train as module
from sharded_lamb.recipes.vision.config import VisionConfig
from tests.harness import RankErrors, run_ranks, run_ranks_expecting_errors

Rows = list[dict[str, Any]]


class Normed(torch.nn.Module):
    """With dropout, and BatchNorm, whose statistics are buffers that ranks do not share in stage 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, 2)
        self.norm = torch.nn.BatchNorm2d(6)
        self.head = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(6, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        return out


def normed(config: VisionConfig, classes: int) -> torch.nn.Module:
    torch.manual_seed(config.seed)
    return Normed()


def train(
    rank: int,
    tree: dict[str, Any],
    run_dir: str,
    overrides: list[str],
    resume: str | None = None,
    kill_at: int | None = None,
) -> dict[str, Any] | None:
    """A run that draws no picture; the metrics at its end."""
    build = normed if "model.options={}" in overrides else module.build_model
    fault = {} if kill_at is None else {faults.VARIABLE: f"kill@step:step={kill_at}"}
    with (
        mock.patch.object(picture, "draw_run"),  # drawing takes as long as training
        mock.patch.object(module, "build_model", build),
        mock.patch.dict(os.environ, fault),
    ):
        faults.injector.cache_clear()  # an earlier case of this process may have read it
        config = build_config(VisionConfig, tree, [f"run_dir={run_dir}", *overrides])
        return module.run(config, resume, Ranks.start()).metrics


def trained(
    world: int, tree: dict[str, Any], run_dir: Path, *overrides: str, resume: str | None = None
) -> tuple[Rows, dict[str, torch.Tensor]]:
    """(rows of metrics.jsonl, the weights and buffers at the end)."""
    run_ranks(world, train, tree, str(run_dir), list(overrides), resume)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows, read_contents(max((run_dir / "checkpoints").glob("step-*"))).weights


def cut_off(finished: Path, copy: Path, step: int) -> Path:
    """The run as it stood when ``step`` was the newest checkpoint and more steps had been logged."""
    shutil.copytree(finished, copy)
    for saved in (copy / "checkpoints").glob("step-*"):
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)
    return copy


def numbers(rows: Rows) -> list[tuple[Any, ...]]:
    """What a resumed run must repeat."""
    names = ("step", "epoch", "loss", "lr", "accuracy", "sample", "heldout_loss", "heldout_accuracy")
    return [tuple(row.get(name) for name in names) for row in rows]


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    a, b = (torch.cat([weights[name].double().flatten() for name in one]) for weights in (one, two))
    return float((a - b).norm() / a.norm())


NORMED = ("model.options={}", "optimizer.ema_decay=0.9")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_ends_with_the_same_bits(
    tree: dict[str, Any], tmp_path: Path, world: int, stage: int
) -> None:
    overrides = (f"stage={stage}", *NORMED)
    rows, whole = trained(world, tree, tmp_path / "whole", *overrides)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert all(value > 0 for row in rows[:-1] for value in (row["grad_norm"], row["lr"], row["loss"]))
    copy = cut_off(tmp_path / "whole", tmp_path / "cut", 2)
    again, weights = trained(world, tree, copy, *overrides, resume="auto")
    assert all(torch.equal(weights[name], value) for name, value in whole.items())
    assert numbers(again) == numbers(rows)
    assert again[-1]["heldout_ema_loss"] == rows[-1]["heldout_ema_loss"] != rows[-1]["heldout_loss"]


def test_a_run_that_is_killed_ends_with_the_bits_of_one_that_is_not(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    rows, whole = trained(2, tree, tmp_path / "whole")
    with pytest.raises(RankErrors, match="exit code -9"):
        run_ranks(2, train, tree, str(tmp_path / "cut"), [], kill_at=3)
    again, weights = trained(2, tree, tmp_path / "cut", resume="auto")
    assert all(torch.equal(weights[name], value) for name, value in whole.items())
    assert numbers(again) == numbers(rows)


def test_neither_ranks_nor_micro_batches_nor_the_stage_change_the_numbers(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    no_dropout = {**tree, "model": {**tree["model"], "options": {**tree["model"]["options"], "dropout": 0}}}
    rows, whole = trained(1, no_dropout, tmp_path / "1", "schedule.max_micro_batch=12")
    for name, world, stage in (("2", 2, 2), ("ddp", 2, 1)):
        again, weights = trained(world, no_dropout, tmp_path / name, f"stage={stage}")
        assert distance(whole, weights) < 1e-5
        for key in ("loss", "grad_norm", "heldout_loss"):
            expected = [row[key] for row in rows if key in row]
            assert [row[key] for row in again if key in row] == pytest.approx(expected, rel=1e-5)


def test_the_run_folder_holds_what_a_user_needs(tree: dict[str, Any], tmp_path: Path) -> None:
    rows, weights = trained(1, tree, tmp_path, "data.test=test", "speed.channels_last=true")
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in weights.items())
    assert (tmp_path / "classes.txt").read_text().split() == ["ant", "bee", "cat"]
    assert (tmp_path / "config.yaml").exists()
    assert rows[-1]["test_images"] == rows[-1]["heldout_images"] == 9
    assert rows[-1]["heldout_accuracy"] > 0.5  # of three grays
    assert [row["epoch"] for row in rows[:-1]] == [0, 0, 1, 1, 2, 2]
    assert [("heldout_loss" in row) for row in rows[:-1]] == [False, True, False, True, False, False]


def test_settings_that_train_something_else_are_refused_by_name(tree: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(1, train, tree, str(tmp_path), [])
    for change, named in (
        ("optimizer.weight_decay=0.5", "optimizer.weight_decay: 0.02 there, 0.5 now"),
        ("augment.repeats=3", "augment.repeats: 1 there, 3 now"),
    ):
        errors = run_ranks_expecting_errors(1, train, tree, str(tmp_path), [change], "auto")
        assert named in errors[0][1]
    errors = run_ranks_expecting_errors(1, train, tree, str(tmp_path), [])
    assert "already contains a run" in errors[0][1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("schedule.global_batch=100", "schedule.global_batch=100: expected at most the 24 training images"),
        ("schedule.global_batch=13", "global_batch=13 can't be split evenly over 2 ranks"),
        ("model.options={depht: 3}", "model.options={'depht': 3}: "),
        ("model.options={patch: 3}", "data.size=8: expected a multiple of 3"),
        ("data.source=nowhere", "data.source='nowhere': expected 'digits' or a folder"),
    ],
)
def test_bad_settings_raise_on_every_rank(
    tree: dict[str, Any], tmp_path: Path, override: str, said: str
) -> None:
    errors = run_ranks_expecting_errors(2, train, tree, str(tmp_path), [override])
    assert all(said in message for _, message in errors.values())
