"""Costs and a machine → seconds: what a step takes, and which part of it no computation hides."""

from collections.abc import Sequence
from dataclasses import dataclass

from sharded_lamb.plan.costs import Costs
from sharded_lamb.plan.machine import Group, Machine
from sharded_lamb.plan.sharding import Choices


@dataclass(frozen=True, slots=True)
class Computation:
    """Seconds that one rank computes in a step without any communication; 0 hides nothing."""

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
    gradients: float  # reduced: by the optimizer (stage 2), DistributedDataParallel (1) or fully_shard (3)
    gathers: float  # of parameters: by the optimizer, or by fully_shard, twice
    exposed: float  # of the three above, what neither forward nor backward hides
    in_step: float  # what `step()` takes: without what runs during forward and backward

    @property
    def communication(self) -> float:
        return self.small + self.gradients + self.gathers

    @property
    def optimizer(self) -> float:
        """What a step takes beyond computing gradients: the update, and communication that is exposed."""
        return self.update + self.exposed


def times(costs: Costs, choices: Choices, machine: Machine, computation: Computation) -> Times:
    """Of one step. Hidden is what fits: at least one bucket's exchange is exposed on each side, since the last bucket
    is full when backward ends and forward cannot begin without the first."""
    sharding = costs.sharding
    everyone, shard = Group.of(machine, sharding.world_size), Group.of(machine, sharding.shard)
    replicas = Group.of(machine, sharding.replicate, stride=sharding.shard)
    update = costs.update / machine.update_bytes_per_second
    small = sum(everyone.small_seconds(machine, costs.small))
    if sharding.stage == 3:
        first = shard.ring_seconds(machine, costs.around.get("fsdp_all_gather", ()))
        again = shard.ring_seconds(machine, costs.around.get("fsdp_all_gather_again", ()))
        reductions = shard.ring_seconds(machine, costs.around.get("fsdp_reduce_scatter", ()))
        reductions += replicas.all_reduce_seconds(machine, costs.around.get("fsdp_all_reduce", ()))
        exposed = _exposed(first, computation.forward) + _exposed([*again, *reductions], computation.backward)
        gathered = sum(first) + sum(again)
        return Times(update, small, sum(reductions), gathered, small + exposed, update + small)
    if sharding.stage == 1:
        reductions = everyone.all_reduce_seconds(machine, costs.around.get("ddp_all_reduce", ()))
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
