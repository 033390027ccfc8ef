"""Global batch → ranks × accumulation × micro-batch, as plain integers.

A step takes samples `first … first + global_batch - 1` of its phase's order; rank r of W takes the r-th equal,
contiguous part, cut into micro-batches whose sizes differ by at most one. The loss is divided by the counts of the
whole global batch, so uneven cuts change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class StepPlan:
    """One rank's part of one optimizer step: each micro-batch's [start, stop) in the sample order."""

    first: int
    global_batch: int
    micro_batches: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of one phase on one world size."""

    steps: int
    global_batch: int
    world_size: int
    max_micro_batch: int
    ramp_start: int
    ramp_steps: int  # 0: no ramp
    ramp_multiple: int | None = None  # batches of the ramp are multiples of it; None: of its start

    def __post_init__(self) -> None:
        if self.global_batch % self.world_size:
            raise ValueError(_does_not_fit("global_batch", self.global_batch, self.world_size))
        name = "ramp.multiple_of" if self.ramp_multiple else "ramp.start"
        if self.ramp_steps and self._multiple % self.world_size:
            raise ValueError(_does_not_fit(name, self._multiple, self.world_size))

    @property
    def _multiple(self) -> int:
        return self.ramp_multiple or self.ramp_start

    def batch_at(self, step: int) -> int:
        """Global batch of a step. It grows linearly over the ramp, rounded down to multiples."""
        if step >= self.ramp_steps:
            return self.global_batch
        # Not multiples of the world size: a run resumed on other ranks must see the same batches.
        grown = self.ramp_start + (self.global_batch - self.ramp_start) * step // self.ramp_steps
        return max(self.ramp_start, grown // self._multiple * self._multiple)

    def samples_before(self, step: int) -> int:
        """Sample index of a step's first sample."""
        ramped = sum(self.batch_at(s) for s in range(min(step, self.ramp_steps)))
        return ramped + max(0, step - self.ramp_steps) * self.global_batch

    def accumulation(self, step: int) -> int:
        return -(-(self.batch_at(step) // self.world_size) // self.max_micro_batch)

    def step_plan(self, step: int, first: int, rank: int) -> StepPlan:
        """The part of `rank` in `step`, whose samples begin at `first`."""
        batch = self.batch_at(step)
        rank_batch = batch // self.world_size
        begin, count = first + rank * rank_batch, self.accumulation(step)
        cuts = [begin + rank_batch * i // count for i in range(count + 1)]
        return StepPlan(first, batch, tuple(pairwise(cuts)))


def _does_not_fit(name: str, batch: int, world_size: int) -> str:
    fits = [w for w in range(1, min(batch, 4096) + 1) if batch % w == 0]
    near = [w for w in fits if w <= 2 * world_size][-4:]
    below, above = batch // world_size * world_size, -(-batch // world_size) * world_size
    batches = " or ".join(str(b) for b in (below, above) if b)
    return (
        f"{name}={batch} can't be split evenly over {world_size} ranks: use {near} ranks, or a {name} "
        f"of {batches}"
    )
