"""The results of several rates and seeds: the best rate, a table, and values that JSON has."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def best_rate(runs: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """The rate with the highest median over seeds of the first metric, and the median of every metric at it."""
    medians = []
    for lr in dict.fromkeys(row["lr"] for row in runs):
        same = [row for row in runs if row["lr"] == lr]
        medians.append({"lr": lr, **{name: _median([row[name] for row in same]) for name in metrics}})
    return max(medians, key=lambda row: _or_least(row[metrics[0]]))


def _median(values: Sequence[float]) -> float:
    middle = statistics.median(_or_least(value) for value in values)
    return middle if math.isfinite(middle) else math.nan


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def table(result: Mapping[str, Any]) -> str:
    """The best of every way as Markdown: the median over seeds, and the lowest and highest of the first metric."""
    metrics = result["task"]["metrics"]
    lines = [
        f"{result['task']['name']}: {result['task']['train']} examples to train, {result['task']['dev']} of dev",
        "",
        f"| | {' | '.join(metrics)} | range of {metrics[0]} | lr |",
        "|" + "---|" * (len(metrics) + 3),
        *(_line(name, row, metrics, "", "") for name, row in result["baselines"].items()),
    ]
    for kind, best in result["best"].items():
        same = [row for row in result["runs"] if (row["weights"], row["lr"]) == (kind, best["lr"])]
        values = sorted((row[metrics[0]] for row in same), key=_or_least)
        spread = f"{shown(values[0])} to {shown(values[-1])}, {len(values)} seed{'s' * (len(values) > 1)}"
        lines.append(_line(f"{kind} weights", best, metrics, spread, f"{best['lr']:g}"))
    return "\n".join(lines)


def _line(name: str, row: Mapping[str, float], metrics: Sequence[str], spread: str, lr: str) -> str:
    return f"| {name} | {' | '.join(shown(row[metric]) for metric in metrics)} | {spread} | {lr} |"


def shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "undefined" if math.isnan(value) else f"{value:.4g}"


def without_nan(value: Any) -> Any:
    """With null in place of nan, which JSON lacks."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
