"""Memory, bytes on the wire and calls of one rank, from the layout that a model would have on any number of ranks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from sharded_lamb.comm.step_agreement import SLOTS
from sharded_lamb.core.footprint import Widths, large_sends, small_sends, staging_bytes, update_bytes
from sharded_lamb.core.layers import count_blocks
from sharded_lamb.core.layout import Bucket, chunk_numel, plan_buckets
from sharded_lamb.core.rule import SUMS
from sharded_lamb.gradients.reducer import IN_FLIGHT
from sharded_lamb.kernels.state_format import nbytes
from sharded_lamb.plan.sharding import Choices, Sharding
from sharded_lamb.sharding.layer_parts import check_coded_unit

Shapes = Mapping[str, Sequence[int]]

KINDS = ("parameters", "gradients", "masters", "moments", "gradient_shards", "staging")
"""Kinds of memory: those of `ShardedLamb.memory`, and gradients: the ``.grad`` of all parameters after backward."""

DDP_BUCKET_BYTES = 25 * 2**20
"""DistributedDataParallel's default ``bucket_cap_mb``."""


@dataclass(frozen=True)
class Costs:
    """One rank's costs. Bytes by kind; a list holds the bytes that each call sends, in order."""

    sharding: Sharding
    memory: Mapping[str, int]
    large: Mapping[str, Sequence[int]]  # the optimizer's, by collective
    small: Sequence[int]
    around: Mapping[str, Sequence[int]]  # DistributedDataParallel's (stage 1), fully_shard's (stage 3)
    update: int  # bytes that the two passes read and write, and the norms of gradients that are read in place
    padding: int  # bytes of weights and gradients in the padding of fully_shard's shards

    @property
    def total_memory(self) -> int:
        """Bytes without activations and without temporary buffers of DDP and fully_shard."""
        return sum(self.memory.values())

    @property
    def wire(self) -> dict[str, int]:
        """The optimizer's bytes per step, by collective."""
        sums = {name: sum(sends) for name, sends in self.large.items() if sends}
        return {**sums, "all_reduce_small": sum(self.small)} if self.small else sums

    @property
    def calls(self) -> dict[str, int]:
        """The optimizer's calls per step, by collective."""
        counts = {name: len(sends) for name, sends in self.large.items() if sends}
        return {**counts, "all_reduce_small": len(self.small)} if self.small else counts


def costs(shapes: Shapes, choices: Choices, sharding: Sharding, rank: int = 0) -> Costs:
    """The costs of ``rank`` if every parameter has a gradient; equal on all ranks in stages 1 and 2.

    In stage 3 the first rank has the highest; see `trainable`.

    Raises:
        ValueError: ratio blocks do not divide a parameter, or begin inside a block of 8-bit moments.
    """
    choices = choices.of_stage(sharding.stage)
    widths = choices.precision.widths
    if sharding.stage == 3:
        return _of_chunks(shapes, widths, choices, sharding, rank)
    return _of_buckets(shapes, widths, choices, sharding)


def trainable(shapes: Shapes, sharding: Sharding) -> dict[str, tuple[int, ...]]:
    """The parameters; in stage 3 as fully_shard takes them: scalars become vectors of one, empty ones are dropped."""
    if sharding.stage != 3:
        return {name: tuple(shape) for name, shape in shapes.items()}
    return {name: tuple(shape) or (1,) for name, shape in shapes.items() if prod(shape)}


def layers_of(shapes: Shapes, choices: Choices, stage: int) -> int:
    """The number of layers: parameters, and their ratio blocks instead of those that have some. Raises as `costs`."""
    counts = {name: count_blocks(name, shape, choices.ratio_blocks) for name, shape in shapes.items()}
    for name, blocks in counts.items():
        shape = shapes[name]
        # fully_shard's shards may begin at any row.
        unit = prod(shape[1:]) if stage == 3 else prod(shape) // blocks
        if blocks > 1:
            check_coded_unit(name, shape, blocks, unit, choices.precision)
    return sum(counts.values())


