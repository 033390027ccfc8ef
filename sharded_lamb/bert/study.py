"""The batch-scaling study: LAMB and AdamW at the same number of examples, batches 32 … 1024.

Each optimizer's lr is tuned at the smallest batch and then scaled by the square root of the batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.picture import draw_study
from sharded_lamb.bert.ranks import Ranks
from sharded_lamb.bert.shards import write_atomically
from sharded_lamb.bert.train import run

BATCHES = (32, 64, 128, 256, 512, 1024)
# Peak rates tried at the smallest batch.
_TRIED = {"lamb": (2e-3, 5e-3, 1e-2, 2e-2), "adamw": (5e-4, 1e-3, 2e-3, 4e-3)}


def study(config: RunConfig, batches: str | None, ranks: Ranks) -> Path:
    """Run what is not yet in the study's results, then write study.json, study.md and study.png.

    The first phase's steps x global_batch is the number of examples of every run.

    Raises:
        ValueError: batches that are not numbers, or do not split over the ranks.
    """
    sizes = _batches(batches)
    folder = Path(config.run_dir)
    results = ranks.from_first(lambda: _read(folder))
    best: dict[str, float] = {}
    for optimizer, tried in _TRIED.items():
        tuning = [_one(config, optimizer, sizes[0], lr, folder, results, ranks) for lr in tried]
        best[optimizer] = min(tuning, key=lambda row: float(row["heldout_loss"]))["lr"]
        for batch in sizes[1:]:
            lr = best[optimizer] * math.sqrt(batch / sizes[0])
            _one(config, optimizer, batch, lr, folder, results, ranks)
    chosen = [row for row in results if _is_scaled(row, best, sizes[0])]
    if ranks.is_first:
        draw_study(chosen, folder / "study.png")
        (folder / "study.md").write_text(_table(chosen))
        print(_table(chosen), flush=True)
    return folder


def _batches(text: str | None) -> tuple[int, ...]:
    if text is None:
        return BATCHES
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"--batches {text!r}: expected whole numbers with commas, such as 32,64,128")
    return tuple(sorted(int(part) for part in text.split(",")))


def _read(folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return rows


def _is_scaled(row: dict[str, Any], best: dict[str, float], smallest: int) -> bool:
    return math.isclose(row["lr"], best[row["optimizer"]] * math.sqrt(row["batch"] / smallest), rel_tol=1e-9)


def _one(
    config: RunConfig,
    optimizer: str,
    batch: int,
    lr: float,
    folder: Path,
    results: list[dict[str, Any]],
    ranks: Ranks,
) -> dict[str, Any]:
    """One run's row, from the results if it is there."""
    for row in results:
        if (row["optimizer"], row["batch"]) == (optimizer, batch) and math.isclose(
            row["lr"], lr, rel_tol=1e-9
        ):
            return row
    phase = config.phases[0]
    steps = max(1, phase.steps * phase.global_batch // batch)
    one = replace(
        config,
        run_dir=str(folder / f"{optimizer}-{batch}-{lr:.4g}"),
        phases=(replace(phase, steps=steps, global_batch=batch, lr=lr, ramp=None),),
        optimizer=replace(config.optimizer, variant=optimizer),
    )
    metrics = run(one, "auto", ranks).metrics
    if metrics is None:
        raise ValueError("the study was asked to stop; start it again to go on with what is missing")
    row = {"optimizer": optimizer, "batch": batch, "lr": lr, "steps": steps, **metrics}
    results.append(row)
    if ranks.is_first:
        write_atomically(folder / "study.json", json.dumps(results, indent=1).encode())
    return row


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| optimizer | batch | steps | lr | held-out loss | accuracy |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r["optimizer"], r["batch"])):
        lines.append(
            f"| {row['optimizer']} | {row['batch']} | {row['steps']} | {row['lr']:.3g} | "
            f"{row['heldout_loss']:.3f} "
            f"| {row['heldout_accuracy']:.1%} |"
        )
    return "\n".join(lines) + "\n"
