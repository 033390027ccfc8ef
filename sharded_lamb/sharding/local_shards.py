"""DTensors on this rank: their local parts as shards for the kernels, with their state.

Moves, gathers and broadcasts nothing: the library that sharded the parameters (fully_shard, parallelize_module) gathers
them. `buckets.py` is the counterpart for plain parameters, which this package shards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sharded_lamb.comm.collectives import Traffic
from sharded_lamb.core.layers import Sources, repeated
from sharded_lamb.core.layout import Segment
from sharded_lamb.core.rule import MOMENTS
from sharded_lamb.kernels import ScatteredShard, formats
from sharded_lamb.kernels.state_format import PlainFormat, StateFormat, StoredState
from sharded_lamb.kernels.state_format import moments as moments_of
from sharded_lamb.sharding.buckets import Precision, flattened, memory_strides
from sharded_lamb.sharding.dtensors import is_dtensor
from sharded_lamb.sharding.memory_record import MemoryRecord
from sharded_lamb.sharding.placements import local_memory, local_part, mesh_device

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class LocalShard:
    """One parameter's local part and its state, all flat in the local part's memory order."""

    p: "DTensor"
    precision: Precision
    strides: tuple[int, ...]  # of the local part
    master: Tensor | None  # [n] as `Precision.masters` stores it; None: steps update the parameter's memory
    numel: int  # n
    exp_avg: Tensor  # [n] as `Precision.moments` stores it
    exp_avg_sq: Tensor | None  # [n]
    average: Tensor | None = None  # [n] compute dtype

    @staticmethod
    def of(p: "DTensor", precision: Precision) -> "LocalShard":
        local = local_part(p)
        strides = memory_strides(local)

        def zeros(form: StateFormat) -> Tensor:
            return torch.zeros(form.shape(local.numel()), dtype=form.storage, device=local.device)

        master = None
        if precision.masters is not None:
            master = zeros(precision.masters)
            precision.masters.reset(master, flattened(local, strides))
        average = flattened(local, strides).to(precision.compute, copy=True) if precision.averages else None
        first, second = (zeros(form) for form in precision.moments)
        return LocalShard(
            p,
            precision,
            strides,
            master,
            local.numel(),
            first,
            second if precision.second_moment else None,
            average,
        )

    def weight(self) -> Tensor:
        """[n], a view of the model's own memory."""
        return flattened(local_part(self.p), self.strides)

    def states(self) -> list[StoredState]:
        """The kinds of state of this rank's part, each [n]."""
        masters = self.precision.masters
        kinds = [*moments_of(self.precision.moments, self.numel, self.exp_avg, self.exp_avg_sq)]
        if masters is not None and self.master is not None:
            kinds.append(StoredState("master", masters, self.numel, self.master, self.weight()))
        if self.average is not None:
            form = formats.of_memory(self.average.dtype)
            kinds.append(StoredState("ema", form, self.numel, self.average, self.weight()))
        return kinds

    def as_dtensor(self, flat: Tensor) -> "DTensor":
        """A DTensor with the parameter's mesh and placements over the memory of this rank's flat tensor.

        Constructed as in FSDP: `DTensor.from_local` would copy an offloaded part to the mesh's device.
        """
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        local = flat.as_strided(local_part(self.p).shape, self.strides)
        meta = TensorMeta(self.p.shape, self.p.stride(), flat.dtype)
        spec = DTensorSpec(self.p.device_mesh, tuple(self.p.placements), tensor_meta=meta)
        return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]

    def part_of_whole(self, whole: Tensor) -> Tensor:
        """[n] this rank's part of a whole tensor, which every rank holds."""
        from torch.distributed.tensor import distribute_tensor

        mesh = self.p.device_mesh
        placed = distribute_tensor(whole.to(mesh_device(mesh)), mesh, self.p.placements, src_data_rank=None)
        return flattened(local_part(placed), self.strides)

    def whole(self, flat: Tensor) -> Tensor:
        """The whole tensor on the mesh's device, also of offloaded parts. Collective."""
        from torch.distributed.tensor import DTensor

        part = self.as_dtensor(flat)
        local = part.to_local().to(mesh_device(self.p.device_mesh))
        on_mesh = DTensor.from_local(
            local, part.device_mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
        )
        return on_mesh.full_tensor()


