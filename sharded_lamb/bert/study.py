"""The batch-scaling study: optimizers after the same number of examples, each tuned at every batch.

The peak rate and the warmup are searched in turn, by factors of two, with the first seed, and the best pair is trained
with further seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.picture import draw_study
from sharded_lamb.bert.shards import write_atomically
from sharded_lamb.bert.train import run
from sharded_lamb.core.hyperparams import VARIANTS
from sharded_lamb.optim.skips import DivergedError
from sharded_lamb.recipes.training.ranks import Ranks

Row = dict[str, Any]

BATCHES = (64, 256, 1024, 4096)
OPTIMIZERS = ("lamb", "lans", "adamw")
SEEDS = 3
# The peak rate with which the search begins at the smallest batch.
_FIRST_LR = {"lamb": 5e-3, "lans": 5e-3, "adamw": 1e-3, "lars": 1.0}
_HALVINGS = 10  # of a rate that diverges
_WARMUPS = (0.05, 0.1, 0.2, 0.4)  # fractions of the steps; the search begins at the second
_DIVERGED = {"heldout_loss": None, "heldout_accuracy": None}


@dataclass(frozen=True)
class StudyOptions:
    """What the study compares."""

    batches: tuple[int, ...] = BATCHES  # ascending
    optimizers: tuple[str, ...] = OPTIMIZERS
    seeds: int = SEEDS


def study_options(batches: str | None, optimizers: str | None, seeds: int | None) -> StudyOptions:
    """The options of a command line; None is the default.

    Raises:
        ValueError: batches that are not positive numbers with commas, an unknown optimizer, or no seed.
    """
    parts = [part.strip() for part in (batches or ",".join(map(str, BATCHES))).split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--batches {batches!r}: expected whole numbers with commas, such as 32,64,128")
    names = [name.strip() for name in (optimizers or ",".join(OPTIMIZERS)).split(",")]
    if not set(names) <= _FIRST_LR.keys():
        raise ValueError(f"--optimizers {optimizers!r}: expected some of {','.join(_FIRST_LR)} with commas")
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds {seeds}: expected 1 or more")
    return StudyOptions(
        tuple(sorted({int(part) for part in parts})), tuple(dict.fromkeys(names)), seeds or SEEDS
    )


def study(config: RunConfig, options: StudyOptions, ranks: Ranks) -> Path:
    """Train the runs whose result.json is missing, then write study.json, study.md and study.png. Collective.

    The number of examples of every run is the first phase's steps x global_batch, and its first seed is `config.seed`.
    Processes with other optimizers may work on the same folder; a last one of all optimizers trains nothing.

    Raises:
        ValueError: batches that do not divide by the ranks; settings or results by which two optimizers are one.
    """
    _refuse_equal_options(config, options.optimizers)
    runs = _Runs(config, Path(config.run_dir), ranks)
    best: list[Row] = []
    for optimizer in options.optimizers:
        lr, warmup = _FIRST_LR[optimizer], _WARMUPS[1]
        for before, batch in pairwise((options.batches[0], *options.batches)):
            lr *= 2.0 ** round(math.log2(batch / before) / 2)  # √(batch / before), to a power of two
            lr, warmup = _tuned(runs, optimizer, batch, lr, warmup)
            seeds = range(config.seed, config.seed + options.seeds)
            best += [runs.row(optimizer, batch, lr, warmup, seed) for seed in seeds]
    if ranks.is_first:
        runs.folder.mkdir(parents=True, exist_ok=True)
        chosen = [{**row, "chosen": row in best} for row in runs.used]
        write_atomically(runs.folder / "study.json", json.dumps(chosen, indent=1).encode())
        draw_study(best, runs.folder / "study.png")
        (runs.folder / "study.md").write_text(_table(best), encoding="utf-8")
        print(_table(best), flush=True)
    return runs.folder


def _tuned(runs: _Runs, optimizer: str, batch: int, lr: float, warmup: float) -> tuple[float, float]:
    """(peak rate, warmup) with the least held-out loss of the first seed; the search begins with those given.

    Half and twice the rate are worse at that warmup, and the warmups beside it are worse at that rate.
    """
    seed = runs.config.seed

    def with_rate(k: int) -> float:
        return runs.loss(optimizer, batch, lr * 2.0**k, warmup, seed)

    def with_warmup(k: int) -> float:
        inside = 0 <= begin + k < len(_WARMUPS)
        return runs.loss(optimizer, batch, lr, _WARMUPS[begin + k], seed) if inside else math.inf

    while True:
        lr *= 2.0 ** _descended(with_rate)
        begin = _WARMUPS.index(warmup)
        warmup = _WARMUPS[begin + _descended(with_warmup)]
        if warmup == _WARMUPS[begin]:
            return lr, warmup


def _descended(loss: Callable[[int], float]) -> int:
    """The integer, reached from 0 by steps of 1 that lessen ``loss``, both of whose neighbors are no better.

    From an infinite loss it goes down to a finite one.
    """
    here = 0
    while math.isinf(loss(here)) and here > -_HALVINGS:
        here -= 1
    for step in (1, -1):
        while loss(here + step) < loss(here):
            here += step
    return here


@dataclass
class _Runs:
    """The study's runs, each trained once, in a folder whose name has the digest of its configuration."""

    config: RunConfig
    folder: Path
    ranks: Ranks
    used: list[Row] = field(default_factory=list)  # each once

    def loss(self, optimizer: str, batch: int, lr: float, warmup: float, seed: int) -> float:
        """The held-out loss of a run; infinite if it diverged."""
        loss = self.row(optimizer, batch, lr, warmup, seed)["heldout_loss"]
        return math.inf if loss is None else loss

    def row(self, optimizer: str, batch: int, lr: float, warmup: float, seed: int) -> Row:
        """One run's results: from its folder, else by training it, or by resuming. Collective.

        The held-out loss of a run that diverged is None.

        Raises:
            ValueError: another optimizer has the same result, or a signal stopped the run.
        """
        one = self._config_of(optimizer, batch, lr, warmup, seed)
        path = Path(one.run_dir, "result.json")
        row: Row | None = self.ranks.from_first(
            lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        )
        if row is None:
            metrics = self._trained(one)
            head = {"optimizer": optimizer, "batch": batch, "lr": lr, "warmup": warmup, "seed": seed}
            row = {**head, "steps": one.phases[0].steps, "config_digest": one.digest(), **metrics}
            if self.ranks.is_first:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(row, indent=1).encode())
        _refuse_equal_results(row, self.used)
        if row not in self.used:
            self.used.append(row)
        return row

    def _trained(self, config: RunConfig) -> dict[str, Any]:
        try:
            metrics = run(config, "auto", self.ranks).metrics
        except DivergedError:
            return _DIVERGED
        if metrics is None:
            raise ValueError("a signal stopped the study; start it again to resume")
        return metrics if math.isfinite(metrics["heldout_loss"]) else {**metrics, **_DIVERGED}

    def _config_of(self, optimizer: str, batch: int, lr: float, warmup: float, seed: int) -> RunConfig:
        phase = self.config.phases[0]
        steps = max(1, phase.steps * phase.global_batch // batch)
        phase = replace(phase, steps=steps, global_batch=batch, lr=lr, warmup_fraction=warmup, ramp=None)
        variant = replace(self.config.optimizer, variant=optimizer)
        one = replace(self.config, seed=seed, phases=(phase,), optimizer=variant)
        name = f"{optimizer}-{batch}-{lr:.4g}-{warmup:g}-{seed}-{one.digest()[:8]}"
        return replace(one, run_dir=str(self.folder / name))


def _label(row: Row) -> str:
    return f"{row['optimizer']} (batch {row['batch']}, lr {row['lr']:.4g})"


def _refuse_equal_options(config: RunConfig, optimizers: Sequence[str]) -> None:
    """Raises ValueError if settings of ``optimizer`` make two optimizers equal."""
    rules: dict[str, dict[str, Any]] = {}
    for name in optimizers:
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
    """Raises ValueError if another optimizer has the same result at the same batch, rate, warmup and seed."""
    for other in others:
        same = ("batch", "lr", "warmup", "seed", "heldout_loss")
        is_equal = row["heldout_loss"] is not None and all(other[name] == row[name] for name in same)
        if is_equal and other["optimizer"] != row["optimizer"]:
            raise ValueError(
                f"{_label(other)} and {_label(row)} have the same held-out loss to the last digit, "
                f"{row['heldout_loss']!r}: expected two optimizers to differ, so both runs trained the same one; "
                f"compare config.yaml and the trust ratios in metrics.jsonl of both run folders"
            )


def _table(rows: Sequence[Row]) -> str:
    """One line for each optimizer and batch; ``rows`` are of the chosen rates, one for each seed."""
    lines = [
        "| optimizer | batch | steps | lr | warmup | held-out loss, mean (of each seed) |",
        "|---|---|---|---|---|---|",
    ]
    for optimizer, batch in sorted({(row["optimizer"], row["batch"]) for row in rows}):
        of_seeds = [row for row in rows if (row["optimizer"], row["batch"]) == (optimizer, batch)]
        losses = [row["heldout_loss"] for row in of_seeds if row["heldout_loss"] is not None]
        each = ", ".join(
            "diverged" if row["heldout_loss"] is None else f"{row['heldout_loss']:.3f}" for row in of_seeds
        )
        mean = f"{sum(losses) / len(losses):.3f}" if losses else "-"
        first = of_seeds[0]
        lines.append(
            f"| {optimizer} | {batch} | {first['steps']} | {first['lr']:.3g} | {first['warmup']:g} | {mean} ({each}) |"
        )
    return "\n".join(lines) + "\n"
