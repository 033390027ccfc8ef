"""A heat map of positive numbers on a logarithmic scale: rows by columns."""

from collections.abc import Sequence
from pathlib import Path

from sharded_lamb.pictures.figure import beside, save

_MOST_LABELS = 12  # of columns; more would overlap
_ROW_INCHES, _MOST_INCHES = 0.17, 60.0


def draw_heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    path: str | Path,
) -> None:
    """Write the picture to ``path``. Numbers that are not finite and > 0 are grey.

    Args:
        values: [rows, columns].
        rows, columns: their labels; the first row is at the top. At least one of each.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: see `sharded_lamb.pictures.figure.save`.
    """
    figure, (axis,) = beside(10, min(1.2 + _ROW_INCHES * len(rows), _MOST_INCHES), 1)
    import numpy as np
    from matplotlib.colors import LogNorm

    numbers = np.array(values, dtype=np.float64)
    shown = np.isfinite(numbers) & (numbers > 0)
    low, high = (numbers[shown].min(), numbers[shown].max()) if shown.any() else (1.0, 1.0)
    axis.set_facecolor("0.8")
    scale = LogNorm(low, high if high > low else 1.01 * low)
    mesh = axis.pcolormesh(np.ma.masked_array(numbers, ~shown), norm=scale, cmap="viridis")
    axis.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=7)
    step = -(-len(columns) // _MOST_LABELS)
    axis.set_xticks(np.arange(0, len(columns), step) + 0.5, columns[::step], fontsize=7)
    axis.invert_yaxis()
    axis.set(title=title, xlabel="step")
    figure.colorbar(mesh, ax=axis, pad=0.01)
    save(figure, path)
