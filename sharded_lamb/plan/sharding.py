"""How an optimizer is sharded over ranks and which dtypes it has: the subject of one row of the table."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from sharded_lamb.core.layers import RatioBlocks
from sharded_lamb.kernels.formats import FLOATS
from sharded_lamb.sharding.buckets import Precision
from sharded_lamb.sharding.shard_plan import remainder_bits


@dataclass(frozen=True, slots=True)
class Sharding:
    """A stage on a mesh (replicate, shard) of consecutive ranks."""

    stage: int
    shard: int
    replicate: int = 1  # 1: the mesh is 1-D

    @property
    def world_size(self) -> int:
        return self.shard * self.replicate

    @property
    def mesh(self) -> str:
        """The mesh in tables: "2x4" or "8"."""
        return f"{self.replicate}x{self.shard}" if self.replicate > 1 else str(self.shard)


@dataclass(frozen=True, slots=True)
class Choices:
    """Options that do not depend on the number of ranks, named as `ShardedLamb`'s keywords."""

    model_dtype: torch.dtype = torch.float32
    master_dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype | None = None
    gather_dtype: torch.dtype | None = None  # stages 1 and 2
    store_param_remainders: bool | int = False
    ratio_blocks: RatioBlocks = field(default_factory=dict)
    bucket_mb: float = 32
    overlap: bool = True
    overlap_forward: bool = False
    sums_here: bool = False  # as on gloo's path; other backends reduce-scatter themselves

    @property
    def precision(self) -> Precision:
        return Precision.of(
            self.model_dtype,
            self.master_dtype,
            self.state_dtype,
            self.reduce_dtype,
            remainder_bits=remainder_bits(self.store_param_remainders),
            gather=self.gather_dtype,
        )

    def of_stage(self, stage: int) -> "Choices":
        """These options without those that a stage does not have."""
        encodes = self.precision.reduce is not None  # fully_shard reduces in any dtype but those of 8 bits
        if encodes and (stage == 1 or (stage == 3 and self.reduce_dtype not in FLOATS)):
            self = replace(self, reduce_dtype=None)
        return replace(self, gather_dtype=None) if stage == 3 else self


def shardings(
    world_sizes: Iterable[int], stages: Sequence[int], shards: Sequence[str], ranks_per_node: int
) -> list[Sharding]:
    """Every combination of stage, world size and way to shard, each once.

    Args:
        shards: ranks that share one copy of the state: "all", "node", or a number, which must divide every world size
            that is larger; smaller world sizes are dropped.

    Raises:
        ValueError: no combination is left, or a number does not divide a world size.
    """
    combinations = []
    for stage in stages:
        for shard in shards:
            for world in sorted(set(world_sizes)):
                combinations += list(_one(stage, world, shard, ranks_per_node))
    if not combinations:
        raise ValueError(f"no world size has as many ranks as --shard {' '.join(shards)} asks for")
    return list(dict.fromkeys(combinations))


def _one(stage: int, world: int, shard: str, ranks_per_node: int) -> Iterator[Sharding]:
    if world < 1:
        raise ValueError(f"--world-sizes must be >= 1, got {world}")
    if shard == "all":
        yield Sharding(stage, world)
        return
    if shard != "node" and not (shard.isdigit() and int(shard)):
        raise ValueError(f"--shard must be all, node or a number of ranks >= 1, got {shard!r}")
    ranks = min(world, ranks_per_node) if shard == "node" else int(shard)
    if ranks > world:
        return
    if world % ranks:
        raise ValueError(f"--shard {shard}: {world} ranks do not divide into replicas of {ranks}")
    yield Sharding(stage, ranks, world // ranks)
