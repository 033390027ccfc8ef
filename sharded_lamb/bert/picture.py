"""The picture of the batch-scaling study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_study(results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Held-out loss over the batch, one line for each optimizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for optimizer in sorted({row["optimizer"] for row in results}):
        points = sorted(
            (row["batch"], row["heldout_loss"]) for row in results if row["optimizer"] == optimizer
        )
        axis.plot(*zip(*points, strict=True), marker="o", label=optimizer)
    if results:
        axis.axhline(results[0]["unigram_entropy"], linestyle="--", color="grey", label="unigram entropy")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="global batch (same number of examples)", ylabel="held-out loss")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    return path
