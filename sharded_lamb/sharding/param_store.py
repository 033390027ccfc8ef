"""The memory of a `ShardedLamb` on this rank: its parameters in order, their buckets or DTensors, and step counts."""

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.param_gather import CompressedGather, InPlaceGather, ParamGather
from sharded_lamb.comm.step_agreement import SLOTS
from sharded_lamb.comm.topology import Topology
from sharded_lamb.core.footprint import large_sends, small_sends
from sharded_lamb.core.host_values import as_tensor
from sharded_lamb.core.layers import Layers, RatioBlocks
from sharded_lamb.core.layout import ShardLayout
from sharded_lamb.core.options import OptionTable
from sharded_lamb.core.parameters import NamedParameter
from sharded_lamb.kernels import Shard
from sharded_lamb.kernels.state_format import StoredState
from sharded_lamb.sharding.buckets import FlatBucket
from sharded_lamb.sharding.dtensors import is_dtensor
from sharded_lamb.sharding.layer_parts import check_blocks, check_coded_blocks, segments_of_part
from sharded_lamb.sharding.local_shards import DTensorShards
from sharded_lamb.sharding.ownership import Ownership
from sharded_lamb.sharding.placements import Replicas, ShardSpec
from sharded_lamb.sharding.shard_plan import (
    Settings,
    ShardPlan,
    check_new,
    check_separate,
    claim,
    plan_shards,
    release_claims,
)


