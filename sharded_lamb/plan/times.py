"""Seconds of a step, and of its communication that no computation hides, from costs and a machine."""

from collections.abc import Sequence
from dataclasses import dataclass

from sharded_lamb.plan.costs import Costs
from sharded_lamb.plan.machine import Group, Machine
from sharded_lamb.plan.sharding import Choices


@dataclass(frozen=True, slots=True)
class Computation:
    """Seconds of one rank's computation in a step, without communication; 0 hides nothing.

    Raises:
        ValueError: a field is negative.
    """

    forward: float = 0.0
    backward: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward", "backward"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name}-ms must be >= 0, got {getattr(self, name) * 1e3:g}")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a step."""

    update: float  # the two passes
    small: float  # the packed all-reduces
    gradients: float  # reductions by the optimizer (stage 2), DistributedDataParallel (1) or fully_shard (3)
    gathers: float  # of parameters, by the optimizer, or twice by fully_shard
    exposed: float  # the part of the three above that neither forward nor backward hides
    in_step: float  # time of `step()`: without communication during forward and backward

    @property
    def communication(self) -> float:
        return self.small + self.gradients + self.gathers

    @property
    def optimizer(self) -> float:
        """Time of a step beyond computing gradients: the update and exposed communication."""
        return self.update + self.exposed


def times(costs: Costs, choices: Choices, machine: Machine, computation: Computation) -> Times:
    """The times of one step. At least one bucket's exchange is exposed on each side: the last bucket fills when
    backward ends, and forward cannot begin without the first."""
    sharding = costs.sharding
    all_ranks, shard = Group.of(machine, sharding.world_size), Group.of(machine, sharding.shard)
    replicas = Group.of(machine, sharding.replicate, stride=sharding.shard)
    update = costs.update / machine.update_bytes_per_second
    small = sum(all_ranks.small_seconds(machine, costs.small))
    if sharding.stage == 3:
        first = shard.ring_seconds(machine, costs.around.get("fsdp_all_gather", ()))
        again = shard.ring_seconds(machine, costs.around.get("fsdp_all_gather_again", ()))
        reductions = shard.ring_seconds(machine, costs.around.get("fsdp_reduce_scatter", ()))
        reductions += replicas.all_reduce_seconds(machine, costs.around.get("fsdp_all_reduce", ()))
        exposed = _exposed(first, computation.forward) + _exposed([*again, *reductions], computation.backward)
        gathered = sum(first) + sum(again)
        return Times(update, small, sum(reductions), gathered, small + exposed, update + small)
    if sharding.stage == 1:
        reductions = all_ranks.all_reduce_seconds(machine, costs.around.get("ddp_all_reduce", ()))
    else:
        scatters = shard.ring_seconds(machine, costs.large["reduce_scatter"])
        sums = replicas.all_reduce_seconds(machine, costs.large["all_reduce_replicas"])
        reductions = [*scatters, *sums]
    gathers = shard.ring_seconds(machine, costs.large["all_gather"])
    overlap = choices.overlap or sharding.stage == 1  # DistributedDataParallel always does
    exposed = _exposed(reductions, computation.backward if overlap else 0.0)
    exposed += _exposed(gathers, computation.forward if choices.overlap_forward else 0.0)
    in_step = update + small + (0.0 if choices.overlap_forward else sum(gathers))
    return Times(update, small, sum(reductions), sum(gathers), small + exposed, in_step)


def _exposed(exchanges: Sequence[float], hidden_behind: float) -> float:
    return max(sum(exchanges) - hidden_behind, max(exchanges, default=0.0))
