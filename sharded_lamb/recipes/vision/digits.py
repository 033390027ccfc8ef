"""LAMB beside AdamW on scikit-learn's digits: rates tuned on validation, then accuracy on test over seeds."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharded_lamb.bench import report
from sharded_lamb.pictures import figure
from sharded_lamb.recipes.training.config_io import build_config
from sharded_lamb.recipes.training.ranks import Ranks
from sharded_lamb.recipes.vision.config import VisionConfig
from sharded_lamb.recipes.vision.train import run

Row = dict[str, Any]

TUNED = {"lamb": (1e-2, 2e-2, 4e-2, 8e-2), "adamw": (4e-3, 8e-3, 1.6e-2, 3.2e-2)}
"""{variant: the rates tried}, whose ends are worse than the best."""

TUNING_SEED = 0
SEEDS = (1, 2, 3)

SETTINGS: Mapping[str, Any] = {
    "model": {"name": "small-vit", "options": {"width": 32, "depth": 2}},
    "data": {"source": "digits", "size": 8, "crop": 1.0, "mean": [0.305], "std": [0.376]},
    "optimizer": {"weight_decay": 0.02, "max_grad_norm": 1.0},
    "schedule": {"epochs": 20, "lr": 1e-2, "global_batch": 128, "warmup_epochs": 4},
    "checkpoint": {"every_steps": 10**6, "keep": 1},
    "log": {"picture": False},
    "speed": {"precision": "fp32", "threads": 1},
}


def compare(
    out: Path, ranks: Ranks, settings: Mapping[str, Any] = SETTINGS, seeds: Sequence[int] = SEEDS
) -> Path:
    """Trains, and writes digits.json and digits.png into ``out``. Collective. Returns ``out``.

    The rate with the least validation loss at `TUNING_SEED` is trained with ``seeds``; only these runs see the test
    split, once, at their end.
    """
    base = build_config(VisionConfig, settings)
    tuning: list[Row] = []
    final: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="vision-digits-") as own:
        folder = Path(ranks.from_first(lambda: own))
        for variant, rates in TUNED.items():
            tried = [_trained(base, folder, ranks, variant, lr, TUNING_SEED) for lr in rates]
            best = min(tried, key=lambda row: row["heldout_loss"])
            tuning += tried
            final += [_trained(base, folder, ranks, variant, best["lr"], seed, "test") for seed in seeds]
        if ranks.is_first:
            _publish(out, ranks, base, tuning, final)
    return out


def _trained(
    base: VisionConfig,
    folder: Path,
    ranks: Ranks,
    variant: str,
    lr: float,
    seed: int,
    test: str | None = None,
) -> Row:
    """One run's results, with the numbers of its epochs."""
    run_dir = folder / f"{variant}-{lr:g}-{seed}"
    config = replace(
        base,
        run_dir=str(run_dir),
        seed=seed,
        data=replace(base.data, test=test),
        optimizer=replace(base.optimizer, variant=variant),
        schedule=replace(base.schedule, lr=lr),
    )
    metrics = run(config, None, ranks).metrics
    if metrics is None:
        raise ValueError("a signal stopped the comparison")
    curve = ranks.from_first(lambda: _curve(run_dir / "metrics.jsonl"))
    kept = {key: round(value, 6) for key, value in metrics.items() if key.endswith(("_loss", "_accuracy"))}
    return {"optimizer": variant, "lr": lr, "seed": seed, **kept, "curve": curve}


def _curve(path: Path) -> list[list[float]]:
    """[training loss, validation accuracy] of each epoch that was evaluated."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        [round(row["loss"], 4), round(row["heldout_accuracy"], 4)]
        for row in rows
        if "loss" in row and "heldout_accuracy" in row
    ]


def table(tuning: Sequence[Row], final: Sequence[Row]) -> str:
    """Accuracy on test: median, least and most over seeds, at the rate of the least validation loss."""
    lines = []
    for variant in dict.fromkeys(row["optimizer"] for row in final):
        own = [row for row in final if row["optimizer"] == variant]
        right = [row["test_accuracy"] for row in own]
        tried = ", ".join(f"{row['lr']:g}" for row in tuning if row["optimizer"] == variant)
        lines.append(
            [
                variant,
                f"{statistics.median(right):.1%}",
                f"{min(right):.1%} to {max(right):.1%}, {len(right)} seeds",
                f"{statistics.median(row['test_loss'] for row in own):.3f}",
                f"{own[0]['lr']:g} of {tried}",
            ]
        )
    return report.table(["", "accuracy on test", "over seeds", "loss on test", "learning rate"], lines)


def _publish(
    out: Path, ranks: Ranks, config: VisionConfig, tuning: Sequence[Row], final: Sequence[Row]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in config.trained_settings().items() if name != "seed"}
    content = {"about": report.about(ranks.device), "settings": settings, "tuning": tuning, "final": final}
    (out / "digits.json").write_text(report.dumped(content))
    draw(tuning, final, out / "digits.png")
    print(table(tuning, final), f"results in {out}", sep="\n", flush=True)


def draw(tuning: Sequence[Row], final: Sequence[Row], path: Path) -> None:
    """Training loss and validation accuracy over epochs, a line a seed, and validation loss over the rates."""
    drawing, (losses, right, rates) = figure.beside(13, 4, 3)
    for color, variant in enumerate(dict.fromkeys(row["optimizer"] for row in final)):
        own = [row for row in final if row["optimizer"] == variant]
        for seed, row in enumerate(own):
            for axis, values in zip((losses, right), zip(*row["curve"], strict=True), strict=True):
                label = f"{variant}, lr {row['lr']:g}" if not seed else None
                axis.plot(values, color=f"C{color}", linewidth=1, alpha=0.7, label=label)
        tried = [row for row in tuning if row["optimizer"] == variant]
        least = [row["heldout_loss"] for row in tried]
        rates.plot([row["lr"] for row in tried], least, color=f"C{color}", marker="o", label=variant)
    losses.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="validation accuracy", ylim=(0.8, 1.0))
    rates.set(xlabel="learning rate", ylabel="validation loss", xscale="log")
    rates.tick_params(which="minor", labelbottom=False)
    for axis in (losses, right, rates):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.save(drawing, path)
