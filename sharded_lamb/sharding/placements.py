"""DTensor placements → which shard of a parameter a rank holds, and which rank owns it.

The mesh axes with Shard placements divide a parameter into shards; ranks at the same coordinates on those axes hold the
same shard, at any coordinates on the other axes (of this mesh or of the one that it was sliced from). Shard indices::

    mesh (replicate 2, shard 2), placements (Replicate, Shard(0))        LayerNorm under FSDP x TP, on the FSDP axis

        rank 0: 0    rank 1: 1                                               rank 0: 0    rank 1: 0  (TP)
        rank 2: 0    rank 3: 1                                               rank 2: 1    rank 3: 1

A sum over ranks must count every element once: the first rank of each shard owns it, the others add 0. This holds
whichever elements a shard has (uneven, empty, strided).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sharded_lamb.sharding.dtensors import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class ShardSpec:
    """How some parameters are sharded: the placements on a mesh, one per axis."""

    mesh: DeviceMesh
    placements: "tuple[Placement, ...]"

    @staticmethod
    def of(name: str, p: "DTensor") -> "ShardSpec":
        """Raises ValueError for placements that leave norms unknown, with the reason."""
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        for axis, placement in enumerate(p.placements):
            if placement.is_partial():
                raise ValueError(
                    f"parameter {name!r} has placement {placement!r} on axis {axis} of its mesh: its value is a sum "
                    f"over ranks that has not been taken, so no rank knows its norm. Redistribute it to Replicate()"
                )
            if not isinstance(placement, (Replicate, Shard, _StridedShard)):
                raise ValueError(
                    f"parameter {name!r} has placement {placement!r} on axis {axis} of its mesh: which elements a rank "
                    f"holds is known for Shard, strided Shard and Replicate only. Redistribute it to one of them"
                )
        if p.device_mesh.get_coordinate() is None:
            raise ValueError(
                f"parameter {name!r} is on a mesh of ranks {ranks_of_mesh(p.device_mesh)}, and this rank is none of "
                f"them: construct ShardedLamb on those ranks only, with the parameters that they hold"
            )
        return ShardSpec(p.device_mesh, tuple(p.placements))

    @property
    def shard_index(self) -> int:
        """This rank's shard index."""
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None
        shards = [not placement.is_replicate() for placement in self.placements]
        return index_of_coordinate(coordinate, tuple(self.mesh.shape), shards)

    def described(self) -> dict[str, Any]:
        """JSON-serializable, the same on every rank of the mesh."""
        names = self.mesh.mesh_dim_names
        return {
            "mesh": list(self.mesh.shape),
            "axes": None if names is None else list(names),
            "placements": [repr(placement) for placement in self.placements],
        }


@dataclass(frozen=True, slots=True)
class Replicas:
    """Which ranks hold the same part of a gradient, by kind: plain parameters, and DTensors by mesh and placements."""

    kinds: tuple[str, ...]  # names for messages; "" for plain parameters
    kind_of: tuple[int, ...]  # [P]; -1: every rank holds a different part
    shard_indices: tuple[tuple[int, ...], ...]  # [kinds][W]; ranks with equal indices hold the same part


def index_of_coordinate(coordinate: Sequence[int], sizes: Sequence[int], shards: Sequence[bool]) -> int:
    """The shard index of a rank at ``coordinate``: a mixed-radix number, one digit per sharding axis."""
    index = 0
    for digit, size, sharding in zip(coordinate, sizes, shards, strict=True):
        if sharding:
            index = index * size + digit
    return index


def owners(shard_indices: Sequence[int]) -> list[bool]:
    """[ranks] whether each rank is the first that holds its shard. ``shard_indices``: one per rank, in order."""
    seen: set[int] = set()
    first = []
    for index in shard_indices:
        first.append(index not in seen)
        seen.add(index)
    return first


def ranks_of_mesh(mesh: DeviceMesh) -> tuple[int, ...]:
    """Global ranks, ascending."""
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def root_ranks(params: Any) -> tuple[int, ...] | None:
    """The ranks of the mesh that the first DTensor's mesh was sliced from; None without DTensors."""
    for p in tensors_in(params):
        if is_dtensor(p):
            return ranks_of_mesh(p.device_mesh._get_root_mesh())
    return None


def tensors_in(params: Any) -> Iterator[Tensor]:
    """The tensors of an optimizer's argument: parameters, (name, parameter) pairs, or groups of either."""
    for entry in params if isinstance(params, Iterable) and not isinstance(params, Tensor) else ():
        if isinstance(entry, dict):
            members = entry.get("params", ())
            yield from tensors_in((members,) if isinstance(members, Tensor) else members)
        elif isinstance(entry, tuple) and len(entry) == 2:
            yield entry[1]
        elif isinstance(entry, Tensor):
            yield entry


def materialized(params: Any) -> Any:
    """Lists in place of iterators, so that parameters can be read before torch groups them."""
    listed = list(params) if isinstance(params, Iterator) else params
    if not isinstance(listed, (list, tuple)):
        return listed
    return [
        {**entry, "params": list(entry["params"])}
        if isinstance(entry, dict) and isinstance(entry.get("params"), Iterator)
        else entry
        for entry in listed
    ]


def mesh_device(mesh: DeviceMesh) -> torch.device:
    """The device of the mesh's collectives; with CPU offload the parameters are on another."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def local_part(tensor: "DTensor") -> Tensor:
    """This rank's part, detached, a view of the tensor's own memory."""
    return local_memory(tensor).detach()


def local_memory(tensor: "DTensor") -> Tensor:
    """The tensor that holds this rank's part, complete; `local_part` takes ten times as long."""
    local = tensor._local_tensor  # to_local() without a view
    if type(local) is not Tensor and hasattr(local, "wait"):  # a functional collective may be in flight
        complete: Tensor = local.wait()
        return complete
    return local
