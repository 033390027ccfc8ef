"""The output of a benchmark: a Markdown table, JSON with every measurement, and a picture."""

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

from sharded_lamb.pictures import figure

_VERSIONED = ("torch", "sharded-lamb", "timm", "deepspeed", "transformers", "triton", "numpy")

ROW_WIDTH = 500
"""Characters of JSON that stay on one line."""


def about(device: torch.device) -> dict[str, Any]:
    """Command, date, machine and versions, without which a number means nothing."""
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
    machine: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    features = torch.backends.cpu.get_cpu_capability()
    return f"{models[0] if models else platform.processor() or platform.machine()} ({features})"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads as plain text: aligned columns, all but the first to the right."""
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
    """Add --json and --png, which every benchmark takes."""
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all measurements to PATH")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw them to PATH (needs matplotlib)")


def publish(
    chosen: argparse.Namespace, text: str, content: Mapping[str, Any], bars: Sequence["Panel"]
) -> None:
    """Print, and write and draw where ``--json`` and ``--png`` ask for it, on the first rank.

    Raises:
        OSError: a path cannot be written.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    print(text, flush=True)
    if chosen.json is not None:
        chosen.json.write_text(dumped(content))
    if chosen.png is not None:
        _draw(bars, chosen.png)


def dumped(content: Any, indent: int = 0) -> str:
    """JSON with one row a line: a container of scalars, or one that fits into `ROW_WIDTH`, is not broken up."""
    text = json.dumps(content)
    nested = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    is_row = not any(isinstance(value, dict | list) for value in nested)
    if is_row or (indent and len(text) <= ROW_WIDTH):
        return text + "\n" * (not indent)
    margin, (start, end) = " " * (indent + 1), "{}" if isinstance(content, dict) else "[]"
    if isinstance(content, dict):
        lines = [f"{json.dumps(key)}: {dumped(value, indent + 1)}" for key, value in content.items()]
    else:
        lines = [dumped(value, indent + 1) for value in content]
    body = ",\n".join(margin + line for line in lines)
    return f"{start}\n{body}\n{' ' * indent}{end}" + "\n" * (not indent)


class Panel:
    """A bar chart: {label: (length, low end of its spread, high end)} in ``unit``; ``ours`` are highlighted."""

    def __init__(
        self, title: str, unit: str, bars: Mapping[str, tuple[float, float, float]], ours: Sequence[str]
    ) -> None:
        self.title, self.unit, self.bars, self.ours = title, unit, bars, ours


def _draw(panels: Sequence[Panel], path: Path) -> None:
    try:
        drawing, axes = figure.stacked(9, [1 + 0.35 * len(panel.bars) for panel in panels])
    except ImportError as error:  # the measurements took minutes and are written
        print(f"no picture: {error}; run it again", file=sys.stderr)
        return
    for axis, panel in zip(axes, panels, strict=True):
        labels = list(panel.bars)
        values = [panel.bars[label][0] for label in labels]
        spread = [[max(v - low, 0), max(high - v, 0)] for v, low, high in panel.bars.values()]
        colors = ["tab:orange" if label in panel.ours else "tab:blue" for label in labels]
        axis.barh(labels, values, color=colors, xerr=list(zip(*spread, strict=True)), capsize=3)
        texts = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
        axis.bar_label(axis.containers[-1], texts, padding=6)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set(title=panel.title, xlabel=panel.unit)
        axis.grid(axis="x", alpha=0.3)
    figure.save(drawing, path)