def check_dense(name: str, p: "DTensor") -> None:
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
        self._segments: dict[int, Sequence[Segment]] = {}  # of layers, in the local part
        self.grads: dict[int, Tensor] = {}
        """{parameter: local gradient} as last read, with the parameter's placements."""
        self.shards: list[ScatteredShard] = []
        """The kernels' shards: the local parts that have elements and, when last read, a gradient."""
        self._pieces: dict[_Kind, _Pieces] = {}
        self._record: MemoryRecord | None = None  # of local parts that fit their state; None: to be checked

    def add(self, param: int, p: "DTensor", segments: Sequence[Segment], precision: Precision) -> None:
        """``segments``: `layer_parts.segments_of_part`."""
        self.local[param], self._segments[param] = LocalShard.of(p, precision), segments
        self._pieces, self._record = {}, None

    def _memory(self) -> list[Tensor]:
        return [local_memory(local_shard.p) for local_shard in self.local.values()]

    def _has_moved(self, memory: Sequence[Tensor]) -> bool:
        """Whether some ``memory`` is not where `check_attached` saw it; forgets what was derived from that."""
        if self._record is not None and self._record.fits(memory):
            return False
        self._pieces, self._record = {}, None
        return True

    def check_attached(self, names: Sequence[str]) -> None:
        """Raises RuntimeError if a local part's size, dtype or device differs from its state's."""
        memory = self._memory()
        if not self._has_moved(memory):
            return
        for param, local_shard in self.local.items():
            local = local_memory(local_shard.p)
            actual = (local.numel(), local.dtype, local.device)
            expected = (local_shard.numel, local_shard.precision.model, local_shard.exp_avg.device)
            if actual != expected:
                raise RuntimeError(
                    f"the local part of parameter {names[param]!r} is now {actual[0]} elements of {actual[1]} on "
                    f"{actual[2]}; ShardedLamb was constructed with {expected[0]} of {expected[1]} on {expected[2]}. "
                    f"Shard, convert and move the model first and construct the optimizer after"
                )
        self._record = MemoryRecord(memory)

    def read_gradients(self, names: Sequence[str], traffic: Traffic) -> None:
        """Read every ``.grad``. Collective only if some have other placements than their parameters."""
        with_grads = {
            param: grad
            for param, local_shard in self.local.items()
            if (grad := local_shard.p.grad) is not None
        }
        params = {names[param]: self.local[param].p for param in with_grads}
        local_grads = local_gradients(params, list(with_grads.values()), traffic)
        self.grads = dict(zip(with_grads, local_grads, strict=True))
        self._has_moved(self._memory())
        alike: dict[_Kind, list[int]] = {}
        for param, grad in self.grads.items():
            if grad.numel():
                alike.setdefault((self.local[param].precision, grad.dtype), []).append(param)
        self._pieces = {kind: self._pieces_of(kind, members) for kind, members in alike.items()}
        self.shards = [pieces.with_gradients(self.grads) for pieces in self._pieces.values()]

    def _pieces_of(self, kind: "_Kind", members: list[int]) -> "_Pieces":
        kept = self._pieces.get(kind)
        return (
            kept
            if kept is not None and kept.members == members
            else _Pieces(members, self.local, self._segments)
        )

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes on this rank, by kind. Gradients stay in their own memory."""
        shards = self.local.values()
        averages = [shard.average.nbytes for shard in shards if shard.average is not None]
        return {
            "parameters": sum(shard.numel * shard.precision.model.itemsize for shard in shards),
            "masters": sum(shard.master.nbytes for shard in shards if shard.master is not None),
            "moments": sum(
                state.stored.nbytes for shard in shards for state in shard.states() if state.kind in MOMENTS
            ),
            "gradient_shards": 0,
            **({"averages": sum(averages)} if averages else {}),
        }


_BY_ELEMENT = PlainFormat(torch.float32)

_Kind = tuple[Precision, torch.dtype]
"""A precision and a dtype of gradients."""


class _Pieces:
    """Local parts of one kind as a shard, which serves while their memory stays where it is: a piece per segment."""

    def __init__(
        self, members: list[int], local: Mapping[int, LocalShard], segments: Mapping[int, Sequence[Segment]]
    ) -> None:
        self.members = members
        rows = [local[param] for param in members]
        self._strides = [row.strides for row in rows]
        pieces = [segment for param in members for segment in segments[param]]
        self._sources: Sources = None
        if len(pieces) > len(members):
            self._sources = [source for source, param in enumerate(members) for _ in segments[param]]

        def cut(parts: Sequence[Tensor | None], form: StateFormat = _BY_ELEMENT) -> list[Tensor]:
            """Pieces of what the members have; nothing, if they have none."""
            whole = [part for part in parts if part is not None]
            if self._sources is None or not whole:
                return whole
            of_pieces = zip(repeated(whole, self._sources), pieces, strict=True)
            return [form.part(part, piece.start, piece.length) for part, piece in of_pieces]

        weights, masters = cut([row.weight() for row in rows]), cut([row.master for row in rows])
        first, second = rows[0].precision.moments
        self._shard = ScatteredShard(
            params=tuple(piece.param for piece in pieces),
            weight=masters or weights,
            grad=(),
            exp_avg=cut([row.exp_avg for row in rows], first),
            exp_avg_sq=cut([row.exp_avg_sq for row in rows], second) or None,
            model=weights if masters else None,
            grad_starts=None if self._sources is None else [piece.start for piece in pieces],
        )

    def with_gradients(self, grads: Mapping[int, Tensor]) -> ScatteredShard:
        own = [grads[param] for param in self.members]
        in_order = [
            grad if grad.stride() == strides else flattened(grad, strides)
            for grad, strides in zip(own, self._strides, strict=True)
        ]
        return self._shard.with_gradients(repeated(in_order, self._sources))


# -- gradients with other placements than their parameters -------------------------------------------


def local_gradients(
    params: Mapping[str, "DTensor"], gradients: Sequence[Tensor], traffic: Traffic
) -> list[Tensor]:
    """This rank's part of the ``gradients`` of ``params``, with the parameter's placements; leaves them unchanged.

    Sums gradients that are Partial on an axis where the parameter is Replicate (a norm's weight under sequence
    parallel): one all-reduce per axis and dtype for all of them.

    Raises:
        TypeError: a gradient that is not a DTensor.
        ValueError: a gradient on another mesh.
    """
    grads = [_checked(name, p, grad) for (name, p), grad in zip(params.items(), gradients, strict=True)]
    local_grads = list(map(local_memory, grads))
    placed_otherwise = {
        i: (grad, p)
        for i, (grad, p) in enumerate(zip(grads, params.values(), strict=True))
        if grad.placements != p.placements
    }
    if placed_otherwise:
        _place(local_grads, placed_otherwise, traffic)
    return local_grads


def _place(
    local_grads: list[Tensor], placed_otherwise: Mapping[int, tuple["DTensor", "DTensor"]], traffic: Traffic
) -> None:
    """Give gradients the placements of their parameters. ``placed_otherwise``: {index: (gradient, parameter)}."""
    from torch.distributed.tensor import DTensor

    placements = {i: list(grad.placements) for i, (grad, _) in placed_otherwise.items()}
    sums: dict[tuple[DeviceMesh, int, torch.dtype, str], list[int]] = {}
    for i, (grad, p) in placed_otherwise.items():
        for axis, (has, wanted) in enumerate(zip(grad.placements, p.placements, strict=True)):
            op = getattr(has, "reduce_op", "")
            if has.is_partial() and wanted.is_replicate() and op in ("sum", "avg"):
                sums.setdefault((grad.device_mesh, axis, grad.dtype, op), []).append(i)
                placements[i][axis] = wanted
    for (mesh, axis, _, op), members in sums.items():
        _all_reduce_packed(local_grads, members, mesh, axis, op, traffic)
    for i, (grad, p) in placed_otherwise.items():
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


def _checked(name: str, p: "DTensor", grad: Tensor) -> "DTensor":
    if not is_dtensor(grad):
        raise TypeError(
            f"the gradient of {name!r} is a {type(grad).__name__} and the parameter a DTensor: the placements "
            f"of the gradient are unknown. Assign DTensor.from_local(gradient, p.device_mesh, placements)"
        )
    if grad.device_mesh is not p.device_mesh and grad.device_mesh != p.device_mesh:
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
