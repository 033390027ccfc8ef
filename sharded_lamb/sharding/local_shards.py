"""DTensors on this rank: their local parts as shards for the kernels, with their state.

Moves, gathers and broadcasts nothing: the library that sharded the parameters (fully_shard, parallelize_module) gathers
them. `buckets.py` is the counterpart for plain parameters, which this package shards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from sharded_lamb.comm.collectives import Traffic
from sharded_lamb.kernels import ScatteredShard
from sharded_lamb.kernels.state_format import StoredState
from sharded_lamb.kernels.state_format import moments as moments_of
from sharded_lamb.sharding.buckets import Precision, flattened, memory_strides
from sharded_lamb.sharding.placements import local_part, mesh_device


@dataclass(frozen=True, slots=True)
class LocalShard:
    """One parameter's local part and its state, all flat in the local part's memory order."""

    p: DTensor
    precision: Precision
    strides: tuple[int, ...]  # of the local part
    master: Tensor | None  # [n] as `Precision.masters` stores it; None: steps update the parameter's memory
    exp_avg: Tensor  # [n] as `Precision.moments` stores it
    exp_avg_sq: Tensor  # [n]

    @staticmethod
    def of(p: DTensor, precision: Precision) -> "LocalShard":
        local = local_part(p)
        strides = memory_strides(local)

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(local.numel(), dtype=dtype, device=local.device)

        master = None
        if precision.masters is not None:
            master = zeros(precision.masters.storage)
            precision.masters.reset(master, flattened(local, strides))
        moments = precision.moments.storage
        return LocalShard(p, precision, strides, master, zeros(moments), zeros(moments))

    def weight(self) -> Tensor:
        """[n], a view of the model's own memory."""
        return flattened(local_part(self.p), self.strides)

    def states(self) -> list[StoredState]:
        """The kinds of state of this rank's part, each [n]."""
        masters = self.precision.masters
        kinds = [*moments_of(self.precision.moments, self.exp_avg, self.exp_avg_sq)]
        if masters is not None and self.master is not None:
            kinds.append(StoredState("master", masters, self.master, self.weight()))
        return kinds

    def as_dtensor(self, flat: Tensor) -> DTensor:
        """A DTensor with the parameter's mesh and placements over the memory of this rank's flat tensor.

        Constructed as in FSDP: `DTensor.from_local` would copy an offloaded part to the mesh's device.
        """
        local = flat.as_strided(local_part(self.p).shape, self.strides)
        meta = TensorMeta(self.p.shape, self.p.stride(), flat.dtype)
        spec = DTensorSpec(self.p.device_mesh, tuple(self.p.placements), tensor_meta=meta)
        return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]

    def part_of_whole(self, whole: Tensor) -> Tensor:
        """[n] this rank's part of a whole tensor, which every rank holds."""
        mesh = self.p.device_mesh
        placed = distribute_tensor(whole.to(mesh_device(mesh)), mesh, self.p.placements, src_data_rank=None)
        return flattened(local_part(placed), self.strides)

    def whole(self, flat: Tensor) -> Tensor:
        """The whole tensor on the mesh's device, also of offloaded parts. Collective."""
        part = self.as_dtensor(flat)
        local = part.to_local().to(mesh_device(self.p.device_mesh))
        on_mesh = DTensor.from_local(
            local, part.device_mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
        )
        return on_mesh.full_tensor()


def check_dense(name: str, p: DTensor) -> None:
    """Raises ValueError if this rank's part has gaps in memory, so that it has no flat view."""
    local = local_part(p)
    if local.numel() and memory_strides(local) != tuple(local.stride()):
        raise ValueError(
            f"the local part of parameter {name!r} has shape {tuple(local.shape)} and strides {local.stride()}: its "
            f"elements must fill memory without gaps. Construct it from local.contiguous()"
        )


