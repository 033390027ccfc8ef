"""Memory per rank and time per step over the number of ranks."""

from collections.abc import Sequence
from pathlib import Path

from sharded_lamb.pictures import figure
from sharded_lamb.plan.sharding import Sharding
from sharded_lamb.plan.table import Row

COLORS = {1: "tab:blue", 2: "tab:orange", 3: "tab:green"}


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write memory and time over ranks as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawing, (memory, seconds) = figure.beside(11, 4.6, 2)
    lines: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        lines.setdefault(_line(row.costs.sharding), []).append(row)
    for (stage, mesh), members in lines.items():
        dashes = "-" if mesh == "1-D" else "--"
        style = {
            "color": COLORS[stage],
            "linestyle": dashes,
            "marker": ".",
            "label": f"stage {stage}, {mesh}",
        }
        ranks = [row.costs.sharding.world_size for row in members]
        memory.plot(ranks, [row.costs.total_memory / 2**30 for row in members], **style)
        seconds.plot(ranks, [row.times.optimizer * 1e3 for row in members], **style)
        exposed = [row.times.exposed * 1e3 or float("nan") for row in members]  # a log axis has no 0
        seconds.plot(ranks, exposed, color=COLORS[stage], linestyle=dashes, linewidth=4, alpha=0.3)
    memory.set(ylabel="GiB a rank, without activations")
    seconds.set(ylabel="ms a step: update + exposed communication\n(pale: exposed alone)")
    for axis in (memory, seconds):
        axis.set(xlabel="ranks", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    memory.legend(fontsize=8)
    drawing.suptitle(title)
    figure.save(drawing, path)


def _line(sharding: Sharding) -> tuple[int, str]:
    """The line that a sharding is a point of: its stage and kind of mesh; a 2-D mesh of one replica counts as 1-D."""
    return sharding.stage, f"(replicate, {sharding.shard})" if sharding.replicate > 1 else "1-D"
