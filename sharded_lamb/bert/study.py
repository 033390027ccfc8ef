"""The batch-scaling study: LAMB, LANS, LARS and AdamW at the same number of examples, batches 32 … 1024.

Each optimizer's lr is tuned at the smallest batch and then scaled by the square root of the batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.picture import draw_study
from sharded_lamb.bert.shards import write_atomically
from sharded_lamb.bert.train import run
from sharded_lamb.core.hyperparams import VARIANTS
from sharded_lamb.recipes.training.ranks import Ranks

Row = dict[str, Any]

BATCHES = (32, 64, 128, 256, 512, 1024)
# Peak rates at the smallest batch. Common rates show whether two are different optimizers.
_TRIED = {
    "lamb": (2e-3, 5e-3, 1e-2, 2e-2),
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3),
    "lans": (2e-3, 5e-3, 1e-2, 2e-2),
    "lars": (0.5, 1.0, 2.0, 4.0),
}


def study(config: RunConfig, batches: str | None, ranks: Ranks) -> Path:
    """Train the runs missing from study.json, then write study.json, study.md and study.png. Collective.

    The number of examples of every run is the first phase's steps x global_batch.

    Raises:
        ValueError: batches that are not numbers, or do not divide by the ranks; settings or results by which the two
            optimizers are one.
    """
    sizes = _batches(batches)
    _refuse_equal_options(config)
    folder = Path(config.run_dir)
    runs = _Runs(config, folder, ranks, ranks.from_first(lambda: _read(folder)))
    chosen: list[Row] = []
    for optimizer, tried in _TRIED.items():
        best = min((runs.row(optimizer, sizes[0], lr) for lr in tried), key=lambda row: row["heldout_loss"])
        scaled = [(batch, best["lr"] * math.sqrt(batch / sizes[0])) for batch in sizes[1:]]
        chosen += [best, *(runs.row(optimizer, batch, lr) for batch, lr in scaled)]
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


def _read(folder: Path) -> list[Row]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.json"
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows


@dataclass
class _Runs:
    """The study's runs, each trained once."""

    config: RunConfig
    folder: Path
    ranks: Ranks
    saved: list[Row]  # the rows of study.json
    used: list[Row] = field(default_factory=list)  # the rows of this configuration

    def row(self, optimizer: str, batch: int, lr: float) -> Row:
        """One run's results: from study.json if its row has the digest of this configuration, else by training.

        Raises:
            ValueError: another optimizer has the same result, or a signal stopped the run.
        """
        one = self._config_of(optimizer, batch, lr)
        digest = one.digest()
        same_run = [row for row in self.saved if _is_of(row, batch, lr) and row["optimizer"] == optimizer]
        result = next((row for row in same_run if row.get("config_digest") == digest), None)
        if result is None:
            if same_run and self.ranks.is_first:
                print(
                    f"study.json: {_label(same_run[0])} has another configuration: trains it again",
                    flush=True,
                )
            metrics = run(one, "auto", self.ranks).metrics
            if metrics is None:
                raise ValueError("a signal stopped the study; start it again to train the missing runs")
            head = {"optimizer": optimizer, "batch": batch, "lr": lr, "steps": one.phases[0].steps}
            result = {**head, "config_digest": digest, **metrics}
            self.saved = [row for row in self.saved if row not in same_run] + [result]
            if self.ranks.is_first:
                write_atomically(self.folder / "study.json", json.dumps(self.saved, indent=1).encode())
        _refuse_equal_results(result, self.used)
        self.used.append(result)
        return result

    def _config_of(self, optimizer: str, batch: int, lr: float) -> RunConfig:
        phase = self.config.phases[0]
        steps = max(1, phase.steps * phase.global_batch // batch)
        return replace(
            self.config,
            run_dir=str(self.folder / f"{optimizer}-{batch}-{lr:.4g}"),
            phases=(replace(phase, steps=steps, global_batch=batch, lr=lr, ramp=None),),
            optimizer=replace(self.config.optimizer, variant=optimizer),
        )


def _is_of(row: Row, batch: int, lr: float) -> bool:
    return row["batch"] == batch and math.isclose(row["lr"], lr, rel_tol=1e-9)


def _label(row: Row) -> str:
    return f"{row['optimizer']} (batch {row['batch']}, lr {row['lr']:.4g})"


def _refuse_equal_options(config: RunConfig) -> None:
    """Raises ValueError if settings of ``optimizer`` make two optimizers equal."""
    rules: dict[str, dict[str, Any]] = {}
    for name in _TRIED:
        rule = {**VARIANTS[name], **replace(config.optimizer, variant=name).keywords()}
        del rule["variant"]
        equal = [other for other, its in rules.items() if its == rule]
        if equal:
            raise ValueError(
                f"optimizer.exclude_from_layer_adaptation={config.optimizer.exclude_from_layer_adaptation!r} makes "
                f"{equal[0]} and {name} the same optimizer, and the study compares them; remove it"
            )
        rules[name] = rule


def _refuse_equal_results(row: Row, others: Sequence[Row]) -> None:
    """Raises ValueError if another optimizer has the same result at the same batch and rate."""
    for other in others:
        same_run = other["optimizer"] != row["optimizer"] and _is_of(other, row["batch"], row["lr"])
        if same_run and other["heldout_loss"] == row["heldout_loss"]:
            raise ValueError(
                f"{_label(other)} and {_label(row)} have the same held-out loss to the last digit, "
                f"{row['heldout_loss']!r}: expected two optimizers to differ, so both runs trained the same one; "
                f"compare config.yaml and the trust ratios in metrics.jsonl of both run folders"
            )


def _table(rows: Sequence[Row]) -> str:
    lines = ["| optimizer | batch | steps | lr | held-out loss | accuracy |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r["optimizer"], r["batch"])):
        lines.append(
            f"| {row['optimizer']} | {row['batch']} | {row['steps']} | {row['lr']:.3g} | "
            f"{row['heldout_loss']:.3f} "
            f"| {row['heldout_accuracy']:.1%} |"
        )
    return "\n".join(lines) + "\n"
