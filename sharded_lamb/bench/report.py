"""What a benchmark leaves behind: a table that pastes into Markdown, JSON with all that was measured, a picture."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_VERSIONED = ("torch", "sharded-lamb", "timm", "deepspeed", "triton", "numpy")


def about(device: torch.device) -> dict[str, Any]:
    """Command, date, machine and versions: what a number means nothing without."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return {
        "command": shlex.join(["sharded-lamb", *sys.argv[1:]]),
        "date": str(datetime.date.today()),
        "ranks": ranks,
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "machine": _machine(device),
        "versions": _versions(),
    }


def _machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    features = torch.backends.cpu.get_cpu_capability()
    return f"{models[0] if models else platform.processor() or platform.machine()} ({features})"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, so that it reads as plain text too; all but the first to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """--json and --png, which every benchmark takes."""
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all measurements there")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw them there (needs matplotlib)")


def publish(
    chosen: argparse.Namespace, text: str, content: Mapping[str, Any], bars: Sequence["Panel"]
) -> None:
    """Prints, writes and draws on the first rank what was asked for.

    Raises:
        OSError: a path that cannot be written.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    print(text, flush=True)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(content, indent=1) + "\n")
    if chosen.png is not None:
        _draw(bars, chosen.png)


def progress(text: str) -> None:
    """One line on the first rank's stderr: some measurements take minutes."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


class Panel:
    """One picture of bars: a label, a length and its spread (low, high) for each."""

    def __init__(
        self, title: str, unit: str, bars: Mapping[str, tuple[float, float, float]], ours: Sequence[str]
    ) -> None:
        self.title, self.unit, self.bars, self.ours = title, unit, bars, ours


def _draw(panels: Sequence[Panel], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no picture: {error}; pip install matplotlib, and run it again", file=sys.stderr)
        return
    heights = [1 + 0.35 * len(panel.bars) for panel in panels]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axis, panel in zip(rows[:, 0], panels, strict=True):
        labels = list(panel.bars)
        values = [panel.bars[label][0] for label in labels]
        spread = [[max(v - low, 0), max(high - v, 0)] for v, low, high in panel.bars.values()]
        colors = ["tab:orange" if label in panel.ours else "tab:blue" for label in labels]
        axis.barh(labels, values, color=colors, xerr=list(zip(*spread, strict=True)), capsize=3)
        written = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
        axis.bar_label(axis.containers[-1], written, padding=6)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set(title=panel.title, xlabel=panel.unit)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
