"""The picture of the batch-scaling study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_study(results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Held-out loss over the batch: one line for each optimizer, the mean of its seeds, and bars over their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for optimizer in sorted({row["optimizer"] for row in results}):
        of_batch: dict[int, list[float]] = {}
        for row in results:
            if row["optimizer"] == optimizer and row["heldout_loss"] is not None:
                of_batch.setdefault(row["batch"], []).append(row["heldout_loss"])
        means = [sum(losses) / len(losses) for losses in of_batch.values()]
        below = [mean - min(losses) for mean, losses in zip(means, of_batch.values(), strict=True)]
        above = [max(losses) - mean for mean, losses in zip(means, of_batch.values(), strict=True)]
        axis.errorbar(list(of_batch), means, yerr=[below, above], marker="o", capsize=3, label=optimizer)
    entropies = [row["unigram_entropy"] for row in results if "unigram_entropy" in row]
    if entropies:
        axis.axhline(entropies[0], linestyle="--", color="grey", label="unigram entropy")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="global batch (same number of examples)", ylabel="held-out loss")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    return path