def buckets_of(shapes: Iterable[Sequence[int]], choices: Choices, ranks: int) -> tuple[Bucket, ...]:
    """The buckets that `ShardedLamb` plans for a model of one dtype on one device."""
    numels = [prod(shape) for shape in shapes]
    count = len(numels)
    return plan_buckets(
        numels, [None] * count, [choices.model_dtype.itemsize] * count, int(choices.bucket_mb * 2**20), ranks
    )


def _of_buckets(shapes: Shapes, widths: Widths, choices: Choices, sharding: Sharding) -> Costs:
    buckets = buckets_of(shapes.values(), choices, sharding.shard)
    flat = [(bucket, widths) for bucket in buckets]
    numels, layers = [prod(shape) for shape in shapes.values()], layers_of(shapes, choices, sharding.stage)
    full, shard = sum(bucket.numel for bucket in buckets), sum(bucket.shard_numel for bucket in buckets)
    reduces = sharding.stage == 2
    staging = staging_bytes(flat, in_flight=IN_FLIGHT, sums_here=choices.sums_here) if reduces else 0
    kept = 0 if reduces else sum(numels)  # stage 2 leaves tensors without memory in .grad
    around = {}
    if not reduces and sharding.world_size > 1:
        around["ddp_all_reduce"] = _split(sum(numels) * widths.model, DDP_BUCKET_BYTES)
    return Costs(
        sharding,
        memory={
            "parameters": full * widths.model,
            "gradients": kept * widths.model,
            "masters": shard * widths.master,
            "moments": int(2 * shard * widths.state),
            "gradient_shards": shard * widths.compute if reduces else 0,
            "staging": staging,
        },
        large=large_sends(flat, reduces=reduces, replicas=sharding.replicate),
        small=small_sends(len(shapes), layers, len(SUMS), digest=SLOTS, agreements=1)
        if sharding.world_size > 1
        else [],
        around=around,
        update=update_bytes(shard, widths) if reduces else _update_in_place(shard, widths),
        padding=0,
    )


def _update_in_place(numel: int, widths: Widths) -> int:
    """Gradients are read where they are, by pass 1 and for their norms; stage 2 sums those where it averages."""
    return update_bytes(numel, replace(widths, compute=widths.model)) + numel * widths.model


def _of_chunks(shapes: Shapes, widths: Widths, choices: Choices, sharding: Sharding, rank: int) -> Costs:
    shapes = trainable(shapes, sharding)
    layers, placed = layers_of(shapes, choices, sharding.stage), list(shapes.values())
    parts = [chunk_numel(shape, sharding.shard, rank % sharding.shard) for shape in placed]
    own = sum(parts)
    padded = sum(chunk_numel(shape, sharding.shard, 0) for shape in placed)
    return Costs(
        sharding,
        memory={
            "parameters": own * widths.model,
            "gradients": own * widths.model,
            "masters": own * widths.master,
            "moments": sum(nbytes(form, part) for form in choices.precision.moments for part in parts),
            "gradient_shards": 0,
            "staging": 0,
        },
        large={},
        small=small_sends(len(placed), layers, len(SUMS), digest=SLOTS, agreements=1)
        if sharding.world_size > 1
        else [],
        around=_around_chunks(placed, widths, choices, sharding),
        update=_update_in_place(own, widths),
        padding=2 * (padded - own) * widths.model,
    )


def _around_chunks(
    placed: Sequence[Sequence[int]], widths: Widths, choices: Choices, sharding: Sharding
) -> dict[str, list[int]]:
    """The bytes that fully_shard sends, padding included. Users choose its groups; here they equal our buckets."""
    units = [
        sum(chunk_numel(placed[param], sharding.shard, 0) for param in bucket.params)
        for bucket in buckets_of(placed, choices, 1)
    ]
    others = sharding.shard - 1
    sends = {
        "fsdp_all_gather": [numel * others * widths.model for numel in units],  # for forward
        "fsdp_all_gather_again": [numel * others * widths.model for numel in units],  # for backward
        "fsdp_reduce_scatter": [int(numel * others * widths.wire) for numel in units],
        "fsdp_all_reduce": [int(numel * widths.wire) for numel in units if sharding.replicate > 1],
    }
    return {name: sizes for name, sizes in sends.items() if sum(sizes)}


def _split(size: int, most: int) -> list[int]:
    whole, rest = divmod(size, most)
    return [most] * whole + ([rest] if rest else [])
