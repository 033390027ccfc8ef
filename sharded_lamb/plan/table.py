"""Predictions as a text table and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sharded_lamb.plan.costs import KINDS, Costs
from sharded_lamb.plan.times import Times

_COLUMNS = (
    *("stage", "ranks", "mesh", "params", "grads", "masters", "moments", "shard g", "staging", "MiB/rank"),
    *("MiB sent", "large", "small", "update", "comm", "exposed", "step ms"),
)

NOTES = (
    "MiB a rank without activations: weights, .grad after backward, masters, moments, gradient shard, staging; total.",
    "MiB sent: by a rank per step, DistributedDataParallel's (stage 1) or fully_shard's (stage 3) included; an",
    "all-reduce over n ranks sends 2 (n - 1) / n of its buffer, as in a ring.",
    "large, small: the optimizer's own collectives. Milliseconds: the two passes, communication, its part that neither",
    "forward nor backward hides, and the sum of the update and that part.",
    "Stage 3 shows the first rank, which has the most; fully_shard's groups are assumed as large as a bucket.",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One sharding's prediction."""

    costs: Costs
    times: Times

    @property
    def sent(self) -> int:
        """Bytes that a rank sends per step. `Costs` count an all-reduce's buffer; a ring sends 2 (n - 1) / n of it."""
        sharding = self.costs.sharding
        ranks = {
            "all_reduce_small": sharding.world_size,
            "all_reduce_replicas": sharding.replicate,
            "ddp_all_reduce": sharding.world_size,
            "fsdp_all_reduce": sharding.replicate,
        }
        sizes = {**self.costs.wire, **{name: sum(sends) for name, sends in self.costs.around.items()}}
        return sum(
            2 * size * (ranks[name] - 1) // ranks[name] if name in ranks else size
            for name, size in sizes.items()
        )

    def as_json(self) -> dict[str, Any]:
        """Bytes, calls and seconds by kind; ``wire_bytes`` count an all-reduce's buffer once."""
        costs = self.costs
        return {
            "stage": costs.sharding.stage,
            "world_size": costs.sharding.world_size,
            "mesh": [costs.sharding.replicate, costs.sharding.shard],
            "memory_bytes": dict(costs.memory),
            "memory_bytes_in_all": costs.total_memory,
            "sent_bytes": self.sent,
            "wire_bytes": costs.wire,
            "calls": costs.calls,
            "wire_bytes_around": {name: sum(sends) for name, sends in costs.around.items()},
            "update_bytes": costs.update,
            "seconds": {**asdict(self.times), "optimizer": self.times.optimizer},
        }

    def cells(self) -> list[str]:
        """One cell for each of `_COLUMNS`."""
        costs, times, sharding = self.costs, self.times, self.costs.sharding
        large = sum(count for name, count in costs.calls.items() if name != "all_reduce_small")
        memory = [costs.memory[kind] for kind in KINDS]
        return [
            *(str(sharding.stage), f"{sharding.world_size:,}", sharding.mesh),
            *(_mib(size) for size in (*memory, costs.total_memory, self.sent)),
            *(f"{large:,}", str(len(costs.small))),
            *(
                f"{seconds * 1e3:,.2f}"
                for seconds in (times.update, times.communication, times.exposed, times.optimizer)
            ),
        ]


def text_table(rows: Sequence[Row]) -> str:
    """One line per row, an empty one between stages and kinds of mesh."""
    lines: list[list[str]] = [list(_COLUMNS)]
    last = None
    for row in rows:
        sharding = row.costs.sharding
        if last is not None and (sharding.stage != last.stage or sharding.world_size <= last.world_size):
            lines.append([""] * len(_COLUMNS))
        lines.append(row.cells())
        last = sharding
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _mib(size: int) -> str:
    mib = size / 2**20
    return f"{mib:,.0f}" if mib >= 100 or size == 0 else f"{mib:.1f}" if mib >= 1 else f"{mib:.2f}"
