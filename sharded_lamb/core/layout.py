"""Shard layout: which rank holds which elements of which parameter. Integers and strings, validated at construction.

A bucket is a flat, contiguous range of memory: parameters follow each other, each at a multiple of `BLOCK`
elements, padded to ``BLOCK x world_size`` elements and divided into ``world_size`` equal shards::

    bucket 0   |wwwwwwww··|bb········|wwwwwwwwwwwwwwww|···············|      · padding
               |     rank 0     |     rank 1     |       rank 2       |

Shards end at block boundaries, so every block of a parameter is whole on one rank and is the same block on any
number of ranks: sums over blocks have the same bits (`sharded_lamb.kernels`).
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

BLOCK = 256
"""Elements per block; 1 KiB of fp32. Sums of squares are fp32 within a block, fp64 over blocks."""


def round_up(numel: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is >= ``numel``."""
    return -(-numel // multiple) * multiple


def chunk_numel(shape: Sequence[int], ranks: int, rank: int) -> int:
    """Elements that ``rank`` holds of a tensor sharded as ``Shard(0)``, by torch.chunk's rule.

    Every rank but the last ones has ``ceil(rows / ranks)`` rows; the last ones may have fewer, or none.
    """
    rows = -(-shape[0] // ranks)
    return max(min(shape[0] - rank * rows, rows), 0) * math.prod(shape[1:])


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements [start, start + length) of a flattened parameter, at ``shard_start`` of a rank's shard.

    The parameter is flattened in memory order: for a contiguous one, the order of ``view(-1)``.
    """

    param: int
    start: int
    length: int
    shard_start: int


@dataclass(frozen=True, slots=True)
class MessageRun:
    """Elements [start, stop) of a rank's shard that one message carries."""

    start: int
    stop: int
    segment: Segment | None  # the one that fills the run; None: small segments and padding


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters ``params`` (indices, ascending ``offsets``) in one flat range of ``numel`` elements."""

    params: tuple[int, ...]
    offsets: tuple[int, ...]
    numels: tuple[int, ...]
    numel: int
    world_size: int

    def __post_init__(self) -> None:
        """Validate: parameters are disjoint, start at blocks and fit; shards tile the bucket in whole blocks.

        Every element of every parameter is then in exactly one rank's shard. Raises ValueError.
        """
        if len({len(self.params), len(self.offsets), len(self.numels)}) != 1 or not self.params:
            raise ValueError(f"a bucket needs one offset and one size a parameter, got {self}")
        end = 0
        for param, offset, numel in zip(self.params, self.offsets, self.numels, strict=True):
            if offset % BLOCK or offset < end or numel < 0:
                raise ValueError(
                    f"parameter {param} at {offset} with {numel} elements: offsets must be multiples of {BLOCK} "
                    f"and parameters disjoint (the one before ends at {end})"
                )
            end = offset + numel
        if end > self.numel or self.world_size < 1 or self.numel % (BLOCK * self.world_size):
            raise ValueError(
                f"a bucket of {self.numel} elements must hold its parameters ({end} elements) and divide into "
                f"{self.world_size} shards of whole blocks of {BLOCK}"
            )

    @property
    def shard_numel(self) -> int:
        return self.numel // self.world_size

    def shard_range(self, rank: int) -> tuple[int, int]:
        """[start, stop) in the bucket of the shard that ``rank`` holds."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def gaps(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of the padding that no parameter fills, in memory order."""
        ends = [0, *(offset + numel for offset, numel in zip(self.offsets, self.numels, strict=True))]
        starts = [*self.offsets, self.numel]
        return tuple((end, start) for end, start in zip(ends, starts, strict=True) if end < start)

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The segments of ``rank``, in memory order; O(segments of this rank), independent of the number of ranks."""
        low, high = self.shard_range(rank)
        segments = []
        first = max(bisect_right(self.offsets, low) - 1, 0)
        for param, offset, numel in zip(
            self.params[first:], self.offsets[first:], self.numels[first:], strict=True
        ):
            if offset >= high:
                break
            start, stop = max(low, offset), min(high, offset + numel)
            if start < stop:
                segments.append(Segment(param, start - offset, stop - start, start - low))
        return tuple(segments)

    def runs(self, rank: int, alone: int) -> tuple[MessageRun, ...]:
        """The whole shard of ``rank`` as runs: one per segment of ``alone`` elements or more, one per rest between."""
        runs, at = [], 0
        for segment in self.segments(rank):
            if segment.length < alone:
                continue
            if at < segment.shard_start:
                runs.append(MessageRun(at, segment.shard_start, None))
            at = segment.shard_start + segment.length
            runs.append(MessageRun(segment.shard_start, at, segment))
        if at < self.shard_numel:
            runs.append(MessageRun(at, self.shard_numel, None))
        return tuple(runs)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """All buckets and this rank's place in them.

    Frozen and complete: `Bucket` validates coverage over ranks; this class validates that every parameter is whole in
    exactly one bucket, or in ``dtensors``.
    """

    numels: tuple[int, ...]  # per parameter
    buckets: tuple[Bucket, ...]
    rank: int
    world_size: int
    dtensors: frozenset[int] = frozenset()  # sharded by their placements: `sharded_lamb.sharding.placements`

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in [0, {self.world_size}), got {self.rank}")
        seen = [param in self.dtensors for param in range(len(self.numels))]
        for bucket in self.buckets:
            if bucket.world_size != self.world_size:
                raise ValueError(f"a bucket for {bucket.world_size} ranks in a layout for {self.world_size}")
            for param, numel in zip(bucket.params, bucket.numels, strict=True):
                if not 0 <= param < len(seen):
                    raise ValueError(f"parameter {param} is not one of {len(seen)}")
                if seen[param] or numel != self.numels[param]:
                    raise ValueError(
                        f"parameter {param} of {self.numels[param]} elements is in two buckets, or placed by a DTensor "
                        f"and in one, or not whole in one"
                    )
                seen[param] = True
        if not all(seen):
            raise ValueError(f"parameter {seen.index(False)} is in no bucket")

    @property
    def shard_numel(self) -> int:
        """Elements of state on this rank, padding included."""
        return sum(bucket.shard_numel for bucket in self.buckets)

    def digest(self) -> str:
        """SHA-256 over the layout's integers: equal on all ranks of one layout, different for any other layout."""
        buckets = [(b.params, b.offsets, b.numels, b.numel) for b in self.buckets]
        dtensors = [[(param, self.numels[param]) for param in sorted(self.dtensors)]] if self.dtensors else []
        return hashlib.sha256(json.dumps([self.world_size, buckets, *dtensors]).encode()).hexdigest()

    def picture(self, names: Sequence[str], width: int = 60) -> str:
        """One line per parameter: its elements from left to right, each as its rank modulo 10."""
        lines = []
        label = max((len(name) for name in names), default=0)
        for bucket in self.buckets:
            for param, offset, numel in zip(bucket.params, bucket.offsets, bucket.numels, strict=True):
                columns = min(width, numel)
                elements = [offset + column * numel // columns for column in range(columns)]
                owners = "".join(str(element // bucket.shard_numel % 10) for element in elements)
                lines.append(f"{names[param]:<{label}}  {numel:>12,}  {owners}")
        return "\n".join(lines)


def plan_buckets(
    numels: Sequence[int],
    kinds: Sequence[Hashable],
    itemsizes: Sequence[int],
    bucket_bytes: int,
    world_size: int,
) -> tuple[Bucket, ...]:
    """Buckets of parameters of one kind (dtype and device), last parameters first.

    Backward produces gradients roughly in reverse order, so bucket 0 fills first. A bucket closes once it holds
    ``bucket_bytes`` of parameters; its parameters do not depend on the number of ranks.

    Args:
        numels, kinds, itemsizes: elements, kind and bytes per element of every parameter.
        bucket_bytes: size at which a bucket closes; a larger parameter closes its bucket alone.
        world_size: number of shards per bucket.
    """
    filling: dict[Hashable, tuple[list[int], int]] = {}
    closed: list[list[int]] = []
    for param in reversed(range(len(numels))):
        members, filled = filling.get(kinds[param], ([], 0))
        members.append(param)
        filled += round_up(numels[param], BLOCK) * itemsizes[param]
        filling[kinds[param]] = (members, filled)
        if filled >= bucket_bytes:
            closed.append(members)
            del filling[kinds[param]]
    closed.extend(members for members, _ in filling.values())
    return tuple(_place(members, numels, world_size) for members in closed)


def _place(members: Iterable[int], numels: Sequence[int], world_size: int) -> Bucket:
    params = tuple(members)
    offsets, end = [], 0
    for param in params:
        offsets.append(end)
        end = round_up(end + numels[param], BLOCK)
    padded = max(round_up(end, BLOCK * world_size), BLOCK * world_size)
    return Bucket(params, tuple(offsets), tuple(numels[param] for param in params), padded, world_size)
