"""Which rank owns which shard, so that a sum over ranks counts every element once; and which ranks hold replicas."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.topology import Topology
from sharded_lamb.sharding.dtensors import is_dtensor
from sharded_lamb.sharding.placements import Replicas, ShardSpec, local_part, owners
from sharded_lamb.sharding.shard_plan import ShardPlan


class Ownership:
    """The owners of an optimizer's parameters, in registration order."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.specs: dict[int, ShardSpec] = {}  # DTensors only
        self.mask = torch.zeros(0, dtype=torch.float64, device="cpu")
        """[P] fp64: 1 where this rank owns its part of the parameter, 0 where it holds a replica. Sums are
        multiplied by it: 0 x inf is nan, so a replica's infinity reaches every rank."""
        self._shard_indices: dict[ShardSpec, tuple[int, ...]] = {}  # one per rank

    def extend(self, plan: ShardPlan, collectives: Collectives) -> None:
        """Add the plan's parameters. Collective if it has DTensors: two small all-reduces.

        Raises:
            ValueError: the owners do not hold every element of a DTensor; on every rank.
        """
        rank, first = self.topology.rank, len(self.mask)
        mask = torch.full(
            (len(plan.rows),), float(self.topology.is_first_replica), dtype=torch.float64, device="cpu"
        )
        if plan.specs:
            self._exchange_shard_indices(plan, collectives)
            owned = torch.zeros(len(plan.rows), dtype=torch.float64, device="cpu")
            for param, spec in plan.specs.items():
                row = param - first
                mask[row] = owners(self._shard_indices[spec])[rank]
                owned[row] = mask[row] * _local_numel(plan.rows[row][1])
            collectives.all_reduce_small(owned)
            _check_all_elements_owned(plan, owned.tolist(), first)
        self.specs.update(plan.specs)
        self.mask = torch.cat([self.mask.to(plan.device), mask.to(plan.device)])

    def _exchange_shard_indices(self, plan: ShardPlan, collectives: Collectives) -> None:
        rank, world = self.topology.rank, len(self.topology.everyone)
        new = [spec for spec in dict.fromkeys(plan.specs.values()) if spec not in self._shard_indices]
        indices = torch.zeros(len(new), world, dtype=torch.float64, device="cpu")
        indices[:, rank] = torch.tensor([spec.shard_index for spec in new], dtype=torch.float64, device="cpu")
        collectives.all_reduce_small(indices)
        for spec, row in zip(new, indices.tolist(), strict=True):
            self._shard_indices[spec] = tuple(map(int, row))

    def replicas(self, *, averaged: bool) -> Replicas:
        """Which ranks must hold equal gradients.

        Args:
            averaged: plain parameters' gradients are already averaged over ranks, so all ranks hold equal ones.
        """
        world = len(self.topology.everyone)
        shared = [spec for spec, indices in self._shard_indices.items() if len(set(indices)) < world]
        kinds = {spec: kind for kind, spec in enumerate(shared)}
        names = [f"placements {spec.placements} on a mesh of {tuple(spec.mesh.shape)}" for spec in shared]
        indices = [self._shard_indices[spec] for spec in shared]
        plain = -1
        if averaged:
            plain = len(kinds)
            names, indices = [*names, ""], [*indices, (0,) * world]
        kind_of = [
            kinds.get(self.specs[param], -1) if param in self.specs else plain
            for param in range(len(self.mask))
        ]
        return Replicas(tuple(names), tuple(kind_of), tuple(indices))


def _local_numel(p: Tensor) -> int:
    return local_part(p).numel() if is_dtensor(p) else 0


def _check_all_elements_owned(plan: ShardPlan, owned: Sequence[float], first: int) -> None:
    """Raises ValueError unless the owners' element counts sum to each DTensor's numel."""
    for row, (name, p, _) in enumerate(plan.rows):
        if first + row in plan.specs and int(owned[row]) != p.numel():
            raise ValueError(
                f"this optimizer's ranks hold {int(owned[row])} of the {p.numel()} elements of parameter {name!r} "
                f"({plan.specs[first + row].described()}): norms over them would be wrong. Pass process_group= with "
                f"all ranks that hold a part of it, and no ranks of other models"
            )