class ParamStore:
    """Parameters in registration order; ``index`` maps a parameter to its position."""

    def __init__(
        self, optimizer: Any, topology: Topology, settings: Settings, ratio_blocks: RatioBlocks
    ) -> None:
        self.topology, self.settings, self.ratio_blocks = topology, settings, ratio_blocks
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.rows: list[NamedParameter] = []
        self.layers = Layers((), ())
        self.index: dict[Tensor, int] = {}
        self.buckets: list[FlatBucket] = []
        self.gathers: list[ParamGather] = []  # one per bucket
        self._in_flight: list[CompressedGather] = []
        self.dtensors = DTensorShards()
        self.ownership = Ownership(topology)
        self.layout = ShardLayout((), (), topology.shard_rank, len(topology.shard_ranks))
        self.step = torch.zeros(0, dtype=torch.float64, device="cpu")  # [P] on the parameters' device
        self._bucket_of: dict[int, FlatBucket] = {}
        self._optimizer = weakref.ref(optimizer)

    @property
    def optimizer(self) -> Any:
        """The optimizer of this store, itself and not a wrapper."""
        return self._optimizer()

    @property
    def device(self) -> torch.device:
        return self.params[0].device if self.params else torch.device("cpu")

    @property
    def has_moved(self) -> bool:
        """Whether all parameters are on one other device than this memory, else as they were; False for DTensors."""
        device = self.device
        if not self.params or device == self.step.device or device.type == "meta" or self.specs:
            return False
        return all(bucket.is_on(device, i) for bucket in self.buckets for i in range(len(bucket.params)))

    @property
    def owner_mask(self) -> Tensor:
        """[L] fp64: see `Ownership.mask`."""
        return self.layers.expand(self.ownership.mask)

    @property
    def specs(self) -> dict[int, ShardSpec]:
        """The specs of the DTensors."""
        return self.ownership.specs

    def plan(self, rows: Sequence[NamedParameter]) -> ShardPlan:
        """Plan the ``rows`` that require gradients and are not in the store yet. Allocates nothing.

        Raises:
            TypeError, ValueError: see `check_new` and `plan_shards`.
        """
        new = [row for row in rows if row[1].requires_grad and row[1] not in self.index]
        for name, p, group in new:
            self.settings.check_master(name, p.dtype)
            self.settings.check_gather(name, p)
            self.settings.check_reduce(name, p)
            check_blocks(name, p, self.ratio_blocks)
            check_coded_blocks(name, p, self.ratio_blocks, self.settings.of_group(group).precision(p))
        release_claims(new, self._optimizer())
        check_new(new, self.names, self.params)
        return plan_shards(new, self.layout, self.topology, self.settings, self.device)

    def register(self, plan: ShardPlan, collectives: Collectives) -> list[FlatBucket]:
        """Move the plan's plain parameters into buckets, with the first rank's values; leave DTensors in place.

        Collective: one broadcast per bucket, and two small all-reduces if there are DTensors.

        Raises:
            ValueError: the ranks do not hold every element of a DTensor; on every rank.
        """
        self.ownership.extend(plan, collectives)
        claim(self)
        for name, p, group in plan.rows:
            self.index[p] = len(self.params)
            self.names.append(name)
            self.params.append(p)
            self.rows.append((name, p, group))
        self.layers = Layers.named(self.rows, self.ratio_blocks)
        first = len(self.params) - len(plan.rows)
        added = []
        for bucket_plan in plan.buckets:
            params = [self.params[param] for param in bucket_plan.params]
            precision = plan.precisions[bucket_plan.params[0] - first]
            bucket = FlatBucket(
                bucket_plan,
                params,
                self.layers,
                precision,
                self.topology.shard_rank,
                plan.device,
                holds_gradients=self.settings.stage == 2,
            )
            collectives.broadcast(bucket.flat)
            bucket.refresh_masters()
            bucket.write_shared()
            added.append(bucket)
            self._bucket_of.update(dict.fromkeys(bucket_plan.params, bucket))
        for param in plan.specs:
            p = self.params[param]
            assert is_dtensor(p)
            segments = segments_of_part(param, p, self.layers)
            self.dtensors.add(param, p, segments, plan.precisions[param - first])
        self.buckets.extend(added)
        self.gathers.extend(self._gather_of(bucket, collectives) for bucket in added)
        self.layout = plan.layout
        grown = torch.zeros(len(self.params), dtype=torch.float64, device=self.device)
        grown[: len(self.step)] = self.step
        self.step = grown
        return added

    def _gather_of(self, bucket: FlatBucket, collectives: Collectives) -> ParamGather:
        format = bucket.precision.gather
        if format is None:
            return InPlaceGather(bucket.flat, collectives)
        return CompressedGather(bucket.flat, bucket.shard.weight, collectives, format, self._in_flight)

    def states_of(self, param: int) -> list[StoredState]:
        """The kinds of state of this rank's part of a parameter."""
        if param in self._bucket_of:
            return self._bucket_of[param].states_of(param)
        return self.dtensors.local[param].states()

    def load_whole(self, param: int, saved: Mapping[str, Any] | None) -> None:
        """Store this rank's part of a parameter's whole, checked state; None: the state of a new optimizer."""
        for state in self.states_of(param):
            if saved is not None and state.kind in saved:
                state.store(self.part_of_whole(param, saved[state.kind]))
            else:
                state.reset()
        self.step[param] = 0 if saved is None else as_tensor(saved["step"]).reshape(())

    def part_of_whole(self, param: int, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor of a parameter's shape."""
        bucket = self._bucket_of.get(param)
        return (
            bucket.segment_of_whole(param, whole)
            if bucket
            else self.dtensors.local[param].part_of_whole(whole)
        )

    def replicas(self) -> Replicas:
        """Which ranks must hold equal gradients: in stage 1 all of them, for plain parameters."""
        return self.ownership.replicas(averaged=self.settings.stage == 1 and bool(self.buckets))

    def units(self) -> list[Sequence[Shard]]:
        """The kernels' shards: those of each bucket, in order, then each of the DTensors'."""
        return [*(bucket.kernel_shards for bucket in self.buckets), *([x] for x in self.dtensors.shards)]

    def reattach(self) -> None:
        """Copy weights that were written outside the buckets into them, before a step.

        Those are parameters whose ``.data`` was replaced, which cover their bucket again, and parameters in shared
        memory, which stay there. The step's all-gather overwrites other ranks' slices, as after a write in place.

        Raises:
            RuntimeError: a parameter has another dtype, shape or device, or shares the memory of another one; or a
                DTensor's local part changed so.
        """
        moved = [(bucket, position) for bucket in self.buckets for position in bucket.replaced()]
        if moved:
            self._attach(moved)
        for bucket in self.buckets:
            bucket.read_shared()
        self.dtensors.check_attached(self.names)

    def _attach(self, moved: Sequence[tuple[FlatBucket, int]]) -> None:
        for bucket, position in moved:
            bucket.check_fits(position, self.names[bucket.plan.params[position]])
        check_separate(self.names, self.params)
        values = [bucket.params[position].detach() for bucket, position in moved]
        for i, value in enumerate(values):
            if any(
                bucket.contains(value) for bucket in self.buckets
            ):  # swapped parameters, a transposed view
                values[i] = value.clone()
        for (bucket, position), value in zip(moved, values, strict=True):
            bucket.attach(position, value)

    def update_averages(self, share: Tensor) -> None:
        """average ← average + share (w - average), w the masters if there are any. ``share``: fp64 scalar in [0, 1]."""
        averages: dict[torch.dtype, list[Tensor]] = {}
        values: dict[torch.dtype, list[Tensor]] = {}
        for states in [
            *(b.states() for b in self.buckets),
            *(x.states() for x in self.dtensors.local.values()),
        ]:
            of_kind = {state.kind: state for state in states}
            average = of_kind["ema"]
            source = of_kind["master"].values() if "master" in of_kind else cast(Tensor, average.weight)
            dtype = average.stored.dtype
            averages.setdefault(dtype, []).append(average.stored)
            values.setdefault(dtype, []).append(source.to(dtype))
        for dtype, stored in averages.items():
            torch._foreach_lerp_(stored, values[dtype], [share.to(dtype)] * len(stored))

    def show_averages(self) -> list[Tensor]:
        """Write averages to this rank's weights in the model. Returns copies of those weights, for `show_weights`."""
        own = self._own_weights()
        kept = [weight.clone() for weight in own]
        averages = [bucket.average for bucket in self.buckets]
        averages += [local.average for local in self.dtensors.local.values()]
        for weight, average in zip(own, averages, strict=True):
            assert average is not None
            weight.copy_(average)
        return kept

    def show_weights(self, kept: Sequence[Tensor]) -> None:
        """Undo `show_averages`."""
        for weight, before in zip(self._own_weights(), kept, strict=True):
            weight.copy_(before)

    def _own_weights(self) -> list[Tensor]:
        own = [bucket.own_weights for bucket in self.buckets]
        return [*own, *(local.weight() for local in self.dtensors.local.values())]

    def shared_buckets(self) -> list[int]:
        """The buckets with parameters in shared memory."""
        return [index for index, bucket in enumerate(self.buckets) if bucket.has_shared]

    def write_shared(self) -> None:
        """Copy gathered buckets to their parameters in shared memory."""
        for bucket in self.buckets:
            bucket.write_shared()

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes on this rank by kind, summed over buckets."""
        total = Counter(dict.fromkeys(("parameters", "masters", "moments", "gradient_shards"), 0))
        for kinds in (*(bucket.bytes_by_kind() for bucket in self.buckets), self.dtensors.bytes_by_kind()):
            total.update(kinds)
        return dict(total)

    def bytes_on_wire(self, sums: int, *, needs_summary: bool) -> dict[str, int]:
        """Bytes that this rank sends per step: buckets, which grow with the model, and the two small vectors.

        Args:
            sums: numbers per layer in all-reduce (b).
            needs_summary: clipping or normalized gradients need all-reduce (a) before pass 1.
        """
        reduces, replicas = self.settings.stage == 2, len(self.topology.replica_ranks)
        flat = ((bucket.plan, bucket.precision.widths) for bucket in self.buckets)
        large = large_sends(flat, reduces=reduces, replicas=replicas)
        sent = {"all_gather": sum(large["all_gather"]), "reduce_scatter": sum(large["reduce_scatter"])}
        if large["all_reduce_replicas"]:
            sent["all_reduce_replicas"] = sum(large["all_reduce_replicas"])
        if len(self.topology.everyone) > 1:
            decides = bool(self.buckets) or needs_summary or self.settings.skip_nonfinite
            two_sources = reduces and bool(self.buckets) and bool(self.specs)
            agreements = 1 + two_sources if decides else 0
            sent["all_reduce_small"] = sum(
                small_sends(len(self.params), len(self.layers), sums, digest=SLOTS, agreements=agreements)
            )
        return sent

    @property
    def stages(self) -> str:
        """ "1", "2" or "3"; "1 and 3" or "2 and 3" for plain parameters beside DTensors."""
        stages = [str(self.settings.stage)] if self.buckets else []
        return " and ".join([*stages, *(["3"] if self.specs else [])])

    def summary(self, table: OptionTable, kernel: str, variant: str) -> str:
        """One line: stage, ranks, tensors, layers without decay and without ratio, bytes of state, kernel, variant."""
        options, sizes = table.options(), self.bytes_by_kind()
        tensors = f"{len(self.params)} tensors"
        if len(table) > len(self.params):
            tensors += f" of {len(table)} layers"
        no_decay, no_ratio = int((options.decay + options.l2 == 0).sum()), int((~options.adapts).sum())
        return (
            f"ShardedLamb stage {self.stages}: {len(self.topology.everyone)} ranks, {tensors} "
            f"({no_decay} without decay, {no_ratio} without ratio), {sizes['moments'] + sizes['masters']:,} bytes of "
            f"state per rank, kernel {kernel}, variant {variant}"
        )
