"""What an optimizer holds on this rank: its parameters in order, their buckets or pieces, and step counts."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from sharded_lamb import kernels
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.param_gather import InPlaceGather, ParamGather
from sharded_lamb.comm.topology import Topology
from sharded_lamb.core.footprint import large_sends, small_sends
from sharded_lamb.core.layout import Bucket, ShardLayout, plan_buckets
from sharded_lamb.core.options import OptionTable
from sharded_lamb.core.parameters import NamedParameter, check_parameter
from sharded_lamb.kernels import Shard
from sharded_lamb.sharding.buckets import FlatBucket, Precision
from sharded_lamb.sharding.local_shards import DTensorShards, check_dense
from sharded_lamb.sharding.placements import (
    Replicas,
    ShardSpec,
    local_part,
    mesh_device,
    owners,
    ranks_of_mesh,
)

_owners: Any = WeakIdKeyDictionary()  # parameter → weak reference to the optimizer that holds it

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Settings:
    """The keywords of `ShardedLamb` that are about ranks and memory. Raises ValueError for a wrong one."""

    stage: int
    bucket_mb: float
    master_dtype: torch.dtype
    state_dtype: torch.dtype
    reduce_dtype: torch.dtype | None
    overlap: bool
    skip_nonfinite: bool
    max_consecutive_skips: int
    kernel: str
    store_param_remainders: bool = False

    def __post_init__(self) -> None:
        if self.stage not in (1, 2):
            raise ValueError(
                f"stage must be 1 (gradients are averaged already) or 2 (gradients are reduced here), "
                f"got {self.stage!r}"
            )
        if not self.bucket_mb > 0:
            raise ValueError(f"bucket_mb must be > 0 (MiB of parameters a bucket), got {self.bucket_mb!r}")
        if self.max_consecutive_skips < 1:
            raise ValueError(f"max_consecutive_skips must be >= 1, got {self.max_consecutive_skips!r}")
        if self.kernel not in kernels.NAMES:
            raise ValueError(f"kernel must be one of {kernels.NAMES}, got {self.kernel!r}")
        for name in ("master_dtype", "state_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            if dtype not in _FLOATS and not (name == "reduce_dtype" and dtype is None):
                raise ValueError(f"{name} must be one of {[str(x) for x in _FLOATS]}, got {dtype!r}")

        if self.store_param_remainders and self.master_dtype != torch.float32:
            raise ValueError(
                f"store_param_remainders=True needs master_dtype=torch.float32, got {self.master_dtype}: a remainder "
                f"is the lower half of a float32, beside a bfloat16 weight. Leave one of the two out"
            )

    def described(self) -> dict[str, Any]:
        """As JSON can hold it, for the comparison over ranks."""
        return {key: str(value) for key, value in asdict(self).items()}


def check_shardable(name: str, p: Tensor, device: torch.device) -> None:
    """Raises for a parameter that cannot be held, with the way that can."""
    check_parameter(name, p)
    if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
        raise ValueError(
            f"parameter {name!r} is partitioned by DeepSpeed, which flattens parameters and sets hooks itself: "
            f"ShardedLamb(stage=1 or 2) replaces DeepSpeed's ZeRO and cannot run inside it"
        )
    if p.device.type == "meta":
        raise ValueError(
            f"parameter {name!r} is on the meta device: call model.to_empty(device=…) and initialize it, and "
            f"construct ShardedLamb after"
        )
    if p.device != device:
        raise ValueError(
            f"parameter {name!r} is on {p.device} and others are on {device}: one rank's parameters must share a device"
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """New parameters, the layout with them, and the buckets that the plain ones will be in."""

    rows: list[NamedParameter]
    layout: ShardLayout
    buckets: tuple[Bucket, ...]
    cuts: dict[int, ShardSpec]  # of the DTensors
    device: torch.device
    wire_device: torch.device  # where small all-reduces run

    def described(self, first: int) -> list[tuple[str, Any]]:
        """What ranks must agree on, as JSON can hold it. ``first``: the place of the first row."""
        order = list(dict.fromkeys(self.cuts.values()))  # DTensors on one mesh here must be so on all ranks
        described: list[tuple[str, Any]] = []
        for i, (name, p, _) in enumerate(self.rows, start=first):
            row: list[Any] = [name, list(p.shape), str(p.dtype), p.device.type]
            if i in self.cuts:
                row.append({**self.cuts[i].described(), "cut": order.index(self.cuts[i])})
            described.append((f"parameter {i}", row))
        return [*described, ("parameters", len(self.layout.numels)), ("layout", self.layout.digest())]


def _local_numel(p: Tensor) -> int:
    return local_part(p).numel() if isinstance(p, DTensor) else 0


def _pointer(p: Tensor) -> int:
    """Where a parameter's memory on this rank starts; 0 where it has none."""
    return local_part(p).data_ptr() if isinstance(p, DTensor) else p.data_ptr()


