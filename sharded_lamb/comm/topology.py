"""Shard groups and replica groups: the ranks that share an optimizer's state, and those that replicate it."""

import os
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Topology:
    """This rank's shard group and replica group, as global ranks. Without a process group: one rank, no communication.

    ``everyone``: all ranks of the optimizer, in rank order.
    ``shard_ranks``: the ranks that share one copy of the state, this one included.
    ``replica_ranks``: the ranks that hold the same shard as this one.
    """

    everyone: tuple[int, ...]
    shard_ranks: tuple[int, ...]
    replica_ranks: tuple[int, ...]
    global_rank: int

    @property
    def rank(self) -> int:
        """This rank's index in ``everyone``."""
        return self.everyone.index(self.global_rank)

    @property
    def shard_rank(self) -> int:
        return self.shard_ranks.index(self.global_rank)

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank owns its shard: the first replica, whose sums count."""
        return self.replica_ranks[0] == self.global_rank

    @staticmethod
    def of(
        process_group: dist.ProcessGroup | None,
        mesh: DeviceMesh | None,
        default: tuple[int, ...] | None = None,
    ) -> "Topology":
        """The topology of the constructor's arguments; without them the ``default`` ranks, else all.

        Raises:
            ValueError: both given, a mesh without 1 or 2 dimensions, or this rank is not a member.
            RuntimeError: more than one rank was launched and torch.distributed is not initialized.
        """
        if process_group is not None and mesh is not None:
            raise ValueError("process_group and mesh were both given: pass one of them")
        if not (dist.is_available() and dist.is_initialized()):
            return Topology._alone()
        if mesh is not None:
            return Topology._of_mesh(mesh)
        if process_group is None and default is not None:
            ranks = default
        else:
            ranks = tuple(dist.get_process_group_ranks(process_group or dist.group.WORLD))
        if dist.get_rank() not in ranks:
            raise ValueError(
                f"rank {dist.get_rank()} constructs a ShardedLamb over ranks {ranks} without being one"
            )
        return Topology(ranks, ranks, (dist.get_rank(),), dist.get_rank())

    @staticmethod
    def _alone() -> "Topology":
        launched = os.environ.get("WORLD_SIZE", "1")
        if launched.isdigit() and int(launched) > 1:
            raise RuntimeError(
                f"WORLD_SIZE={launched} and torch.distributed is not initialized: every rank would train alone. "
                f"Call torch.distributed.init_process_group() before constructing ShardedLamb"
            )
        return Topology((0,), (0,), (0,), 0)

    @staticmethod
    def _of_mesh(mesh: DeviceMesh) -> "Topology":
        if mesh.ndim not in (1, 2):
            raise ValueError(
                f"mesh must have 1 dimension (shard) or 2 (replicate, shard), got {mesh.ndim}: take a submesh"
            )
        ranks = mesh.mesh.reshape(-1, mesh.mesh.shape[-1])
        here = (ranks == dist.get_rank()).nonzero()
        if len(here) != 1:
            raise ValueError(f"rank {dist.get_rank()} is not in the mesh {mesh}")
        row, column = here[0].tolist()
        return Topology(
            tuple(ranks.flatten().tolist()),
            tuple(ranks[row].tolist()),
            tuple(ranks[:, column].tolist()),
            dist.get_rank(),
        )
