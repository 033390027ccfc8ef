"""Metrics of a run: metrics.jsonl, TensorBoard, a progress bar and a picture. Only rank 0 writes."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sharded_lamb.recipes.training.step_clock import SECTIONS
from sharded_lamb.telemetry import LayerNorms, to_tensorboard

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_PROGRESS_SECONDS = 15.0  # between lines, without a terminal to redraw the bar


class MetricsLog:
    """metrics.jsonl (one object a step) and TensorBoard events of one run folder."""

    def __init__(self, run_dir: Path, resumed_at: int, title: str, total_steps: int, *, counted: str) -> None:
        """``counted``: what `{counted}_per_s` of a row counts, for the progress bar."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self._counted = counted
        self._path = run_dir / "metrics.jsonl"
        self._rows = [row for row in _read_rows(self._path) if "loss" in row and row["step"] <= resumed_at]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_at + 1)
        self._write_norms = to_tensorboard(self._board)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=resumed_at,
            desc=title,
            unit="step",
            mininterval=0.5 if terminal else _PROGRESS_SECONDS,
            dynamic_ncols=terminal,
        )
        self.run_dir = run_dir

    def step(self, row: Mapping[str, Any], norms: Mapping[str, LayerNorms]) -> None:
        """Record one optimizer step; ``norms``, which go to TensorBoard alone, may be empty."""
        self._write(row)
        self._write_norms(row["step"], norms)
        shown = {
            "loss": f"{row['loss']:.3f}",
            "lr": f"{row['lr']:.2e}",
            f"{self._counted}/s": f"{row[f'{self._counted}_per_s']:,.0f}",
            "s": " + ".join(f"{row[f'{name}_s']:.2g} {name}" for name in SECTIONS),
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def final(self, row: Mapping[str, Any]) -> None:
        """Record the last object of the file."""
        self._write(row)

    def _write(self, row: Mapping[str, Any]) -> None:
        self._rows.append(dict(row))
        self._file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step" and math.isfinite(value):
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._board.close()

    def picture(self) -> Path:
        from sharded_lamb.recipes.training.picture import draw_run

        return draw_run([row for row in self._rows if "loss" in row], self.run_dir / "curves.png")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows, without a last line that a kill cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def summarize_ratios(norms: Mapping[str, LayerNorms], layer_of: Callable[[str], str]) -> dict[str, Any]:
    """Quantiles of trust ratios, and the median of each layer. ``layer_of``: the layer of a parameter's name."""
    if not norms:
        return {}
    by_layer: dict[str, list[float]] = {}
    for name, own in norms.items():
        by_layer.setdefault(layer_of(name), []).append(own.ratio)
    return {
        "trust_ratio_quantiles": _quantiles([own.ratio for own in norms.values()]),
        "trust_ratio_by_layer": {layer: _quantiles(values)[2] for layer, values in by_layer.items()},
    }


def _quantiles(values: Sequence[float]) -> list[float]:
    points = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
    return torch.tensor(values, dtype=torch.float64, device="cpu").quantile(points).tolist()


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
