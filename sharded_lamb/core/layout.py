"""Which rank holds which part of which parameter. Integers and strings only; proved when made.

A bucket is a flat run of memory in which parameters lie one after the other, each at a multiple of
`BLOCK` elements, padded to ``BLOCK x world_size`` elements and cut into ``world_size`` equal shards::

    bucket 0   |wwwwwwww··|bb········|wwwwwwwwwwwwwwww|···············|      · padding
               |     rank 0     |     rank 1     |       rank 2       |

Cuts fall between blocks, so every block of a parameter is whole on one rank, and is the same block on
any number of ranks: sums over blocks have the same bits (`sharded_lamb.kernels`).
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

BLOCK = 256
"""Elements a block. 1 KiB of fp32: sums of squares within it are fp32, over blocks fp64."""


def round_up(numel: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is >= ``numel``."""
    return -(-numel // multiple) * multiple


def chunk_numel(shape: Sequence[int], ranks: int, rank: int) -> int:
    """Elements that ``rank`` holds of a tensor cut along dimension 0 as ``Shard(0)`` cuts, by torch.chunk's rule.

    Every rank but the last ones has ``ceil(rows / ranks)`` rows; those may have fewer, or none.
    """
    rows = -(-shape[0] // ranks)
    return max(min(shape[0] - rank * rows, rows), 0) * math.prod(shape[1:])


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements [start, start + length) of a flattened parameter, at ``shard_start`` of a rank's shard.

    The parameter is flattened in memory order, which for a contiguous one is the order of ``view(-1)``.
    """

    param: int
    start: int
    length: int
    shard_start: int


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [start, stop) of a rank's shard that travel together; ``segment``: what fills them, where one does."""

    start: int
    stop: int
    segment: Segment | None


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters ``params`` (indices, ascending ``offsets``) in one flat run of ``numel`` elements."""

    params: tuple[int, ...]
    offsets: tuple[int, ...]
    numels: tuple[int, ...]
    numel: int
    world_size: int

    def __post_init__(self) -> None:
        """The proof: parameters are disjoint, at block starts, inside; shards tile the bucket in blocks.

        Every element of every parameter is then in exactly one rank's shard.
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
        """[start, stop) of what no parameter fills, in memory order."""
        ends = [0, *(offset + numel for offset, numel in zip(self.offsets, self.numels, strict=True))]
        starts = [*self.offsets, self.numel]
        return tuple((end, start) for end, start in zip(ends, starts, strict=True) if end < start)

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """What ``rank`` holds, in memory order; work in proportion to what it holds, not to the ranks."""
        low, high = self.shard_range(rank)
        found = []
        first = max(bisect_right(self.offsets, low) - 1, 0)
        for param, offset, numel in zip(
            self.params[first:], self.offsets[first:], self.numels[first:], strict=True
        ):
            if offset >= high:
                break
            start, stop = max(low, offset), min(high, offset + numel)
            if start < stop:
                found.append(Segment(param, start - offset, stop - start, start - low))
        return tuple(found)

    def runs(self, rank: int, alone: int) -> tuple[Run, ...]:
        """All of the shard of ``rank``: segments of ``alone`` elements or more by themselves, and what is between."""
        found, at = [], 0
        for segment in self.segments(rank):
            if segment.length < alone:
                continue
            if at < segment.shard_start:
                found.append(Run(at, segment.shard_start, None))
            at = segment.shard_start + segment.length
            found.append(Run(segment.shard_start, at, segment))
        if at < self.shard_numel:
            found.append(Run(at, self.shard_numel, None))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One rank's segments in every bucket, and the buckets they are cut from.

    Frozen, and complete: `Bucket` proves coverage over ranks, this proves that every parameter is in
    exactly one bucket, whole, or in ``dtensors``.
    """

    numels: tuple[int, ...]  # of every parameter
    buckets: tuple[Bucket, ...]
    rank: int
    world_size: int
    dtensors: frozenset[int] = (
        frozenset()
    )  # DTensors: their placements cut them, see `sharded_lamb.sharding.placements`

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
        """Elements that this rank keeps state for, padding included."""
        return sum(bucket.shard_numel for bucket in self.buckets)

    def digest(self) -> str:
        """The same on every rank of one layout, and on no other layout (SHA-256 over its integers)."""
        buckets = [(b.params, b.offsets, b.numels, b.numel) for b in self.buckets]
        placed = [[(param, self.numels[param]) for param in sorted(self.dtensors)]] if self.dtensors else []
        return hashlib.sha256(json.dumps([self.world_size, buckets, *placed]).encode()).hexdigest()

    def picture(self, names: Sequence[str], width: int = 60) -> str:
        """Who holds what, a line a parameter: its elements from left to right, a digit (mod 10) a rank."""
        lines = []
        label = max((len(name) for name in names), default=0)
        for bucket in self.buckets:
            for param, offset, numel in zip(bucket.params, bucket.offsets, bucket.numels, strict=True):
                cells = min(width, numel)
                at = [offset + cell * numel // cells for cell in range(cells)]
                owners = "".join(str(place // bucket.shard_numel % 10) for place in at)
                lines.append(f"{names[param]:<{label}}  {numel:>12,}  {owners}")
        return "\n".join(lines)


def plan_buckets(
    numels: Sequence[int],
    kinds: Sequence[Hashable],
    itemsizes: Sequence[int],
    bucket_bytes: int,
    world_size: int,
) -> tuple[Bucket, ...]:
    """Flat buckets of parameters of one kind (dtype and device), last parameters first.

    Backward makes gradients roughly in reverse order, so bucket 0 is full first. A bucket is closed once
    it holds ``bucket_bytes`` of parameters; what a bucket holds does not depend on the number of ranks.

    Args:
        numels, kinds, itemsizes: elements, kind and bytes an element of every parameter.
        bucket_bytes: when to close a bucket; a larger parameter has a bucket of its own.
        world_size: ranks that share a bucket.
    """
    filling: dict[Hashable, tuple[list[int], int]] = {}
    closed: list[list[int]] = []
    for param in reversed(range(len(numels))):
        members, held = filling.get(kinds[param], ([], 0))
        members.append(param)
        held += round_up(numels[param], BLOCK) * itemsizes[param]
        filling[kinds[param]] = (members, held)
        if held >= bucket_bytes:
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
