"""Figures of panels: set-up and saving. The one place of the package's pictures that imports matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

DPI = 120


def stacked(width: float, heights: Sequence[float], *, share_x: bool = False) -> tuple[Any, list[Any]]:
    """A figure of panels one below the other, ``width`` and ``heights`` in inches: (figure, axes from the top).

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(width, sum(heights))
    axes = figure.subplots(len(heights), 1, squeeze=False, sharex=share_x, height_ratios=heights)
    return figure, list(axes[:, 0])


def beside(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    """A figure of equal panels side by side, ``width`` x ``height`` inches: (figure, axes from the left).

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(width, height)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def save(figure: Any, path: str | Path) -> None:
    """Write the figure in the format of the path's suffix; PNG without one.

    Raises:
        OSError: the path cannot be written.
        ValueError: matplotlib does not know the suffix.
    """
    figure.savefig(path, dpi=DPI, format=Path(path).suffix.removeprefix(".") or "png")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib: pip install matplotlib ({error})") from None
    return Figure(figsize=(width, height), layout="constrained")
