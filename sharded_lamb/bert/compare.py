"""``python -m sharded_lamb.bert.compare LABEL=RUN,RUN …``: runs' held-out losses, and their curves in one picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Runs = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
"""{label: [rows of metrics.jsonl of each of its runs]}."""

HELDOUT = {"heldout_loss": "heldout_curve", "heldout_causal_loss": "heldout_causal_curve"}
"""Losses of metrics.jsonl → their keys in the JSON."""

WINDOW = 50
"""Points of a curve: each is the mean of a fiftieth of the steps."""


def read(arguments: Sequence[str]) -> Runs:
    """The runs of ``LABEL=RUN,RUN`` arguments.

    Raises:
        ValueError: an argument has another form, or a folder has no whole metrics.jsonl with a held-out loss.
    """
    runs: dict[str, list[list[Mapping[str, Any]]]] = {}
    for argument in arguments:
        label, separator, folders = argument.partition("=")
        if not (label and separator and folders):
            raise ValueError(f"{argument!r}: expected LABEL=RUN,RUN, as in 8-bit=runs/a,runs/b")
        runs[label] = [_rows(Path(folder)) for folder in folders.split(",")]
    return runs


def _rows(folder: Path) -> list[Mapping[str, Any]]:
    path = folder / "metrics.jsonl"
    rows = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1
    ):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: cut off, or no JSON ({error})") from None
    if not any(row.get("heldout_loss") is not None for row in rows):
        raise ValueError(f"{path}: no held-out loss; give the folders of runs that have ended")
    return rows


def heldout(rows: Sequence[Mapping[str, Any]]) -> float:
    """The last held-out loss of a run."""
    return float([row["heldout_loss"] for row in rows if row.get("heldout_loss") is not None][-1])


def curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, mean training loss until it from the point before)."""
    losses = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    size = max(1, len(losses) // WINDOW)
    pieces = [losses[first : first + size] for first in range(0, len(losses) - size + 1, size)]
    return [(piece[-1][0], fmean(loss for _, loss in piece)) for piece in pieces]


def evaluations(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, held-out loss ``name``) wherever it was evaluated."""
    found = {row["step"]: row[name] for row in rows if row.get(name) is not None}
    return sorted(found.items())


def table(runs: Runs) -> str:
    lines = ["| runs | held-out loss | mean | lowest to highest |", "|---|---|---|---|"]
    for label, each in runs.items():
        losses = [heldout(rows) for rows in each]
        values = ", ".join(f"{loss:.3f}" for loss in losses)
        lines.append(f"| {label} | {values} | {fmean(losses):.3f} | {min(losses):.3f} to {max(losses):.3f} |")
    return "\n".join(lines)


def draw(runs: Runs, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (label, each) in enumerate(runs.items()):
        for index, rows in enumerate(each):
            steps, losses = zip(*curve(rows), strict=True)
            axis.plot(steps, losses, color=f"C{number}", linewidth=1, label=None if index else label)
            for name, marker in zip(HELDOUT, "ox", strict=True):
                points = [*zip(*evaluations(rows, name), strict=True)]
                axis.plot(*points, color=f"C{number}", marker=marker, markersize=4, linestyle="")
    axis.set(xlabel="step", ylabel="loss: training (lines), held-out (o), causal (x)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def _content(runs: Runs) -> dict[str, Any]:
    """Held-out losses and curves, rounded, as plain data."""
    content = {
        label: [
            {
                "heldout_loss": heldout(rows),
                "curve": curve(rows),
                **{key: found for name, key in HELDOUT.items() if (found := evaluations(rows, name))},
            }
            for rows in each
        ]
        for label, each in runs.items()
    }
    rounded: dict[str, Any] = json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 4))
    return rounded


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 with a line on stderr for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m sharded_lamb.bert.compare", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN,RUN")
    parser.add_argument("--png", type=Path, metavar="PATH")
    parser.add_argument("--json", type=Path, metavar="PATH", help="held-out losses and curves")
    chosen = parser.parse_args(arguments)
    try:
        runs = read(chosen.runs)
        print(table(runs))
        if chosen.json:
            chosen.json.write_text(json.dumps(_content(runs)) + "\n")
        if chosen.png:
            draw(runs, chosen.png)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
