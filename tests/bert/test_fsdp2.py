"""`parallel: fsdp2`: the same configuration, the same curve, and checkpoints that go to and fro."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sharded_lamb.bert.config import build_config
from sharded_lamb.bert.dryrun import describe
from sharded_lamb.checkpoint import read_contents
from tests.bert.test_train import Ended, distance, losses, train
from tests.harness import run_ranks

SAME = 1e-6  # relative, of fp32 losses and weights
# Steps that depend on the ratios, of 1, 2 and 3 micro-batches.
SHARP = ["phases.0.steps=6", "phases.0.lr=0.1", "model.initializer_range=0.1"]
SHARP += ["phases.0.ramp={start: 6, steps: 4}", "batch.max_micro_batch=2"]


def trained(
    tree: dict[str, Any], run_dir: Path, *overrides: str, world: int = 2, resume: str | None = None
) -> Ended:
    run_ranks(world, train, tree, str(run_dir), list(overrides), resume)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = max((run_dir / "checkpoints").glob("step-*"))
    return rows, read_contents(last).weights


def test_a_run_is_the_same_under_fully_shard(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = {**tree, "log": {"trust_ratio_steps": 3, "fill_mask": ["the [MASK] of a"]}}
    ours = trained(tree, tmp_path / "ours", "parallel=zero2", *SHARP)
    for world in (2, 3):
        run_dir = tmp_path / f"on {world}"
        assert_same(trained(tree, run_dir, "parallel=fsdp2", *SHARP, world=world), ours)
        exported = load_file(str(run_dir / "hf" / "model.safetensors"))
        assert distance(load_file(str(tmp_path / "ours" / "hf" / "model.safetensors")), exported) < SAME


def assert_same(run: Ended, expected: Ended) -> None:
    (again, ends), (rows, weights) = run, expected
    assert losses(again) == pytest.approx(losses(rows), rel=SAME)
    assert [row["grad_norm"] for row in again[:-1]] == pytest.approx(
        [row["grad_norm"] for row in rows[:-1]], rel=1e-5
    )
    for key in ("heldout_loss", "heldout_accuracy"):
        assert again[-1][key] == pytest.approx(rows[-1][key], rel=SAME)
    assert distance(weights, ends) < SAME


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (["speed.precision=bf16"], 2e-4),
        (["speed.precision=bf16_autocast"], 2e-4),
        (
            [
                *("data.nsp=true", "speed.activation_checkpointing=true", "model.dropout=0.1"),
                *("optimizer.exclude_from_weight_decay=['^bert\\.']", "optimizer.weight_decay=0.3"),
            ],
            SAME,
        ),
    ],
)
def test_settings_mean_the_same(
    tree: dict[str, Any], tmp_path: Path, settings: list[str], tolerance: float
) -> None:
    settings = [*settings, "phases.0.steps=3"]
    rows, weights = trained(tree, tmp_path / "ours", "parallel=zero2", *settings)
    again, ends = trained(tree, tmp_path / "fsdp2", "parallel=fsdp2", *settings)
    assert losses(again) == pytest.approx(losses(rows), rel=tolerance)
    assert {w.dtype for w in ends.values()} == {w.dtype for w in weights.values()}
    assert distance(weights, ends) < 10 * tolerance


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", SAME), ("bf16", 2e-4)])
def test_a_run_moves_between_ways_of_sharding(
    tree: dict[str, Any], tmp_path: Path, precision: str, tolerance: float
) -> None:
    shape = [f"speed.precision={precision}", "phases.0.lr=0.05"]
    rows, weights = trained(tree, tmp_path / "whole", "parallel=zero2", *shape)
    moved = tmp_path / "moved"
    for total, way, world in ((2, "fsdp2", 2), (4, "zero2", 1), (5, "fsdp2", 3), (6, "fsdp2", 1)):
        stop = [f"checkpoint.every_steps={total}", "checkpoint.keep=0"]
        again, ends = trained(tree, moved, f"parallel={way}", *shape, *stop, world=world, resume="auto")
        for saved in (moved / "checkpoints").glob("step-*"):
            if int(saved.name.removeprefix("step-")) > total:
                for file in saved.iterdir():
                    file.unlink()
                saved.rmdir()
    assert losses(again) == pytest.approx(losses(rows), rel=tolerance)
    assert distance(weights, ends) < 10 * tolerance


def test_dry_run_counts_what_is_cut(tree: dict[str, Any]) -> None:
    def bytes_of(parallel: str) -> int:
        overrides = [
            f"parallel={parallel}",
            "model.hidden_size=256",
            "model.layers=4",
            "optimizer.bucket_mb=1",
        ]
        lines = describe(build_config(tree, overrides), 4).splitlines()
        line = next(line for line in lines if "memory" in line)
        return int(line.split(" MiB")[0].split()[-1].replace(",", ""))

    assert bytes_of("fsdp2") < bytes_of("zero2") < bytes_of("ddp+zero1")