def _check_all_elements_owned(plan: Plan, counted: Sequence[float], first: int) -> None:
    """Raises ValueError unless the ranks that speak hold every element of every DTensor, by their number."""
    for row, (name, p, _) in enumerate(plan.rows):
        if first + row in plan.cuts and int(counted[row]) != p.numel():
            raise ValueError(
                f"this optimizer's ranks hold {int(counted[row])} of the {p.numel()} elements of parameter {name!r} "
                f"({plan.cuts[first + row].described()}): norms over them would be wrong. Pass process_group= with all "
                f"ranks that hold a part of it, and no ranks that hold another model's"
            )


class ParamStore:
    """Parameters in the order in which they were adopted; ``index`` finds a parameter's place."""

    def __init__(self, owner: Any, topology: Topology, settings: Settings) -> None:
        self.topology, self.settings = topology, settings
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.rows: list[NamedParameter] = []
        self.index: dict[Tensor, int] = {}
        self.buckets: list[FlatBucket] = []
        self.gathers: list[ParamGather] = []  # of the buckets
        self.pieces = DTensorShards()
        self.cuts: dict[int, ShardSpec] = {}  # of the DTensors
        self.cells: dict[ShardSpec, tuple[int, ...]] = {}  # of every rank
        self.owner_mask = torch.zeros(0, dtype=torch.float64)  # [P] 1 where this rank's sums count, else 0
        self.layout = ShardLayout((), (), topology.shard_rank, len(topology.shard_ranks))
        self.step = torch.zeros(0, dtype=torch.float64)
        self._owner = weakref.ref(owner)

    @property
    def device(self) -> torch.device:
        return self.params[0].device if self.params else torch.device("cpu")

    def plan(self, rows: Sequence[NamedParameter]) -> Plan:
        """Where those of ``rows`` go that want gradients and are not held yet; nothing is made.

        Raises:
            TypeError, ValueError: see `check_shardable`; two parameters share memory or an optimizer.
        """
        found = self._new(rows)
        rows_of = list(enumerate(found, start=len(self.params)))
        cuts = {i: self._cut(name, p) for i, (name, p, _) in rows_of if isinstance(p, DTensor)}
        plain = [(i, p) for i, (_, p, _) in rows_of if i not in cuts]
        plans = plan_buckets(
            [p.numel() for _, p in plain],
            [p.dtype for _, p in plain],
            [p.element_size() for _, p in plain],
            int(self.settings.bucket_mb * 2**20),
            self.layout.world_size,
        )
        plans = tuple(replace(b, params=tuple(plain[place][0] for place in b.params)) for b in plans)
        layout = replace(
            self.layout,
            numels=(*self.layout.numels, *(p.numel() for _, p, _ in found)),
            buckets=(*self.layout.buckets, *plans),
            placed=self.layout.placed | cuts.keys(),
        )
        device = found[0][1].device if found else self.device
        wire = next((mesh_device(cut.mesh) for cut in cuts.values()), device)
        return Plan(found, layout, plans, cuts, device, wire)

    def _cut(self, name: str, p: DTensor) -> ShardSpec:
        cut = ShardSpec.of(name, p)
        check_dense(name, p)
        beyond = sorted(set(ranks_of_mesh(cut.mesh)) - set(self.topology.everyone))
        if beyond:
            raise ValueError(
                f"parameter {name!r} lies on a mesh of ranks {ranks_of_mesh(cut.mesh)} and this optimizer's ranks are "
                f"{self.topology.everyone}: ranks {beyond} would be missing from its norms. All DTensors' meshes must "
                f"be sliced from one root mesh; or pass process_group= with the ranks of all of them"
            )
        return cut

    def _new(self, rows: Sequence[NamedParameter]) -> list[NamedParameter]:
        found = [row for row in rows if row[1].requires_grad and row[1] not in self.index]
        first: dict[Tensor, str] = {}
        for name, p, _ in found:
            if p in first:
                raise ValueError(f"parameter {first[p]!r} is in the list twice: pass each parameter once")
            first[p] = name
        pointers = {_pointer(p): name for name, p in zip(self.names, self.params, strict=True)}
        for name, p, _ in found:
            check_shardable(name, p, self.params[0].device if self.params else found[0][1].device)
            if self._owned_by_another(p):
                raise ValueError(
                    f"parameter {name!r} already belongs to another ShardedLamb: two would each move it into "
                    f"buckets of their own. Delete the other optimizer first, or use one with two groups"
                )
            if _pointer(p) and _pointer(p) in pointers:
                raise ValueError(
                    f"parameters {pointers[_pointer(p)]!r} and {name!r} are two objects over the same memory: tie "
                    f"them by assigning one Parameter to both modules (decoder.weight = embedding.weight)"
                )
            pointers[_pointer(p)] = name
        return found

    def _owned_by_another(self, p: Tensor) -> bool:
        def owner() -> object:
            return _owners[p]() if p in _owners else None

        if owner() in (None, self._owner()):
            return False
        gc.collect()  # an optimizer that was deleted may be part of a cycle
        return owner() is not None

    def register(self, plan: Plan, collectives: Collectives) -> list[FlatBucket]:
        """Move the plan's plain parameters into buckets, with the first rank's values; DTensors stay where they are.

        Collective: a broadcast a bucket, and two small all-reduces where there are DTensors.

        Raises:
            ValueError: the ranks do not hold every element of a DTensor, on every rank alike.
        """
        owner_mask = self._find_owners(plan, collectives)
        for name, p, group in plan.rows:
            self.index[p] = len(self.params)
            self.names.append(name)
            self.params.append(p)
            self.rows.append((name, p, group))
            _owners[p] = self._owner
        made = []
        for bucket_plan in plan.buckets:
            params = [self.params[param] for param in bucket_plan.params]
            precision = self._precision(params[0].dtype)
            bucket = FlatBucket(bucket_plan, params, precision, self.topology.shard_rank, plan.device)
            collectives.broadcast(bucket.flat)
            bucket.refresh_masters()
            made.append(bucket)
        for param, cut in plan.cuts.items():
            p = self.params[param]
            assert isinstance(p, DTensor)
            self.pieces.add(param, p, self._precision(p.dtype))
            self.cuts[param] = cut
        self.buckets.extend(made)
        self.gathers.extend(InPlaceGather(bucket.flat, collectives) for bucket in made)
        self.owner_mask = torch.cat([self.owner_mask.to(owner_mask.device), owner_mask])
        self.layout = plan.layout
        grown = torch.zeros(len(self.params), dtype=torch.float64, device=self.device)
        grown[: len(self.step)] = self.step
        self.step = grown
        return made

    def _precision(self, model: torch.dtype) -> Precision:
        settings = self.settings
        return Precision.of(
            model,
            settings.master_dtype,
            settings.state_dtype,
            settings.reduce_dtype,
            store_param_remainders=settings.store_param_remainders,
        )

    def _find_owners(self, plan: Plan, collectives: Collectives) -> Tensor:
        """[new P] fp64: 1 where this rank's sums over a parameter count; proved: every element counts once."""
        rank, world = self.topology.rank, len(self.topology.everyone)
        owner_mask = torch.full((len(plan.rows),), float(self.topology.is_first_replica), dtype=torch.float64)
        if plan.cuts:
            new = [cut for cut in dict.fromkeys(plan.cuts.values()) if cut not in self.cells]
            cells = torch.zeros(len(new), world, dtype=torch.float64)
            cells[:, rank] = torch.tensor([cut.cell for cut in new], dtype=torch.float64)
            collectives.all_reduce_small(cells)
            self.cells.update(
                {cut: tuple(map(int, row)) for cut, row in zip(new, cells.tolist(), strict=True)}
            )
            counted = torch.zeros(len(plan.rows), dtype=torch.float64)
            for row, param in enumerate(range(len(self.params), len(self.params) + len(plan.rows))):
                if param in plan.cuts:
                    owner_mask[row] = owners(self.cells[plan.cuts[param]])[rank]
                    counted[row] = owner_mask[row] * _local_numel(plan.rows[row][1])
            collectives.all_reduce_small(counted)
            _check_all_elements_owned(plan, counted.tolist(), len(self.params))
        return owner_mask.to(plan.device)

    def replicas(self) -> Replicas:
        """Which ranks must hold the same gradients. Plain ones in stage 1: all."""
        world = len(self.topology.everyone)
        shared = [cut for cut, cells in self.cells.items() if len(set(cells)) < world]
        kinds = {cut: kind for kind, cut in enumerate(shared)}
        names = [f"placements {cut.placements} on a mesh of {tuple(cut.mesh.shape)}" for cut in shared]
        cells = [self.cells[cut] for cut in shared]
        whole = -1
        if self.settings.stage == 1 and self.buckets:
            whole = len(kinds)
            names, cells = [*names, ""], [*cells, (0,) * world]
        kind_of = [
            kinds.get(self.cuts[param], -1) if param in self.cuts else whole
            for param in range(len(self.params))
        ]
        return Replicas(tuple(names), tuple(kind_of), tuple(cells))

    def shards(self) -> list[Shard]:
        """What the kernels run over: one shard a bucket, in their order, and then the pieces'."""
        return [*(bucket.shard for bucket in self.buckets), *self.pieces.shards]

    def check_attached(self) -> None:
        """Raises RuntimeError where a parameter's memory was replaced since it was adopted."""
        for bucket in self.buckets:
            bucket.check_attached(self.names)
        self.pieces.check_attached(self.names)

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes on this rank by kind, summed over buckets."""
        total = dict.fromkeys(("parameters", "masters", "moments", "gradient_shards"), 0)
        for kinds in (*(bucket.bytes_by_kind() for bucket in self.buckets), self.pieces.bytes_by_kind()):
            for kind, size in kinds.items():
                total[kind] += size
        return total

    def bytes_on_wire(self, *, clips: bool) -> dict[str, int]:
        """Bytes that this rank sends a step: what grows with the model, and the two small vectors."""
        reduces, replicas = self.settings.stage == 2, len(self.topology.replica_ranks)
        flat = ((bucket.plan, bucket.precision.widths) for bucket in self.buckets)
        large = large_sends(flat, reduces=reduces, replicas=replicas)
        sent = {"all_gather": sum(large["all_gather"]), "reduce_scatter": sum(large["reduce_scatter"])}
        if large["all_reduce_replicas"]:
            sent["all_reduce_replicas"] = sum(large["all_reduce_replicas"])
        if len(self.topology.everyone) > 1:
            decides = bool(self.buckets) or clips or self.settings.skip_nonfinite
            twice = reduces and bool(self.buckets) and bool(self.cuts)
            agreements = 1 + twice if decides else 0
            sent["all_reduce_small"] = sum(small_sends(len(self.params), agreements=agreements))
        return sent

    @property
    def stages(self) -> str:
        """ "1", "2" or "3"; "2 and 3" of plain parameters beside DTensors."""
        stages = [str(self.settings.stage)] if self.buckets else []
        return " and ".join([*stages, *(["3"] if self.cuts else [])])

    def summary(self, table: OptionTable, kernel: str, variant: str) -> str:
        """One line: stage, ranks, tensors, how many without decay and without ratio, state, kernel, variant."""
        options, held = table.options(), self.bytes_by_kind()
        plain, fixed = int((options.decay + options.l2 == 0).sum()), int((~options.adapts).sum())
        return (
            f"ShardedLamb stage {self.stages}: {len(self.topology.everyone)} ranks, {len(self.params)} tensors "
            f"({plain} without decay, {fixed} without ratio), {held['moments'] + held['masters']:,} bytes of state "
            f"a rank, kernel {kernel}, variant {variant}"
        )