class DTensorShards:
    """The DTensor parameters of an optimizer on this rank, by parameter index."""

    def __init__(self) -> None:
        self.local: dict[int, LocalShard] = {}
        self.grads: dict[int, Tensor] = {}
        """{parameter: local gradient} as last read, with the parameter's placements."""
        self.shards: list[ScatteredShard] = []
        """The kernels' shards: the local parts that have elements and, when last read, a gradient."""

    def add(self, param: int, p: DTensor, precision: Precision) -> None:
        self.local[param] = LocalShard.of(p, precision)

    def check_attached(self, names: Sequence[str]) -> None:
        """Raises RuntimeError if a local part's size, dtype or device differs from its state's."""
        for param, local_shard in self.local.items():
            local = local_part(local_shard.p)
            actual = (local.numel(), local.dtype, local.device)
            expected = (local_shard.exp_avg.numel(), local_shard.precision.model, local_shard.exp_avg.device)
            if actual != expected:
                raise RuntimeError(
                    f"the local part of parameter {names[param]!r} is now {actual[0]} elements of {actual[1]} on "
                    f"{actual[2]}; ShardedLamb was constructed with {expected[0]} of {expected[1]} on {expected[2]}. "
                    f"Shard, convert and move the model first and construct the optimizer after"
                )

    def read_gradients(self, names: Sequence[str], traffic: Traffic) -> None:
        """Read every ``.grad``. Collective only if some have other placements than their parameters."""
        params = [param for param, local_shard in self.local.items() if local_shard.p.grad is not None]
        grads = local_gradients({names[param]: self.local[param].p for param in params}, traffic)
        self.grads = dict(zip(params, grads, strict=True))
        rows_of: dict[Any, list[tuple[int, LocalShard, Tensor]]] = {}
        for param, grad in self.grads.items():
            local_shard = self.local[param]
            if grad.numel():
                row = param, local_shard, flattened(grad, local_shard.strides)
                rows_of.setdefault((local_shard.precision, grad.dtype), []).append(row)
        self.shards = [_shard(rows) for rows in rows_of.values()]

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes on this rank, by kind. Gradients stay in their own memory."""
        shards = self.local.values()
        return {
            "parameters": sum(shard.exp_avg.numel() * shard.precision.model.itemsize for shard in shards),
            "masters": sum(shard.master.nbytes for shard in shards if shard.master is not None),
            "moments": sum(shard.exp_avg.nbytes + shard.exp_avg_sq.nbytes for shard in shards),
            "gradient_shards": 0,
        }


def _shard(rows: Sequence[tuple[int, LocalShard, Tensor]]) -> ScatteredShard:
    weights = [local_shard.weight() for _, local_shard, _ in rows]
    masters = [local_shard.master for _, local_shard, _ in rows if local_shard.master is not None]
    return ScatteredShard(
        params=tuple(param for param, _, _ in rows),
        weight=masters or weights,
        grad=[grad for _, _, grad in rows],
        exp_avg=[local_shard.exp_avg for _, local_shard, _ in rows],
        exp_avg_sq=[local_shard.exp_avg_sq for _, local_shard, _ in rows],
        model=weights if masters else None,
    )


# -- gradients with other placements than their parameters -------------------------------------------


def local_gradients(params: Mapping[str, DTensor], traffic: Traffic) -> list[Tensor]:
    """This rank's part of every gradient, with the parameter's placements; leaves ``.grad`` unchanged.

    Sums gradients that are Partial on an axis where the parameter is Replicate (a norm's weight under sequence
    parallel): one all-reduce per axis and dtype for all of them.

    Raises:
        TypeError: a gradient that is not a DTensor.
        ValueError: a gradient on another mesh.
    """
    grads = [_checked(name, p) for name, p in params.items()]
    local_grads = [local_part(grad) for grad in grads]
    placements = [list(grad.placements) for grad in grads]
    sums: dict[tuple[DeviceMesh, int, torch.dtype, str], list[int]] = {}
    for i, (grad, p) in enumerate(zip(grads, params.values(), strict=True)):
        for axis, (has, wanted) in enumerate(zip(grad.placements, p.placements, strict=True)):
            op = getattr(has, "reduce_op", "")
            if has.is_partial() and wanted.is_replicate() and op in ("sum", "avg"):
                sums.setdefault((grad.device_mesh, axis, grad.dtype, op), []).append(i)
                placements[i][axis] = wanted
    for (mesh, axis, _, op), members in sums.items():
        _all_reduce_packed(local_grads, members, mesh, axis, op, traffic)
    for i, (grad, p) in enumerate(zip(grads, params.values(), strict=True)):
        if tuple(placements[i]) != tuple(p.placements):
            placed = DTensor.from_local(
                local_grads[i],
                grad.device_mesh,
                placements[i],
                run_check=False,
                shape=grad.shape,
                stride=grad.stride(),
            )
            local_grads[i] = local_part(placed.redistribute(placements=p.placements))
    return local_grads


def _checked(name: str, p: DTensor) -> DTensor:
    grad = p.grad
    if not isinstance(grad, DTensor):
        raise TypeError(
            f"the gradient of {name!r} is a {type(grad).__name__} and the parameter a DTensor: the placements "
            f"of the gradient are unknown. Assign DTensor.from_local(gradient, p.device_mesh, placements)"
        )
    if grad.device_mesh != p.device_mesh:
        raise ValueError(
            f"the gradient of {name!r} is on {grad.device_mesh} and the parameter on {p.device_mesh}: both must be on "
            f"one mesh"
        )
    return grad


def _all_reduce_packed(
    grads: list[Tensor], members: Sequence[int], mesh: DeviceMesh, axis: int, op: str, traffic: Traffic
) -> None:
    packed = torch.cat([grads[i].reshape(-1) for i in members])
    with traffic.blocking("all_reduce_partial", packed.nbytes):
        dist.all_reduce(packed, group=mesh.get_group(axis))
    if op == "avg":
        packed /= mesh.size(axis)
    parts = torch.split(packed, [grads[i].numel() for i in members])
    for i, part in zip(members, parts, strict=True):
        grads[i] = part.view(grads[i].shape)
