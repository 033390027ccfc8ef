"""What an optimizer holds on this rank: its parameters in order, their buckets, slices and step counts."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from sharded_lamb.base import NamedParameter, check_parameter
from sharded_lamb.buckets import FlatBucket, Precision
from sharded_lamb.collectives import Collectives, Topology
from sharded_lamb.layout import Bucket, ShardLayout, plan_buckets
from sharded_lamb.options import OptionTable

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
        for name in ("master_dtype", "state_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            if dtype not in _FLOATS and not (name == "reduce_dtype" and dtype is None):
                raise ValueError(f"{name} must be one of {[str(x) for x in _FLOATS]}, got {dtype!r}")

    def described(self) -> dict[str, Any]:
        """As JSON can hold it, for the comparison over ranks."""
        return {key: str(value) for key, value in asdict(self).items()}


def check_shardable(name: str, p: Tensor, device: torch.device) -> None:
    """Raises for a parameter that cannot be cut into flat slices here, with the way that can."""
    check_parameter(name, p)
    if isinstance(p, DTensor):
        raise ValueError(
            f"parameter {name!r} is a DTensor (fully_shard, tensor parallel): its placements cut it already, and "
            f"flat slices of one rank's part would give wrong trust ratios. Pass parameters that are not sharded"
        )
    if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
        raise ValueError(
            f"parameter {name!r} is partitioned by DeepSpeed, which flattens parameters and sets hooks itself: "
            f"ShardedLamb(stage=1 or 2) replaces DeepSpeed's ZeRO and cannot run inside it"
        )
    if p.device.type == "meta":
        raise ValueError(
            f"parameter {name!r} is on the meta device: call model.to_empty(device=…) and initialize it"
        )
    if p.device != device:
        raise ValueError(
            f"parameter {name!r} is on {p.device} and others are on {device}: one rank's parameters must share a device"
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """New parameters, the layout with them, and the buckets that they will be in."""

    rows: list[NamedParameter]
    layout: ShardLayout
    buckets: tuple[Bucket, ...]
    device: torch.device


class Holdings:
    """Parameters in the order in which they were adopted; ``index`` finds a parameter's place."""

    def __init__(self, owner: Any, topology: Topology, settings: Settings) -> None:
        self.topology, self.settings = topology, settings
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.rows: list[NamedParameter] = []
        self.index: dict[Tensor, int] = {}
        self.buckets: list[FlatBucket] = []
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
        first, numels = len(self.params), [p.numel() for _, p, _ in found]
        plans = plan_buckets(
            numels,
            [p.dtype for _, p, _ in found],
            [p.element_size() for _, p, _ in found],
            int(self.settings.bucket_mb * 2**20),
            self.layout.world_size,
        )
        plans = tuple(replace(b, params=tuple(first + param for param in b.params)) for b in plans)
        layout = replace(
            self.layout, numels=(*self.layout.numels, *numels), buckets=(*self.layout.buckets, *plans)
        )
        return Plan(found, layout, plans, found[0][1].device if found else self.device)

    def _new(self, rows: Sequence[NamedParameter]) -> list[NamedParameter]:
        found = [row for row in rows if row[1].requires_grad and row[1] not in self.index]
        first: dict[Tensor, str] = {}
        for name, p, _ in found:
            if p in first:
                raise ValueError(f"parameter {first[p]!r} is in the list twice: pass each parameter once")
            first[p] = name
        pointers = {p.data_ptr(): name for name, p in zip(self.names, self.params, strict=True) if p.numel()}
        for name, p, _ in found:
            check_shardable(name, p, self.params[0].device if self.params else found[0][1].device)
            if self._owned_by_another(p):
                raise ValueError(
                    f"parameter {name!r} already belongs to another ShardedLamb: two would each move it into "
                    f"buckets of their own. Delete the other optimizer first, or use one with two groups"
                )
            if p.numel() and p.data_ptr() in pointers:
                raise ValueError(
                    f"parameters {pointers[p.data_ptr()]!r} and {name!r} are two objects over the same memory: tie "
                    f"them by assigning one Parameter to both modules (decoder.weight = embedding.weight)"
                )
            pointers[p.data_ptr()] = name
        return found

    def _owned_by_another(self, p: Tensor) -> bool:
        def owner() -> object:
            return _owners[p]() if p in _owners else None

        if owner() in (None, self._owner()):
            return False
        gc.collect()  # an optimizer that was deleted may be part of a cycle
        return owner() is not None

    def adopt(self, plan: Plan, collectives: Collectives) -> list[FlatBucket]:
        """Move the plan's parameters into buckets, with the first rank's values. Collective: a broadcast a bucket."""
        for name, p, group in plan.rows:
            self.index[p] = len(self.params)
            self.names.append(name)
            self.params.append(p)
            self.rows.append((name, p, group))
            _owners[p] = self._owner
        settings, made = self.settings, []
        for bucket_plan in plan.buckets:
            params = [self.params[param] for param in bucket_plan.params]
            precision = Precision.of(
                params[0].dtype, settings.master_dtype, settings.state_dtype, settings.reduce_dtype
            )
            bucket = FlatBucket(bucket_plan, params, precision, self.topology.shard_rank, plan.device)
            collectives.broadcast(bucket.flat)
            bucket.refresh_masters()
            made.append(bucket)
        self.buckets.extend(made)
        self.layout = plan.layout
        grown = torch.zeros(len(self.params), dtype=torch.float64, device=self.device)
        grown[: len(self.step)] = self.step
        self.step = grown
        return made

    def check_attached(self) -> None:
        """Raises RuntimeError where a parameter's memory was replaced since it was adopted."""
        for bucket in self.buckets:
            bucket.check_attached(self.names)

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes on this rank by kind, summed over buckets."""
        total = dict.fromkeys(("parameters", "masters", "moments", "gradient_shards"), 0)
        for bucket in self.buckets:
            for kind, size in bucket.bytes_by_kind().items():
                total[kind] += size
        return total

    def bytes_on_wire(self) -> dict[str, int]:
        """Bytes that this rank sends a step: what grows with the model, and the two small vectors."""
        sent = {"all_gather": 0, "reduce_scatter": 0}
        for bucket in self.buckets:
            others = bucket.plan.shard_numel * (self.layout.world_size - 1)
            sent["all_gather"] += others * bucket.precision.model.itemsize
            if self.settings.stage == 2:
                sent["reduce_scatter"] += others * bucket.precision.wire.itemsize
                if len(self.topology.replica_ranks) > 1:
                    replicas = bucket.plan.shard_numel * bucket.precision.compute.itemsize
                    sent["all_reduce_replicas"] = sent.get("all_reduce_replicas", 0) + replicas
        if len(self.topology.everyone) > 1:
            sent["all_reduce_small"] = (3 + 2) * len(self.params) * 8 + 8
        return sent

    def summary(self, table: OptionTable, kernel: str, variant: str) -> str:
        """One line: stage, ranks, tensors, how many without decay and without ratio, state, kernel, variant."""
        options, held = table.options(), self.bytes_by_kind()
        plain, fixed = int((options.decay + options.l2 == 0).sum()), int((~options.adapts).sum())
        return (
            f"ShardedLamb stage {self.settings.stage}: {len(self.topology.everyone)} ranks, {len(self.params)} tensors "
            f"({plain} without decay, {fixed} without ratio), {held['moments'] + held['masters']:,} bytes of state "
            f"a rank, kernel {kernel}, variant {variant}"
        )
