"""Clocks, turns and ratios.

Machines drift, so candidates take turns (A B A B …) within one run. A ratio of two candidates is the median of the
quotients of their turns in the same round.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sharded_lamb.comm import devices
from sharded_lamb.comm.progress import with_progress

Turns = list[list[float]]
"""Milliseconds, [round][iteration]."""


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Clock:
    """Times a joint action of all ranks, from the moment the last rank is ready until the last one is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _synchronize(self) -> None:
        devices.synchronize(self.device)

    def milliseconds(self, action: Callable[[], object], iterations: int) -> list[float]:
        """The slowest rank's time of each of ``iterations`` calls; the same list on every rank. Collective."""
        gc.collect()
        times = []
        for _ in range(iterations):
            self._synchronize()
            if dist.is_initialized():
                dist.barrier()
            start = time.perf_counter()
            action()
            self._synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        if dist.is_initialized():
            slowest = torch.tensor(times, dtype=torch.float64, device=self.device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times = slowest.tolist()
        return times


def take_turns(
    actions: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    rounds: int,
    iterations: int = 1,
    title: str = "",
) -> dict[str, Turns]:
    """Run every action once untimed, then ``rounds`` times in turn. Collective.

    Args:
        title: of the progress bar.
    """
    for action in actions.values():
        action()
    turns: dict[str, Turns] = {name: [] for name in actions}
    for name in with_progress([*actions] * rounds, f"bench {title}".rstrip()):
        turns[name].append(clock.milliseconds(actions[name], iterations))
    return turns


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


def by_round(turns: Turns) -> list[float]:
    """The median over iterations of each round, milliseconds."""
    return [statistics.median(turn) for turn in turns]


def quotients(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(of, to, strict=True)]
