"""The picture of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_run(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Loss, learning rate, gradient norm and trust ratios by layer over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    steps = [row["step"] for row in rows]
    panels = (("loss", "loss"), ("lr", "learning rate"), ("grad_norm", "gradient norm"))
    for axis, (name, title) in zip(axes.flat, panels, strict=False):
        axis.plot(steps, [row.get(name) for row in rows], linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    evaluated = [row for row in rows if row.get("heldout_loss") is not None]
    if evaluated:
        losses = [row["heldout_loss"] for row in evaluated]
        axes[0, 0].plot([row["step"] for row in evaluated], losses, marker="o", label="held-out")
    if rows and "unigram_entropy" in rows[0]:
        axes[0, 0].axhline(rows[0]["unigram_entropy"], linestyle="--", color="grey", label="unigram entropy")
        axes[0, 0].legend()
    axis = axes[1, 1]
    with_ratios = [row for row in rows if "trust_ratio_by_layer" in row]
    for layer in with_ratios[0]["trust_ratio_by_layer"] if with_ratios else ():
        values = [row["trust_ratio_by_layer"][layer] for row in with_ratios]
        axis.plot([row["step"] for row in with_ratios], values, linewidth=1, label=layer)
    axis.set(title="median trust ratio by layer", xlabel="step", yscale="log")
    axis.grid(alpha=0.3)
    if with_ratios:
        axis.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)
    return path
